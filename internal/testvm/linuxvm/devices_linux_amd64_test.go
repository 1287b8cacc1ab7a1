package linuxvm

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cryovisor/cryovisor/internal/testvm/kvmlab"
)

// stream sends random bytes over a connection that echoes them, and checks what comes back.
type stream struct {
	conn   net.Conn
	closed chan struct{} // closed when no more is to be sent

	mu      sync.Mutex
	changed *sync.Cond
	sent    int64 // valid when the sender has ended
	got     int64
	ended   bool
	err     error // of reading; nil at an end in order
	wrong   bool

	sender, receiver sync.WaitGroup
}

var streamSeed = [32]byte{'s', 't', 'r', 'e', 'a', 'm'}

func newStream(t *testing.T, conn net.Conn) *stream {
	s := &stream{conn: conn, closed: make(chan struct{})}
	s.changed = sync.NewCond(&s.mu)
	s.sender.Go(s.send)
	s.receiver.Go(s.receive)
	t.Cleanup(func() {
		conn.Close()
		s.sender.Wait()
		s.receiver.Wait()
	})
	return s
}

func (s *stream) send() {
	random, b := rand.NewChaCha8(streamSeed), make([]byte, 8<<10)
	for {
		select {
		case <-s.closed:
			if c, ok := s.conn.(interface{ CloseWrite() error }); ok {
				_ = c.CloseWrite() // the receiver sees what comes of it
			}
			return
		default:
		}
		_, _ = random.Read(b) // it never fails
		n, err := s.conn.Write(b)
		s.mu.Lock()
		s.sent += int64(n)
		s.mu.Unlock()
		if err != nil {
			return
		}
	}
}

func (s *stream) receive() {
	random, b, want := rand.NewChaCha8(streamSeed), make([]byte, 8<<10), make([]byte, 8<<10)
	for {
		n, err := s.conn.Read(b)
		_, _ = random.Read(want[:n])
		s.mu.Lock()
		s.wrong = s.wrong || !bytes.Equal(b[:n], want[:n])
		s.got += int64(n)
		if err != nil || s.wrong {
			s.ended = true
			if !errors.Is(err, io.EOF) {
				s.err = err
			}
		}
		ended := s.ended
		s.changed.Broadcast()
		s.mu.Unlock()
		if ended {
			return
		}
	}
}

// more waits until n more bytes have come back.
func (s *stream) more(n int64) error {
	if err := s.conn.SetReadDeadline(time.Now().Add(lineLimit)); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for want := s.got + n; s.got < want && !s.ended; {
		s.changed.Wait()
	}
	switch {
	case s.wrong:
		return fmt.Errorf("wrong bytes among the first %d", s.got)
	case s.ended:
		return fmt.Errorf("the connection ended after %d bytes: %w", s.got, errors.Join(s.err, io.ErrUnexpectedEOF))
	}
	return nil
}

// end waits for the end of the connection, which the other side brings about.
func (s *stream) end() error {
	s.receiver.Wait()
	s.conn.Close()
	s.sender.Wait()
	if s.wrong {
		return fmt.Errorf("wrong bytes among the first %d", s.got)
	}
	if errors.Is(s.err, os.ErrDeadlineExceeded) {
		return fmt.Errorf("the connection has no end: %w", s.err)
	}
	return nil
}

// finish ends it in order: everything that was sent has come back.
func (s *stream) finish() error {
	close(s.closed)
	if err := s.conn.SetReadDeadline(time.Now().Add(lineLimit)); err != nil {
		return err
	}
	s.receiver.Wait()
	s.conn.Close()
	s.sender.Wait()
	if s.wrong || s.err != nil || s.got != s.sent {
		return fmt.Errorf("of %d bytes %d came back; wrong: %t; %w", s.sent, s.got, s.wrong, s.err)
	}
	return nil
}

// Ports of the test with sockets.
const (
	echoPort    = 1000 // in the guest
	connectPort = 52   // on the host
	holdPort    = 53
)

// lineServer answers on a port of the host: it sends back the first line of each connection, holds the connection, and
// gives it out.
func (s *saga) lineServer(port int) <-chan net.Conn {
	s.t.Helper()
	l, err := net.Listen("unix", fmt.Sprintf("%s_%d", s.job.Vsock, port))
	if err != nil {
		s.fatalf("%v", err)
	}
	var wg sync.WaitGroup
	conns := make(chan net.Conn, 16)
	wg.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			if line, err := bufio.NewReader(conn).ReadString('\n'); err == nil {
				_, _ = io.WriteString(conn, line) // the guest misses it
			}
			conns <- conn
		}
	})
	s.t.Cleanup(func() {
		l.Close()
		wg.Wait()
		for len(conns) > 0 {
			(<-conns).Close()
		}
	})
	return conns
}

