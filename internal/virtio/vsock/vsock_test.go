package vsock

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cryovisor/cryovisor/internal/virtio/virtiotest"
)

func dial(path string) (*net.UnixConn, error) {
	return net.DialUnix("unix", nil, &net.UnixAddr{Name: path, Net: "unix"})
}

// connectTo is a host program that has connected to a port of the guest.
func connectTo(path string, port uint32) (*net.UnixConn, error) {
	c, err := dial(path)
	if err != nil {
		return nil, err
	}
	if _, err := fmt.Fprintf(c, "CONNECT %d\n", port); err != nil {
		return nil, err
	}
	var line []byte
	for b := make([]byte, 1); ; {
		if _, err := io.ReadFull(c, b); err != nil {
			return nil, errors.Join(err, c.Close())
		}
		if b[0] == '\n' {
			break
		}
		line = append(line, b[0])
	}
	var host uint32
	if _, err := fmt.Sscanf(string(line), "OK %d", &host); err != nil || host < firstHostPort {
		return nil, fmt.Errorf("answer %q: %w", line, err)
	}
	return c, nil
}

func listenOn(t *testing.T, p *peer, port uint32) *net.UnixListener {
	t.Helper()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: fmt.Sprintf("%s_%d", p.path, port), Net: "unix"})
	p.must(err)
	t.Cleanup(func() { l.Close() })
	return l
}

func randomBytes(seed uint64, n int) []byte {
	b := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{byte(seed)}).Read(b)
	return b
}

// small are limits that are reached in a test.
func small() limits {
	l := defaultLimits
	l.window = 4 << 10
	return l
}

// exchange writes out, shuts down, and compares what it reads with want.
func exchange(c *net.UnixConn, out, want []byte) error {
	sent := make(chan error, 1)
	go func() {
		_, err := c.Write(out)
		sent <- errors.Join(err, c.CloseWrite())
	}()
	got := sha256.New()
	n, err := io.Copy(got, c)
	if err == nil && (int(n) != len(want) || [32]byte(got.Sum(nil)) != sha256.Sum256(want)) {
		err = fmt.Errorf("%d bytes are not the %d that the guest sent", n, len(want))
	}
	return errors.Join(err, <-sent, c.Close())
}

func TestHostConnects(t *testing.T) {
	p := newPeer(t, small())
	p.listens[80] = true
	toHost, toGuest := randomBytes(1, 3<<20), randomBytes(2, 2<<20+7)
	wait := p.host(func() error {
		c, err := connectTo(p.path, 80)
		if err != nil {
			return err
		}
		return exchange(c, toGuest, toHost)
	})
	p.until("a connection", func() bool { return len(p.conns) == 1 })
	var c *guestConn
	for _, c = range p.conns {
		c.send, c.shutAfter = toHost, shutSend
	}
	wait()
	p.until("the end", func() bool { return c.shut&shutSend != 0 })
	if [32]byte(c.got.Sum(nil)) != sha256.Sum256(toGuest) {
		t.Fatalf("%d bytes are not the %d that the host sent", c.received, len(toGuest))
	}
	c.shutAfter = shutBoth
	p.until("a reset", func() bool { return c.closed })
}

func TestGuestConnects(t *testing.T) {
	p := newPeer(t, small())
	l := listenOn(t, p, 5000)
	toHost, toGuest := randomBytes(3, 2<<20), randomBytes(4, 3<<20+1)
	wait := p.host(func() error {
		c, err := l.AcceptUnix()
		if err != nil {
			return err
		}
		return exchange(c, toGuest, toHost)
	})
	c := p.connect(key{1234, 5000})
	c.send, c.shutAfter = toHost, shutSend
	wait()
	p.until("the end", func() bool { return c.shut&shutSend != 0 })
	if [32]byte(c.got.Sum(nil)) != sha256.Sum256(toGuest) {
		t.Fatalf("%d bytes are not the %d that the host sent", c.received, len(toGuest))
	}
}

func TestRefused(t *testing.T) {
	p := newPeer(t, small())
	c := p.connect(key{1, 2})
	p.until("a reset", func() bool { return c.closed })
	p.host(func() error {
		h, err := connectTo(p.path, 9)
		if err == nil {
			h.Close()
			return errors.New("the guest does not listen, and a connection was made")
		}
		return nil
	})()
}

