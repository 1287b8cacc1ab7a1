package main

import (
	"bufio"
	"errors"
	"io"
	"os"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// vsockTimeout is the time that the other side has to answer.
var vsockTimeout = unix.Timeval{Sec: 30}

// vsockEnds has a channel for each port of the host with a connection, on which its end is told once.
var vsockEnds sync.Map

func vsockEndOf(port uint32) chan string {
	c, _ := vsockEnds.LoadOrStore(port, make(chan string, 1))
	return c.(chan string)
}

// tellEnd tells how the connection with a port of the host ended: by an error's name, or in order.
func tellEnd(port uint32, err error) {
	how := "EOF"
	if errno, ok := errors.AsType[unix.Errno](err); ok {
		how = unix.ErrnoName(errno)
	} else if err != nil {
		how = err.Error()
	}
	select {
	case vsockEndOf(port) <- how:
	default: // nobody has asked for that of an older connection
	}
}

// vsockEnd waits for the end of the connection with a port of the host, and says how it ended.
func vsockEnd(port string) (string, error) {
	n, err := strconv.ParseUint(port, 10, 32)
	if err != nil {
		return "", err
	}
	return port + " " + <-vsockEndOf(uint32(n)), nil
}

// vsockSocket parses a port and makes a socket for it.
func vsockSocket(port string) (n uint32, fd int, err error) {
	parsed, err := strconv.ParseUint(port, 10, 32)
	if err != nil {
		return 0, -1, err
	}
	fd, err = unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	return uint32(parsed), fd, os.NewSyscallError("socket", err)
}

// vsockListen echoes whatever comes over connections to a port of the guest.
func vsockListen(port string) (string, error) {
	n, fd, err := vsockSocket(port)
	if err != nil {
		return "", err
	}
	if err := unix.Bind(fd, &unix.SockaddrVM{CID: unix.VMADDR_CID_ANY, Port: n}); err != nil {
		return "", errors.Join(os.NewSyscallError("bind", err), unix.Close(fd))
	}
	if err := unix.Listen(fd, 8); err != nil {
		return "", errors.Join(os.NewSyscallError("listen", err), unix.Close(fd))
	}
	go func() {
		for {
			conn, peer, err := unix.Accept4(fd, unix.SOCK_CLOEXEC)
			if errors.Is(err, unix.EINTR) || errors.Is(err, unix.ECONNABORTED) {
				continue
			}
			if err != nil {
				return
			}
			go func() {
				tellEnd(peer.(*unix.SockaddrVM).Port, echo(os.NewFile(uintptr(conn), "vsock")))
			}()
		}
	}()
	return port, nil
}

// vsockConnect connects to a port of the host, sends a line, and answers with the line that comes back. Then it closes
// the connection, or holds it until its end.
func vsockConnect(arg string, hold bool) (string, error) {
	port, text, _ := strings.Cut(arg, " ")
	n, fd, err := vsockSocket(port)
	if err != nil {
		return "", err
	}
	conn := os.NewFile(uintptr(fd), "vsock")
	line, err := vsockAsk(conn, fd, n, text)
	if err != nil || !hold {
		return line, errors.Join(err, conn.Close())
	}
	go func() {
		_, err := io.Copy(io.Discard, conn)
		tellEnd(n, errors.Join(err, conn.Close()))
	}()
	return line, nil
}

// vsockAsk connects, sends a line, and returns the answer, for which it does not wait for ever.
func vsockAsk(conn *os.File, fd int, port uint32, text string) (string, error) {
	limit := func(t unix.Timeval) error {
		return os.NewSyscallError("setsockopt", unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &t))
	}
	if err := limit(vsockTimeout); err != nil {
		return "", err
	}
	if err := unix.Connect(fd, &unix.SockaddrVM{CID: unix.VMADDR_CID_HOST, Port: port}); err != nil {
		return "", os.NewSyscallError("connect", err)
	}
	if _, err := conn.WriteString(text + "\n"); err != nil {
		return "", err
	}
	line, err := bufio.NewReader(conn).ReadString('\n')
	return strings.TrimSpace(line), errors.Join(err, limit(unix.Timeval{}))
}

// vsockCID is the guest's address as its kernel knows it, or "none".
func vsockCID() (string, error) {
	f, err := os.Open("/dev/vsock")
	if err != nil { // without the driver
		return "none", nil //nolint:nilerr // that is the answer
	}
	defer f.Close()
	cid, err := unix.IoctlGetUint32(int(f.Fd()), unix.IOCTL_VM_SOCKETS_GET_LOCAL_CID)
	return strconv.FormatUint(uint64(cid), 10), os.NewSyscallError("ioctl", err)
}
