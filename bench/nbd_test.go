//go:build linux && amd64

package bench

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The part of the protocol of network block devices that is needed here:
// https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md. All integers are big-endian.
const (
	nbdMagic        = 0x4e42444d41474943
	nbdOptionMagic  = 0x49484156454f5054
	nbdRequestMagic = 0x25609513
	nbdReplyMagic   = 0x67446698

	nbdFixedNewstyle = 1 << 0 // handshake flags, the server's and the client's
	nbdNoZeroes      = 1 << 1
	nbdExportName    = 1 // option

	nbdRead       = 0 // commands
	nbdWrite      = 1
	nbdDisconnect = 2
	nbdFlush      = 3

	nbdGreetingBytes = 18
	nbdExportBytes   = 10
	nbdRequestBytes  = 28
	nbdReplyBytes    = 16
)

var errNBD = errors.New("unexpected answer of the NBD server")

// nbdClient is a connection to an NBD server, for one request at a time. Its socket blocks, which takes less time than a wait by
// Go's poller.
type nbdClient struct {
	socket *os.File
	in     *bufio.Reader
	size   uint64 // of the export, in bytes
	cookie uint64 // of the last request
}

// dialNBD connects to the default export of the server at a Unix socket.
func dialNBD(path string) (*nbdClient, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	socket := os.NewFile(uintptr(fd), path)
	if err := unix.Connect(fd, &unix.SockaddrUnix{Name: path}); err != nil {
		return nil, errors.Join(err, socket.Close())
	}
	// A buffer for the answer to a small read; what is larger goes past it.
	c := &nbdClient{socket: socket, in: bufio.NewReaderSize(socket, nbdReplyBytes+blockBytes)}
	if err := c.handshake(); err != nil {
		return nil, errors.Join(err, socket.Close())
	}
	return c, nil
}

func (c *nbdClient) handshake() error {
	be := binary.BigEndian
	b := make([]byte, nbdGreetingBytes)
	if _, err := io.ReadFull(c.in, b); err != nil {
		return err
	}
	const flags = nbdFixedNewstyle | nbdNoZeroes
	if be.Uint64(b) != nbdMagic || be.Uint64(b[8:]) != nbdOptionMagic || be.Uint16(b[16:])&flags != flags {
		return fmt.Errorf("%w: greeting %x", errNBD, b)
	}
	b = be.AppendUint32(nil, flags)
	b = be.AppendUint64(b, nbdOptionMagic)
	b = be.AppendUint32(b, nbdExportName)
	b = be.AppendUint32(b, 0) // length of the name
	if _, err := c.socket.Write(b); err != nil {
		return err
	}
	b = make([]byte, nbdExportBytes)
	if _, err := io.ReadFull(c.in, b); err != nil {
		return err
	}
	c.size = be.Uint64(b)
	return nil
}

// request sends a command with the data that belongs to it.
func (c *nbdClient) request(command uint16, off int64, n int, data []byte) error {
	c.cookie++
	be := binary.BigEndian
	b := make([]byte, 0, nbdRequestBytes)
	b = be.AppendUint32(b, nbdRequestMagic)
	b = be.AppendUint16(b, 0) // flags
	b = be.AppendUint16(b, command)
	b = be.AppendUint64(b, c.cookie)
	b = be.AppendUint64(b, uint64(off))
	b = be.AppendUint32(b, uint32(n))
	sent := 0
	for sent == 0 {
		var err error
		if sent, err = unix.Writev(int(c.socket.Fd()), [][]byte{b, data}); err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
		sent = max(0, sent)
	}
	// A signal may have cut it short.
	for _, p := range [][]byte{b, data} {
		done := min(sent, len(p))
		if sent -= done; done == len(p) {
			continue
		}
		if _, err := c.socket.Write(p[done:]); err != nil {
			return err
		}
	}
	return nil
}

// do makes a request, of whose answer p is a part.
func (c *nbdClient) do(command uint16, off int64, n int, data, p []byte) error {
	if err := c.request(command, off, n, data); err != nil {
		return err
	}
	b := make([]byte, nbdReplyBytes)
	if _, err := io.ReadFull(c.in, b); err != nil {
		return err
	}
	be := binary.BigEndian
	if be.Uint32(b) != nbdReplyMagic || be.Uint32(b[4:]) != 0 || be.Uint64(b[8:]) != c.cookie {
		return fmt.Errorf("%w: reply %x to command %d at %d", errNBD, b, command, off)
	}
	_, err := io.ReadFull(c.in, p)
	return err
}

func (c *nbdClient) ReadAt(p []byte, off int64) (int, error) {
	return len(p), c.do(nbdRead, off, len(p), nil, p)
}

func (c *nbdClient) WriteAt(p []byte, off int64) (int, error) {
	return len(p), c.do(nbdWrite, off, len(p), p, nil)
}

func (c *nbdClient) Flush() error { return c.do(nbdFlush, 0, 0, nil, nil) }

// Close tells the server, which does not answer that.
func (c *nbdClient) Close() error {
	return errors.Join(c.request(nbdDisconnect, 0, 0, nil), c.socket.Close())
}

// qemuNBD is the disk that a process of qemu-nbd serves, for as long as it is open.
type qemuNBD struct {
	*nbdClient
	exited <-chan error
}

// serve starts a process that serves a qcow2 image.
func (l *diskLab) serve(b *testing.B, image string) disk {
	b.Helper()
	socket := l.path()
	cmd := exec.Command("qemu-nbd", "--cache=writeback", "-k", socket, "-f", "qcow2", image)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	check(b, cmd.Start())
	b.Cleanup(func() { _ = cmd.Process.Kill() }) // if it has not been closed
	exited := make(chan error, 1)
	go func() { exited <- cmd.Wait() }()
	for {
		c, err := dialNBD(socket)
		if err == nil && c.size != diskBytes {
			b.Fatalf("%v: a disk of %d bytes", errNBD, c.size)
		}
		if err == nil {
			return qemuNBD{c, exited}
		}
		if !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ECONNREFUSED) { // it is not listening yet
			b.Fatal(err)
		}
		select {
		case err := <-exited:
			b.Fatalf("qemu-nbd: %v: %s", err, &stderr)
		case <-time.After(time.Millisecond):
		}
	}
}

// Close waits for the process, which ends with the connection.
func (q qemuNBD) Close() error { return errors.Join(q.nbdClient.Close(), <-q.exited) }

// qcow2 makes an image on the base image, with nothing in it.
func (l *diskLab) qcow2(b *testing.B) string {
	b.Helper()
	path := l.path()
	if out, err := exec.Command("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", l.image, path).CombinedOutput(); err != nil {
		b.Fatalf("qemu-img: %v: %s", err, out)
	}
	return path
}

func (l *diskLab) nbdSubject(b *testing.B) *subject {
	for _, program := range []string{"qemu-nbd", "qemu-img"} {
		if _, err := exec.LookPath(program); err != nil {
			b.Skipf("no QEMU to compare with (qemu-utils has it): %v", err)
		}
	}
	image := l.qcow2(b)
	d := l.serve(b, image)
	s := &subject{contents: l.rewriteHalf(b, d, diskBytes)}
	end(b, d)
	s.filled = func(b *testing.B) disk { return l.serve(b, image) }
	s.fresh = func(b *testing.B) disk {
		image := l.qcow2(b)
		return temporary{l.serve(b, image), image}
	}
	return s
}