// dialGuest connects to the guest's echo port and returns the port of the host that the connection got.
func (s *saga) dialGuest() (net.Conn, string, error) {
	conn, err := net.Dial("unix", s.job.Vsock)
	if err != nil {
		return nil, "", err
	}
	// Byte by byte: what follows the line is the guest's.
	err = conn.SetDeadline(time.Now().Add(lineLimit))
	if err == nil {
		_, err = fmt.Fprintf(conn, "CONNECT %d\n", echoPort)
	}
	var line []byte
	for b := make([]byte, 1); err == nil && !bytes.HasSuffix(line, []byte("\n")); {
		if _, err = io.ReadFull(conn, b); err == nil {
			line = append(line, b[0])
		}
	}
	port, ok := strings.CutPrefix(strings.TrimSpace(string(line)), "OK ")
	if err == nil && !ok {
		err = fmt.Errorf("the device says %q", line)
	}
	if err != nil {
		return nil, "", errors.Join(err, conn.Close())
	}
	if err := conn.SetDeadline(time.Time{}); err != nil {
		return nil, "", errors.Join(err, conn.Close())
	}
	return conn, port, nil
}

// connect connects to the guest and has it echo 300 KiB. It also returns the port of the host that the connection got.
func (s *saga) connect(t *testing.T) (*stream, string) {
	t.Helper()
	conn, port, err := s.dialGuest()
	if err != nil {
		s.fatalf("no connection to the guest: %v", err)
	}
	st := newStream(t, conn)
	if err := st.more(300 << 10); err != nil {
		s.fatalf("%v", err)
	}
	return st, port
}

// wantLast gives an order and checks its answer.
func (s *saga) wantLast(order string, answers ...string) {
	s.t.Helper()
	s.tell(order)
	name, _, _ := strings.Cut(order, " ")
	lines := s.until("done " + name)
	last := lines[len(lines)-1]
	if !slices.Contains(answers, last) {
		s.fatalf("%s: %q, want one of %q", order, last, answers)
	}
}

// resets are how the guest's program may learn that a connection is gone: in the midst of a call, or by the next one.
var resets = []string{"ECONNRESET", "ENOTCONN", "EPIPE"}

func (s *saga) wantReset(port string) {
	s.t.Helper()
	var answers []string
	for _, how := range resets {
		answers = append(answers, fmt.Sprintf("done vsock-end %s %s", port, how))
	}
	s.wantLast("vsock-end "+port, answers...)
}

func (s *saga) wantCID() {
	s.t.Helper()
	lines := s.order("entropy")
	if last, want := lines[len(lines)-1], fmt.Sprintf(" cid=%d", s.job.CID); !strings.HasSuffix(last, want) {
		s.fatalf("the guest says %q, want%s", last, want)
	}
}

// TestLinuxVsock pauses a guest with open connections and bytes on their way. Both sides see their end, and new ones work.
func TestLinuxVsock(t *testing.T) {
	Run(t, labConfig, func(t *testing.T, lab *Lab) {
		s := newSaga(t, lab, Options{Kernel: kvmlab.Cloud, Modules: deviceModules(kvmlab.Cloud)})
		s.useVsock(3)
		s.lineServer(connectPort)
		held := s.lineServer(holdPort)
		s.start()
		s.until("up ")
		s.order("start")
		s.order(fmt.Sprintf("vsock-listen %d", echoPort))
		for cycle := range rounds(2, 6) {
			st, port := s.connect(t)
			s.wantCID()
			s.wantLast(fmt.Sprintf("vsock-connect %d hello", connectPort), "done vsock-connect hello")
			s.wantLast(fmt.Sprintf("vsock-hold %d %d", holdPort, cycle), fmt.Sprintf("done vsock-hold %d", cycle))
			heldConn := <-held
			if err := st.more(64 << 10); err != nil {
				s.fatalf("%v", err)
			}
			s.pause()
			if err := st.end(); err != nil {
				s.fatalf("%v", err)
			}
			if n, err := heldConn.Read(make([]byte, 1)); err == nil {
				s.fatalf("%d bytes come over a connection of a guest that is paused", n)
			}
			heldConn.Close()
			s.job.CID++
			s.start()
			other, _ := s.connect(t) // at once: the device holds it until the guest is done with the old ones
			other.conn.Close()
			s.wantReset(port)
			s.wantReset(fmt.Sprint(holdPort))
			s.wantCID()
		}
		s.finish()
	})
}

// The network between host and guest: addresses for documentation (RFC 5737).
const (
	hostAddress  = "192.0.2.1"
	guestAddress = "192.0.2.2"
	tcpPort      = 7
	closedPort   = 9
)

