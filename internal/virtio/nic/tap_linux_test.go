package nic

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cryovisor/cryovisor/internal/virtio"
	"github.com/cryovisor/cryovisor/internal/virtio/virtiotest"
)

// socketTap returns a tap that is one end of a socket pair, and the other end.
func socketTap(t *testing.T) (Tap, *os.File) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	peer := os.NewFile(uintptr(fds[1]), "peer")
	t.Cleanup(func() { peer.Close() })
	return &fileTap{os.NewFile(uintptr(fds[0]), "tap")}, peer
}

// TestFullTap has nobody read what the driver sends: frames are dropped, and the device does not wait.
func TestFullTap(t *testing.T) {
	tap, peer := socketTap(t)
	d, err := New(Config{Tap: tap, MAC: testMAC})
	if err != nil {
		t.Fatal(err)
	}
	g := boot(t, d, offered)
	sent := uint64(0)
	for ; d.Stats().TxDropped == 0; sent++ {
		g.post(virtiotest.Request{Queue: txQueue, Out: testFrame(sent, 1000)})
		g.await(txQueue)
	}
	g.must(g.Transport.Quiesce(g.ctx))
	g.must(g.Transport.Resume())
	for i := range sent - 1 {
		b := make([]byte, 2000)
		n, err := peer.Read(b)
		if err != nil || !bytes.Equal(b[:n], testFrame(i, 1000)) {
			t.Fatalf("frame %d: %x, %v", i, b[:n], err)
		}
	}
}

// TestPeerGone closes the other end: the link is down, and nothing spins or waits.
func TestPeerGone(t *testing.T) {
	tap, peer := socketTap(t)
	d, err := New(Config{Tap: tap, MAC: testMAC})
	if err != nil {
		t.Fatal(err)
	}
	g := boot(t, d, offered)
	if _, err := peer.Write(testFrame(1, 60)); err != nil {
		t.Fatal(err)
	}
	g.post(virtiotest.Request{Queue: rxQueue, In: 100})
	g.await(rxQueue)
	g.must(peer.Close())
	for d.LinkErr() == nil || g.netStatus() != 0 {
		_, err := g.Wait(g.ctx)
		g.must(err)
	}
	g.post(virtiotest.Request{Queue: txQueue, Out: testFrame(1, 60)})
	g.await(txQueue)
	if s := d.Stats(); s != (Stats{RxFrames: 1, TxDropped: 1}) || g.Transport.Err() != nil {
		t.Fatalf("%+v, %v", s, g.Transport.Err())
	}
}

func TestNewTapRefuses(t *testing.T) {
	fd, err := unix.Open(os.DevNull, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if tap, err := NewTap(fd); err == nil || tap != nil {
		t.Errorf("%s is a tap: %v", os.DevNull, err)
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); !errors.Is(err, unix.EBADF) {
		t.Errorf("the descriptor is open: %v", err)
	}
	if tap, err := OpenTap("a-name-that-is-too-long"); err == nil || tap != nil {
		t.Errorf("%v", err)
	}
}

const realTapName = "cryo0"

// realTap is a tap in a network namespace of its own, a packet socket on the host's side of it, and a socket that
// commands the namespace.
type realTap struct {
	tap         Tap
	wire, route *os.File
	err         error
}

// openRealTap makes the namespace on a thread that ends with it: the thread is never unlocked. The
// descriptors keep the namespace.
func openRealTap(t *testing.T) realTap {
	made := make(chan realTap)
	go func() {
		runtime.LockOSThread()
		var r realTap
		if r.err = unix.Unshare(unix.CLONE_NEWNET); r.err == nil {
			r.tap, r.err = OpenTap(realTapName)
		}
		if r.err == nil {
			r.wire, r.err = openWire()
		}
		if r.err == nil {
			r.route, r.err = openRoute()
		}
		if r.err == nil {
			r.err = refuseOtherFlags()
		}
		made <- r
	}()
	r := <-made
	t.Cleanup(func() {
		r.wire.Close() // a nil file only returns an error
		r.route.Close()
	})
	switch err := r.err; {
	case errors.Is(err, os.ErrPermission), errors.Is(err, os.ErrNotExist),
		errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENOSYS):
		if r.tap != nil {
			r.tap.Close()
		}
		t.Skipf("a tap in a network namespace of its own needs %s and CAP_SYS_ADMIN: %v", tunDevice, err)
	case err != nil:
		t.Fatal(err)
	}
	return r
}

// refuseOtherFlags checks that NewTap wants headers.
func refuseOtherFlags() error {
	fd, err := unix.Open(tunDevice, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	ifr, err := unix.NewIfreq("cryo1")
	if err != nil {
		return err
	}
	ifr.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr); err != nil {
		return err
	}
	if _, err := NewTap(fd); err == nil {
		return errors.New("a tap without headers is accepted")
	} else if !errors.Is(err, ErrConfig) {
		return fmt.Errorf("a tap without headers: %w, not ErrConfig", err)
	}
	return nil
}

func openRoute() (*os.File, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), "netlink"), nil
}

