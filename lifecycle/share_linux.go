package lifecycle

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// checkPeer says whether the process that connected, or listens, is this user's.
func checkPeer(conn *net.UnixConn) error {
	raw, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	var peer *unix.Ucred
	cerr := raw.Control(func(fd uintptr) {
		peer, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	})
	if err := errors.Join(cerr, err); err != nil {
		return fmt.Errorf("who is the peer: %w", err)
	}
	if int(peer.Uid) != os.Geteuid() {
		return fmt.Errorf("%w: process %d is of user %d", ErrPeer, peer.Pid, peer.Uid)
	}
	return nil
}

// sendFile sends message, with the descriptor of file.
func sendFile(conn *net.UnixConn, message []byte, file *os.File) error {
	raw, err := file.SyscallConn()
	if err != nil {
		return err
	}
	cerr := raw.Control(func(fd uintptr) {
		_, _, err = conn.WriteMsgUnix(message, unix.UnixRights(int(fd)), nil)
	})
	return errors.Join(cerr, err)
}

// receiveFile reads a message of n bytes, and the descriptor that comes with it: one, or none with a nil file. Of several it keeps
// none, and none after an error.
func receiveFile(conn *net.UnixConn, n int) (message []byte, file *os.File, err error) {
	var fds []int
	message = make([]byte, 0, n)
	for len(message) < n && err == nil {
		var got int
		var more []int
		got, more, err = receive(conn, message[len(message):n])
		message, fds = message[:len(message)+got], append(fds, more...)
	}
	if len(fds) > 1 && err == nil {
		err = fmt.Errorf("%w: %d descriptors came with its answer", ErrPeer, len(fds))
	}
	if err == nil && len(fds) == 1 {
		return message, os.NewFile(uintptr(fds[0]), "cryovisor-image"), nil
	}
	for _, fd := range fds {
		unix.Close(fd)
	}
	return message, nil, err
}

// receive reads once, and returns all descriptors that came, whatever else is wrong. The kernel closes those for which there is no room.
func receive(conn *net.UnixConn, b []byte) (n int, fds []int, err error) {
	oob := make([]byte, unix.CmsgSpace(2*4)) // one descriptor, and another to know that it is one too many
	n, oobn, flags, _, err := conn.ReadMsgUnix(b, oob)
	if errors.Is(err, io.EOF) {
		err = fmt.Errorf("%w: it hung up", ErrPeer)
	}
	if err != nil {
		return max(n, 0), nil, err
	}
	control, err := unix.ParseSocketControlMessage(oob[:oobn])
	for i := range control {
		if rights, rerr := unix.ParseUnixRights(&control[i]); rerr == nil {
			fds = append(fds, rights...)
		}
	}
	switch {
	case err != nil:
	case flags&unix.MSG_CTRUNC != 0:
		err = fmt.Errorf("%w: too many descriptors came with its answer", ErrPeer)
	}
	return n, fds, err
}