// newTap makes a tap that outlives the processes that use it, with an address, and returns its name and index.
func newTap(t *testing.T) (name string, index int) {
	t.Helper()
	persist := func(name string, keep int) string {
		fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
		if err != nil {
			noTap(t, err)
		}
		defer func() { _ = unix.Close(fd) }()
		req, err := unix.NewIfreq(name)
		if err != nil {
			t.Fatal(err)
		}
		req.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
		if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, req); err != nil {
			noTap(t, err)
		}
		if err := unix.IoctlSetInt(fd, unix.TUNSETPERSIST, keep); err != nil {
			t.Fatal(err)
		}
		return req.Name()
	}
	name = persist("cryo%d", 1)
	t.Cleanup(func() { persist(name, 0) })
	if err := setAddress(name); err != nil {
		t.Fatal(err)
	}
	i, err := net.InterfaceByName(name)
	if err != nil {
		t.Fatal(err)
	}
	return name, i.Index
}

// noTap skips the test where a host lacks taps or does not let us have one. The lab has them.
func noTap(t *testing.T, err error) {
	t.Helper()
	missing := errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM)
	if missing && !kvmlab.Inside() {
		t.Skipf("a tap: %v", err)
	}
	t.Fatalf("a tap: %v", err)
}

// setAddress gives a tap the host's address and brings it up.
func setAddress(name string) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(fd) }()
	for _, set := range []struct {
		request uint
		ip      []byte
	}{{unix.SIOCSIFADDR, net.ParseIP(hostAddress).To4()}, {unix.SIOCSIFNETMASK, net.CIDRMask(24, 32)}} {
		req, err := unix.NewIfreq(name)
		if err != nil {
			return err
		}
		if err := errors.Join(req.SetInet4Addr(set.ip), unix.IoctlIfreq(fd, set.request, req)); err != nil {
			return err
		}
	}
	req, err := unix.NewIfreq(name)
	if err != nil {
		return err
	}
	req.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, req)
}

// listenARP opens a packet socket for the ARP packets of an interface.
func listenARP(t *testing.T, index int) int {
	t.Helper()
	const networkOrder = unix.ETH_P_ARP>>8 | unix.ETH_P_ARP&0xff<<8
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, networkOrder)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(fd) })
	limit := unix.NsecToTimeval(lineLimit.Nanoseconds())
	if err := errors.Join(
		unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: networkOrder, Ifindex: index}),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &limit),
	); err != nil {
		t.Fatal(err)
	}
	return fd
}

// waitAnnouncement waits for an ARP packet by which the guest tells everybody of its address: that of the sender and
// the one that is asked for (RFC 5227, section 3).
func waitAnnouncement(fd int) error {
	const sender, target, end = 14 + 14, 14 + 24, 14 + 28
	ip := net.ParseIP(guestAddress).To4()
	for b := make([]byte, 2048); ; {
		n, _, err := unix.Recvfrom(fd, b, 0)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return err
		case n >= end && bytes.Equal(b[sender:sender+4], ip) && bytes.Equal(b[target:end], ip):
			return nil
		}
	}
}

// wantNetwork proves both ways by a port that is closed.
func (s *saga) wantNetwork() {
	s.t.Helper()
	conn, err := net.DialTimeout("tcp", fmt.Sprintf("%s:%d", guestAddress, closedPort), lineLimit)
	if err == nil {
		conn.Close()
	}
	if !errors.Is(err, unix.ECONNREFUSED) {
		s.fatalf("a port where nobody listens: %v", err)
	}
}

// TestLinuxNet pauses a guest with a TCP connection to the host and bytes on their way. The connection goes on.
func TestLinuxNet(t *testing.T) {
	cfg := labConfig
	cfg.Modules = []string{"tun"}
	Run(t, cfg, func(t *testing.T, lab *Lab) {
		tap, index := newTap(t)
		s := newSaga(t, lab, Options{Kernel: kvmlab.Cloud, Modules: deviceModules(kvmlab.Cloud)})
		s.job.Tap = tap
		s.start()
		s.until("up ")
		s.order("start")
		s.order("net " + guestAddress + "/24")
		s.order(fmt.Sprintf("tcp-echo %d", tcpPort))
		s.wantNetwork()
		conn, err := net.DialTimeout("tcp", fmt.Sprintf("%s:%d", guestAddress, tcpPort), lineLimit)
		if err != nil {
			s.fatalf("%v", err)
		}
		st := newStream(t, conn)
		for range rounds(2, 6) {
			if err := st.more(1 << 20); err != nil {
				s.fatalf("%v", err)
			}
			s.pause()
			arp := listenARP(t, index)
			s.start()
			if err := waitAnnouncement(arp); err != nil {
				s.fatalf("the guest does not announce itself: %v", err)
			}
			s.wantNetwork()
		}
		if err := errors.Join(st.more(1<<20), st.finish()); err != nil {
			s.fatalf("%v", err)
		}
		s.finish()
	})
}