func TestBadLine(t *testing.T) {
	p := newPeer(t, small())
	p.host(func() error {
		for _, line := range []string{
			"\n", "CONNECT\n", "CONNECT x\n", "CONNECT -1\n", "CONNECT 4294967295\n", strings.Repeat("C", 100),
		} {
			c, err := dial(p.path)
			if err != nil {
				return err
			}
			if _, err := io.WriteString(c, line); err != nil {
				return err
			}
			if b, _ := io.ReadAll(c); len(b) != 0 {
				return fmt.Errorf("answer %q to %q", b, line)
			}
			c.Close()
		}
		return nil
	})()
}

// TestSilentClients checks that clients that say nothing are given up, so that others get their turn.
func TestSilentClients(t *testing.T) {
	l := small()
	l.waiting, l.line = 2, 20*time.Millisecond
	p := newPeer(t, l)
	p.listens[1] = true
	p.host(func() error {
		for range 4 {
			c, err := dial(p.path)
			if err != nil {
				return err
			}
			defer c.Close()
		}
		c, err := connectTo(p.path, 1)
		for err != nil && p.ctx.Err() == nil {
			// On a busy machine this client is too slow as well.
			c, err = connectTo(p.path, 1)
		}
		if err != nil {
			return err
		}
		return c.Close()
	})()
}

// TestSlowHost checks that a host program that does not read stops nobody else.
func TestSlowHost(t *testing.T) {
	p := newPeer(t, small())
	l := listenOn(t, p, 1)
	slow := p.connect(key{1, 1})
	p.until("the slow connection", func() bool { return slow.open })
	stuck, err := l.AcceptUnix()
	p.must(err)
	defer stuck.Close()
	slow.send = randomBytes(5, 1<<20)

	p.listens[80] = true
	data := randomBytes(6, 1<<20)
	wait := p.host(func() error {
		c, err := connectTo(p.path, 80)
		if err != nil {
			return err
		}
		return exchange(c, data, data)
	})
	p.until("the other connection", func() bool { return len(p.conns) == 2 })
	for k, c := range p.conns {
		c.echo = k.guestPort == 80
	}
	wait()
	if len(slow.send) == 0 {
		t.Fatal("a host program that does not read was sent everything")
	}
	// It gets it all when it reads at last.
	p.host(func() error {
		b := make([]byte, 1<<20)
		_, err := io.ReadFull(stuck, b)
		if err == nil && !bytes.Equal(b, randomBytes(5, 1<<20)) {
			err = errors.New("the bytes differ")
		}
		return err
	})()
}

// TestBytesAfterTheEnd checks that a host program gets what the guest sent before it closed.
func TestBytesAfterTheEnd(t *testing.T) {
	for _, op := range []uint16{opShutdown, opReset} {
		p := newPeer(t, small())
		l := listenOn(t, p, 1)
		c := p.connect(key{1, 1})
		p.until("a connection", func() bool { return c.open })
		c.send = []byte("the last words")
		p.settle()
		h := c.header(op)
		h.flags = shutBoth
		p.transmit(h, nil)
		p.settle()
		p.host(func() error {
			s, err := l.AcceptUnix()
			if err != nil {
				return err
			}
			defer s.Close()
			b, err := io.ReadAll(s)
			if err == nil && string(b) != "the last words" {
				err = fmt.Errorf("%q", b)
			}
			return err
		})()
		if c.closed != (op == opShutdown) {
			t.Fatalf("operation %d: reset is %v", op, c.closed)
		}
	}
}

// TestHostVanishes checks that a guest that writes to nobody is told, and what the host sent before arrives.
func TestHostVanishes(t *testing.T) {
	p := newPeer(t, small())
	l := listenOn(t, p, 1)
	c := p.connect(key{1, 1})
	p.host(func() error {
		s, err := l.AcceptUnix()
		if err != nil {
			return err
		}
		_, err = s.Write([]byte("goodbye"))
		return errors.Join(err, s.Close())
	})()
	p.until("the host's end", func() bool { return c.shut&shutSend != 0 })
	c.send = randomBytes(7, 64<<10)
	p.until("no more to be taken", func() bool { return c.shut == shutBoth })
	if string(c.bytes) != "goodbye" {
		t.Fatalf("%q", c.bytes)
	}
	p.until("all is dropped", func() bool { return len(c.send) == 0 })
	c.shutAfter = shutBoth
	p.until("a reset", func() bool { return c.closed })
}