// openWire takes the tap's interface up and returns a socket for frames of testProtocol on it.
func openWire() (*os.File, error) {
	protocol := binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, testProtocol))
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, int(protocol))
	if err != nil {
		return nil, err
	}
	wire := os.NewFile(uintptr(fd), "packet socket")
	ifr, err := unix.NewIfreq(realTapName)
	if err != nil {
		return wire, err
	}
	ifr.SetUint16(unix.IFF_UP)
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, ifr); err != nil {
		return wire, err
	}
	if err := unix.IoctlIfreq(fd, unix.SIOCGIFINDEX, ifr); err != nil {
		return wire, err
	}
	return wire, unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: protocol, Ifindex: int(ifr.Uint32())})
}

// TestRealTap sends frames through the kernel in both directions, with a pause now and then.
func TestRealTap(t *testing.T) {
	real := openRealTap(t)
	d, err := New(Config{Tap: real.tap, MAC: testMAC})
	if err != nil {
		t.Fatal(err)
	}
	g := boot(t, d, offered|virtio.FeatureIndirect|virtio.FeatureEventIdx)
	g.must(real.wire.SetReadDeadline(time.Now().Add(time.Minute)))
	for i := range uint64(200) {
		if i%20 == 7 {
			g.must(g.Transport.Quiesce(g.ctx))
			if i%40 == 7 {
				g.must(g.Transport.Resume())
			}
		}
		frame := testFrame(i, 60+int(i)*7)
		if _, err := real.wire.Write(frame[headerSize:]); err != nil {
			t.Fatal(err)
		}
		g.must(g.Transport.Resume())
		receiveReal(g, frame)
		g.post(virtiotest.Request{Queue: txQueue, Out: frame})
		g.await(txQueue)
		b := make([]byte, 2000)
		n, err := real.wire.Read(b)
		if err != nil || !bytes.Equal(b[:n], frame[headerSize:]) {
			t.Fatalf("frame %d came out as %x, %v", i, b[:n], err)
		}
	}
	if s := d.Stats(); s.TxFrames != 200 || s.RxFrames < 200 || s.TxDropped+s.RxDropped != 0 {
		t.Fatalf("%+v", s)
	}
}

// receiveReal receives until frame comes, which must be the first of testProtocol: the kernel sends frames of its own.
func receiveReal(g *guest, frame []byte) {
	g.t.Helper()
	for ours := false; !ours; {
		g.post(virtiotest.Request{Queue: rxQueue, In: bufferSize(DefaultMTU), Check: func(in []byte, n uint32) error {
			ours = n > headerSize+ethernetHeader && binary.BigEndian.Uint16(in[headerSize+12:]) == testProtocol
			want := bytes.Clone(frame)
			want[headerNumBuffers] = 1
			if ours && !bytes.Equal(in[:n], want) {
				return fmt.Errorf("frame %x in place of %x", in[:n], want)
			}
			return nil
		}})
		g.await(rxQueue)
	}
}

// TestRealTapDeleted deletes the interface while the device waits for frames.
func TestRealTapDeleted(t *testing.T) {
	real := openRealTap(t)
	d, err := New(Config{Tap: real.tap, MAC: testMAC})
	if err != nil {
		t.Fatal(err)
	}
	g := boot(t, d, offered)
	// RTM_DELLINK: struct nlmsghdr, struct ifinfomsg, and the attribute IFLA_IFNAME.
	ne := binary.NativeEndian
	attr := ne.AppendUint16(nil, uint16(unix.SizeofRtAttr+len(realTapName)+1))
	attr = append(ne.AppendUint16(attr, unix.IFLA_IFNAME), realTapName+"\x00\x00\x00"...)
	msg := ne.AppendUint32(nil, uint32(unix.SizeofNlMsghdr+unix.SizeofIfInfomsg+len(attr)))
	msg = ne.AppendUint16(msg, unix.RTM_DELLINK)
	msg = ne.AppendUint16(msg, unix.NLM_F_REQUEST)
	msg = append(append(msg, make([]byte, 8+unix.SizeofIfInfomsg)...), attr...)
	if _, err := real.route.Write(msg); err != nil {
		t.Fatal(err)
	}
	for g.config() != 0 {
	}
	// Which error it is depends on whether the poller or the kernel's read notices first.
	if d.LinkErr() == nil || g.Transport.Err() != nil {
		t.Fatalf("%v, %v", d.LinkErr(), g.Transport.Err())
	}
}

// TestRealTapDown checks that an interface that is down refuses frames, and the device does not mind.
func TestRealTapDown(t *testing.T) {
	real := openRealTap(t)
	d, err := New(Config{Tap: real.tap, MAC: testMAC})
	if err != nil {
		t.Fatal(err)
	}
	g := boot(t, d, offered)
	conn, err := real.wire.SyscallConn()
	g.must(err)
	ifr, err := unix.NewIfreq(realTapName)
	g.must(err)
	g.must(conn.Control(func(fd uintptr) { err = unix.IoctlIfreq(int(fd), unix.SIOCSIFFLAGS, ifr) }))
	g.must(err)
	g.post(virtiotest.Request{Queue: txQueue, Out: testFrame(1, 60)})
	g.await(txQueue)
	if s := d.Stats(); s.TxDropped != 1 || d.LinkErr() != nil {
		t.Fatalf("%+v, %v", s, d.LinkErr())
	}
}