// TestGuestReceivesNoMore checks that the host can't write then, and the guest still can.
func TestGuestReceivesNoMore(t *testing.T) {
	p := newPeer(t, small())
	l := listenOn(t, p, 1)
	c := p.connect(key{1, 1})
	p.until("a connection", func() bool { return c.open })
	c.shutAfter = shutReceive
	p.settle()
	c.send, c.shutAfter = randomBytes(8, 100<<10), shutSend
	p.host(func() error {
		s, err := l.AcceptUnix()
		if err != nil {
			return err
		}
		defer s.Close()
		if _, err := s.Write([]byte("x")); err == nil {
			return errors.New("the guest receives no more, and the host can write")
		}
		b, err := io.ReadAll(s)
		if err == nil && !bytes.Equal(b, randomBytes(8, 100<<10)) {
			err = fmt.Errorf("%d other bytes", len(b))
		}
		return err
	})()
	p.until("a reset", func() bool { return c.closed })
}

// TestViolations checks that a guest that breaks the rules of a connection loses it, and only it.
func TestViolations(t *testing.T) {
	p := newPeer(t, small())
	l := listenOn(t, p, 1)
	good := p.connect(key{1000, 1})
	p.until("a connection", func() bool { return good.open })
	accepted, err := l.AcceptUnix()
	p.must(err)
	defer accepted.Close()
	for i, violate := range []func(c *guestConn){
		func(c *guestConn) { // more than the credit
			h := c.header(opRW)
			h.len = uint32(p.limits.window) + 1
			p.transmit(h, make([]byte, h.len))
		},
		func(c *guestConn) { // a length that the packet does not have
			h := c.header(opRW)
			h.len = 100
			p.transmit(h, make([]byte, 99))
		},
		func(c *guestConn) { h := c.header(opRW); h.len = 0xffffffff; p.transmit(h, nil) },
		func(c *guestConn) { h := c.header(opCreditUpdate); h.fwdCnt = 1; p.transmit(h, nil) },
		func(c *guestConn) { p.transmit(c.header(opResponse), nil) },
		func(c *guestConn) { p.transmit(c.header(opRequest), nil) },
		func(c *guestConn) { p.transmit(c.header(opInvalid), nil) },
		func(c *guestConn) { p.transmit(c.header(99), nil) },
		func(c *guestConn) { // bytes after the end
			h := c.header(opShutdown)
			h.flags = shutSend
			p.transmit(h, nil)
			h = c.header(opRW)
			h.len = 1
			p.transmit(h, []byte{1})
		},
	} {
		c := p.connect(key{uint32(i), 1})
		p.until("a connection", func() bool { return c.open })
		s, err := l.AcceptUnix()
		p.must(err)
		violate(c)
		p.until(fmt.Sprintf("a reset for violation %d", i), func() bool { return c.closed })
		p.host(func() error { _, err := io.Copy(io.Discard, s); return err })()
		s.Close()
	}
	good.send, good.shutAfter = []byte("fine"), shutBoth
	p.host(func() error {
		b, err := io.ReadAll(accepted)
		if err == nil && string(b) != "fine" {
			err = fmt.Errorf("%q", b)
		}
		return err
	})()
}

// TestUnknown checks that packets of no connection are answered with resets that go back where they came from.
func TestUnknown(t *testing.T) {
	p := newPeer(t, small())
	var want []header
	for i, change := range []func(h *header){
		func(h *header) { h.op = opRW }, func(h *header) { h.op = opShutdown }, func(h *header) { h.op = opResponse },
		func(h *header) { h.op = 77 }, func(h *header) { h.typ = 2 }, func(h *header) { h.srcCID = 7 },
		func(h *header) { h.dstCID = 3 }, func(h *header) { h.op = opCreditRequest }, func(h *header) { h.len = 1 },
	} {
		h := p.header(key{uint32(i), 4}, opRequest)
		change(&h)
		p.transmit(h, nil)
		want = append(want, h.reset())
		p.transmit(p.header(key{uint32(i), 4}, opReset), nil) // no answer to this
	}
	p.until("resets", func() bool { return len(p.packets) >= len(want) })
	p.settle()
	if fmt.Sprint(p.packets) != fmt.Sprint(want) {
		t.Fatalf("got  %v\nwant %v", p.packets, want)
	}
}

// TestCreditRequest checks both directions: the device answers, and asks once when it has more than the guest takes.
func TestCreditRequest(t *testing.T) {
	p := newPeer(t, small())
	p.manual = true
	l := listenOn(t, p, 1)
	c := p.connect(key{1, 1})
	data := randomBytes(9, 40<<10)
	wait := p.host(func() error {
		s, err := l.AcceptUnix()
		if err != nil {
			return err
		}
		_, err = s.Write(data)
		return errors.Join(err, s.Close())
	})
	p.until("the buffer is full", func() bool { return c.received == p.window })
	p.settle()
	p.transmit(c.header(opCreditRequest), nil)
	p.settle()
	if c.received != p.window {
		t.Fatalf("%d bytes for a buffer of %d", c.received, p.window)
	}
	p.manual = false
	c.read = c.received
	wait()
	p.until("the end", func() bool { return c.shut&shutSend != 0 })
	if [32]byte(c.got.Sum(nil)) != sha256.Sum256(data) {
		t.Fatalf("%d bytes differ", c.received)
	}
}

func TestManyConnections(t *testing.T) {
	p := newPeer(t, small())
	p.listens[80] = true
	const n = 100
	wait := p.host(func() error {
		done := make(chan error, n)
		for i := range n {
			go func() {
				c, err := connectTo(p.path, 80)
				if err == nil {
					b := randomBytes(uint64(i), 20<<10+i)
					err = exchange(c, b, b)
				}
				done <- err
			}()
		}
		var err error
		for range n {
			err = errors.Join(err, <-done)
		}
		return err
	})
	p.until("all connections", func() bool {
		for _, c := range p.conns {
			c.echo = true
		}
		return len(p.conns) == n
	})
	wait()
	p.until("all resets", func() bool {
		ended := true
		for _, c := range p.conns {
			ended = ended && c.closed
		}
		return ended
	})
}

// TestLimit checks that connections beyond the limit are refused, and that ended ones make room.
func TestLimit(t *testing.T) {
	l := small()
	l.connections = 3
	p := newPeer(t, l)
	socket := listenOn(t, p, 1)
	var hosts []*net.UnixConn
	for i := range 3 {
		c := p.connect(key{uint32(i), 1})
		p.until("a connection", func() bool { return c.open })
		s, err := socket.AcceptUnix()
		p.must(err)
		defer s.Close()
		hosts = append(hosts, s)
	}
	refused := p.connect(key{10, 1})
	p.until("a reset", func() bool { return refused.closed })
	p.host(func() error {
		c, err := dial(p.path)
		if err != nil {
			return err
		}
		defer c.Close()
		if b, _ := io.ReadAll(c); len(b) != 0 {
			return fmt.Errorf("%q", b)
		}
		return nil
	})()
	p.conns[key{0, 1}].shutAfter = shutBoth
	p.host(func() error { _, err := io.Copy(io.Discard, hosts[0]); return err })()
	hosts[0].Close()
	for i := uint32(20); ; i++ {
		// The goroutines of the first may not have ended yet.
		c := p.connect(key{i, 1})
		p.until("an answer", func() bool { return c.open || c.closed })
		if c.open {
			return
		}
	}
}

// TestResetsAreBounded checks that a guest that takes no answers is not listened to any more, until it does.
func TestResetsAreBounded(t *testing.T) {
	l := small()
	l.resets = 5
	p := newPeer(t, l)
	p.must(p.d.Init(^p.d.Features|p.d.Features, 64)) // without receive buffers
	for i := range 20 {
		h := p.header(key{uint32(i), 1}, opRW)
		p.transmit(h, nil)
		p.post(p.outbox[i])
	}
	p.outbox = nil
	p.must(p.d.Rings[queueTX].Kick())
	p.d.Idle()
	n, err := p.d.Rings[queueTX].Collect()
	p.must(err)
	if n != l.resets {
		t.Fatalf("%d packets were taken, the limit is %d", n, l.resets)
	}
	p.until("all resets", func() bool { return len(p.packets) == 20 })
}

// TestQuiesce quiesces and saves the device again and again in the midst of transfers in both directions.
func TestQuiesce(t *testing.T) {
	p := newPeer(t, small())
	p.listens[80] = true
	data := randomBytes(11, 1<<20)
	wait := p.host(func() error {
		c, err := connectTo(p.path, 80)
		if err != nil {
			return err
		}
		return exchange(c, data, data)
	})
	p.until("a connection", func() bool { return len(p.conns) == 1 })
	var c *guestConn
	for _, c = range p.conns {
		c.echo = true
	}
	for i := 1; i <= 50; i++ {
		p.until("some bytes", func() bool { return int(c.received) >= i*len(data)/60 })
		p.must(p.d.Transport.Quiesce(p.ctx))
		before := p.d.RAM.Bytes()
		_, err := p.d.Transport.Save()
		p.must(err)
		if !bytes.Equal(before, p.d.RAM.Bytes()) {
			t.Fatal("guest memory changes while the device is quiesced")
		}
		p.must(p.d.Transport.Resume())
	}
	wait()
	if p.resets != 0 {
		t.Fatal("the guest was told that its connections are gone")
	}
}

// TestRestore checks what a new process does with the connections of the old one.
func TestRestore(t *testing.T) {
	p := newPeer(t, small())
	p.listens[80] = true
	l := listenOn(t, p, 1)
	guest := p.connect(key{7, 1})
	p.until("a connection", func() bool { return guest.open })
	s, err := l.AcceptUnix()
	p.must(err)
	defer s.Close()
	var first *net.UnixConn
	p.host(func() (err error) { first, err = connectTo(p.path, 80); return err })()
	defer first.Close()
	p.until("two connections", func() bool { return len(p.conns) == 2 })
	old := map[key]*guestConn{}
	for k, c := range p.conns {
		old[k] = c
	}

	p.move()
	p.until("the event", func() bool { return p.resets == 1 })
	for k := range old {
		p.transmit(p.header(k, opRW), nil)
	}
	p.until("resets", func() bool { return len(p.packets) == len(old) })
	for _, h := range p.packets {
		if h.op != opReset || old[key{h.dstPort, h.srcPort}] == nil {
			t.Fatalf("%+v", h)
		}
	}
	for _, c := range []*net.UnixConn{s, first} {
		if b, err := io.ReadAll(c); err != nil || len(b) != 0 {
			t.Fatalf("%q, %v from a connection that is gone", b, err)
		}
	}

	wait := p.host(func() error {
		c, err := connectTo(p.path, 80)
		if err != nil {
			return err
		}
		return exchange(c, []byte("again"), []byte("again"))
	})
	p.until("a new connection", func() bool {
		for k, c := range p.conns {
			c.echo = old[k] == nil
		}
		return len(p.conns) == 3
	})
	wait()
	if p.resets != 1 {
		t.Fatalf("%d events", p.resets)
	}
}

// TestRestoreWithoutBuffer checks that the event waits for a buffer, and host programs for the event.
func TestRestoreWithoutBuffer(t *testing.T) {
	p := newPeer(t, small())
	p.must(p.d.Init(^p.d.Features|p.d.Features, 64))
	p.listens[80] = true
	p.move()
	p.move() // what was not delivered is not forgotten
	wait := p.host(func() error {
		c, err := connectTo(p.path, 80)
		if err != nil {
			return err
		}
		return c.Close()
	})
	for range 24 {
		p.post(virtiotest.Request{Queue: queueRX, In: p.rxSize, Check: p.receive})
	}
	p.must(p.d.Rings[queueRX].Kick())
	p.d.Idle()
	if n, err := p.d.Rings[queueRX].Collect(); n != 0 || err != nil {
		t.Fatalf("%d packets before the event, %v", n, err)
	}
	p.until("the event", func() bool { return p.resets == 1 })
	wait()
}

// TestRestoreWaitsForTheGuest checks that a guest that has not dealt with the event gets no packets: it would forget what
// they are about when it does.
func TestRestoreWaitsForTheGuest(t *testing.T) {
	p := newPeer(t, small())
	p.pump()
	p.move()
	p.d.Idle()
	event, rx := p.d.Rings[queueEvent], p.d.Rings[queueRX]
	if n, err := event.Collect(); n != 1 || err != nil || p.resets != 1 {
		t.Fatalf("%d events, %v", n, err)
	}
	// A packet of no connection, to be answered with a reset.
	p.transmit(p.header(key{7, 1}, opRW), nil)
	if !p.post(p.outbox[0]) {
		t.Fatal("no room for a packet")
	}
	p.outbox = nil
	p.must(p.d.Rings[queueTX].Kick())
	p.d.Idle()
	if n, err := p.d.Rings[queueTX].Collect(); n != 1 || err != nil {
		t.Fatalf("%d packets were taken, %v", n, err)
	}
	if n, err := rx.Collect(); n != 0 || err != nil {
		t.Fatalf("%d packets before the guest is done with the event, %v", n, err)
	}
	p.until("the reset", func() bool { return len(p.packets) == 1 }) // puts the event's buffer back
	if p.packets[0].op != opReset {
		t.Fatalf("%+v", p.packets[0])
	}
}

func TestSavedDialIsReset(t *testing.T) {
	d, err := New(Config{CID: testCID, Path: testPath(t)})
	if err != nil {
		t.Fatal(err)
	}
	c := d.newConn(stateDialing)
	c.key = key{3, 4}
	d.conns[c.key] = c
	b, err := d.Save()
	if err != nil {
		t.Fatal(err)
	}
	delete(d.conns, c.key)
	if err := d.Restore(b); err != nil {
		t.Fatal(err)
	}
	if len(d.resets) != 1 || d.resets[0].dstPort != 3 || d.resets[0].srcPort != 4 || d.resets[0].op != opReset {
		t.Fatalf("%+v", d.resets)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestPath(t *testing.T) {
	path := testPath(t)
	cfg := Config{CID: testCID, Path: path}
	d, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	file, err := os.Lstat(path)
	if err != nil || file.Mode() != fs.ModeSocket|0o600 {
		t.Fatalf("%v, %v", file, err)
	}
	if _, err := New(cfg); !errors.Is(err, ErrInUse) {
		t.Fatalf("a second device at the same path: %v", err)
	}
	if c, err := dial(path); err != nil {
		t.Fatalf("the first is gone: %v", err)
	} else {
		c.Close()
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if left, err := os.ReadDir(filepath.Dir(path)); err != nil || len(left) != 0 {
		t.Fatalf("left behind: %v, %v", left, err)
	}

	stale, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	stale.SetUnlinkOnClose(false)
	stale.Close()
	if d, err = New(cfg); err != nil {
		t.Fatalf("a stale socket: %v", err)
	}
	// Another's socket at the same path is not removed.
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	other, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if c, err := dial(path); err != nil {
		t.Fatalf("another's socket: %v", err)
	} else {
		c.Close()
	}
	if err := other.Close(); err != nil {
		t.Fatal(err)
	}

	if err := os.WriteFile(path, []byte("data"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := New(cfg); !errors.Is(err, ErrInUse) {
		t.Fatalf("a file at the path: %v", err)
	}
	if b, err := os.ReadFile(path); err != nil || string(b) != "data" {
		t.Fatalf("the file: %q, %v", b, err)
	}
}

func TestConfig(t *testing.T) {
	path := testPath(t)
	for _, cfg := range []Config{
		{CID: 2, Path: path},
		{CID: 0xffffffff, Path: path},
		{CID: 1 << 32, Path: path},
		{CID: 3},
		{CID: 3, Path: strings.Repeat("x", maxPath+1)},
	} {
		if d, err := New(cfg); !errors.Is(err, ErrConfig) {
			t.Fatalf("%+v: %v, %v", cfg, d, err)
		}
	}
}

// TestCloseInTheMidst checks that a device ends while host programs do nothing, and gives them what the guest sent.
func TestCloseInTheMidst(t *testing.T) {
	l := small()
	l.drain = 500 * time.Millisecond
	p := newPeer(t, l)
	socket := listenOn(t, p, 1)
	silent, err := dial(p.path)
	p.must(err)
	defer silent.Close()
	c := p.connect(key{1, 1})
	p.until("a connection", func() bool { return c.open })
	s, err := socket.AcceptUnix()
	p.must(err)
	defer s.Close()
	c.send = []byte("the last words")
	p.settle()
	stuck := p.connect(key{2, 1})
	p.until("a connection", func() bool { return stuck.open })
	stuck.send = randomBytes(12, 4<<20) // more than the socket takes
	p.pump()
	p.must(p.d.Transport.Quiesce(context.Background()))
	p.must(p.d.Transport.Close())
	if b, err := io.ReadAll(s); err != nil || string(b) != "the last words" {
		t.Fatalf("%q, %v", b, err)
	}
}
