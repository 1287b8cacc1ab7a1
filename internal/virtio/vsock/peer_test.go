package vsock

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"hash"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/cryovisor/cryovisor/confine/confinetest"
	"github.com/cryovisor/cryovisor/internal/virtio"
	"github.com/cryovisor/cryovisor/internal/virtio/virtiotest"
)

func TestMain(m *testing.M) {
	confinetest.Main()
	goleak.VerifyTestMain(m)
}

const testCID = 42

// testPath returns a path for a socket, in a directory whose name is short.
func testPath(t testing.TB) string {
	dir, err := os.MkdirTemp("", "vs")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return filepath.Join(dir, "sock")
}

// peer is a guest's socket layer, on top of a driver. It belongs to the goroutine of the test.
type peer struct {
	t       *testing.T
	ctx     context.Context
	d       *virtiotest.Driver
	path    string
	limits  limits
	listens map[uint32]bool // ports
	conns   map[key]*guestConn
	packets []header // that are of no connection
	resets  int      // transport reset events
	window  uint32   // buffer of each connection
	manual  bool     // connections don't read: their test does
	rxSize  int      // largest receive buffer, payload included
	outbox  []virtiotest.Request
}

// guestConn is a connection as the guest sees it.
type guestConn struct {
	p                       *peer
	key                     key
	open, closed            bool   // the host has accepted; has reset it
	shut                    uint32 // flags from the host
	got                     hash.Hash
	bytes                   []byte // what was received, in a small test
	received, read, told    uint32
	sent, hostRead, hostBuf uint32
	send                    []byte // not sent yet
	shutAfter               uint32 // flags to send after that
	echo                    bool
}

func newPeer(t *testing.T, l limits) *peer {
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	t.Cleanup(cancel)
	p := &peer{
		t: t, ctx: ctx, path: testPath(t), limits: l,
		listens: map[uint32]bool{}, conns: map[key]*guestConn{}, window: 8 << 10, rxSize: 4096,
	}
	p.d = virtiotest.NewDriver(virtiotest.NewRAM(2<<20), rand.New(rand.NewPCG(1, 2)))
	p.must(p.d.Attach(p.device()))
	t.Cleanup(func() { p.must(p.d.Transport.Close()) })
	p.must(p.d.Init(^virtio.Feature(0), 64))
	p.fill()
	return p
}

func (p *peer) device() virtio.Device {
	p.t.Helper()
	d, err := newDevice(Config{CID: testCID, Path: p.path}, p.limits)
	p.must(err)
	return d
}

func (p *peer) must(err error) {
	p.t.Helper()
	if err != nil {
		p.t.Fatal(err)
	}
}

// fill keeps buffers in the rx and event queues.
func (p *peer) fill() {
	for p.d.Rings[queueRX].Pending() < 24 {
		size := headerSize + 1 + p.d.Rand.IntN(p.rxSize)
		if !p.post(virtiotest.Request{Queue: queueRX, In: size, Check: p.receive}) {
			break
		}
	}
	for p.d.Rings[queueEvent].Pending() < 4 {
		if !p.post(virtiotest.Request{Queue: queueEvent, In: 4, Check: p.event}) {
			break
		}
	}
}

func (p *peer) post(r virtiotest.Request) bool {
	ok, err := p.d.Rings[r.Queue].Post(r)
	p.must(err)
	return ok
}

func (p *peer) event(in []byte, n uint32) error {
	if n != 4 || !bytes.Equal(in, make([]byte, 4)) {
		return fmt.Errorf("an event of %d bytes: %x", n, in)
	}
	p.resets++
	for _, c := range p.conns {
		c.closed = true
	}
	return nil
}

// transmit queues a packet.
func (p *peer) transmit(h header, payload []byte) {
	p.outbox = append(p.outbox, virtiotest.Request{
		Queue: queueTX, Out: append(h.append(nil), payload...),
		Check: func(_ []byte, n uint32) error {
			if n != 0 {
				return fmt.Errorf("%d bytes were written to a packet that was sent", n)
			}
			return nil
		},
	})
}

func (p *peer) header(k key, op uint16) header {
	return header{
		srcCID: testCID, dstCID: hostCID, srcPort: k.guestPort, dstPort: k.hostPort, typ: typeStream, op: op,
		bufAlloc: p.window,
	}
}

// connect asks for a connection to the host.
func (p *peer) connect(k key) *guestConn {
	c := p.newConn(k)
	p.transmit(p.header(k, opRequest), nil)
	return c
}

func (p *peer) newConn(k key) *guestConn {
	c := &guestConn{p: p, key: k, got: sha256.New()}
	p.conns[k] = c
	return c
}

// receive is a packet from the device.
func (p *peer) receive(in []byte, n uint32) error {
	if n < headerSize {
		return fmt.Errorf("a packet of %d bytes", n)
	}
	h := decodeHeader((*[headerSize]byte)(in))
	payload := in[headerSize:n]
	if int(h.len) != len(payload) || h.op != opRW && h.len != 0 {
		return fmt.Errorf("operation %d says %d bytes, and has %d", h.op, h.len, len(payload))
	}
	k := key{h.dstPort, h.srcPort}
	c := p.conns[k]
	if h.op == opRequest {
		if c != nil && !c.closed {
			return fmt.Errorf("port %d is used again", k.hostPort)
		}
		if !p.listens[k.guestPort] {
			p.transmit(p.header(k, opReset), nil)
			return nil
		}
		c = p.newConn(k)
		c.open, c.hostBuf = true, h.bufAlloc
		p.transmit(c.header(opResponse), nil)
		return nil
	}
	if c == nil || c.closed {
		p.packets = append(p.packets, h)
		return nil
	}
	if h.srcCID != hostCID || h.dstCID != testCID || h.typ != typeStream {
		return fmt.Errorf("a packet of %+v", h)
	}
	return c.receive(h, payload)
}

func (c *guestConn) receive(h header, payload []byte) error {
	c.hostRead, c.hostBuf = h.fwdCnt, h.bufAlloc
	switch h.op {
	case opResponse:
		c.open = true
	case opReset:
		c.closed = true
	case opRW:
		if len(payload) == 0 || c.shut&shutSend != 0 {
			return fmt.Errorf("%d bytes after shutdown %d", len(payload), c.shut)
		}
		c.received += h.len
		if c.received-c.told > c.p.window {
			return fmt.Errorf("the device ignores credit: %d bytes for a buffer of %d", c.received-c.told, c.p.window)
		}
		c.got.Write(payload)
		if c.received < 1<<16 {
			c.bytes = append(c.bytes, payload...)
		}
		if c.echo {
			c.send = append(c.send, payload...)
		}
		if !c.p.manual {
			c.read = c.received
		}
	case opShutdown:
		c.shut |= h.flags
		if c.echo && c.shut&shutSend != 0 {
			c.shutAfter = shutBoth
		}
	case opCreditRequest:
		c.p.transmit(c.header(opCreditUpdate), nil)
	case opCreditUpdate:
	default:
		return fmt.Errorf("operation %d", h.op)
	}
	return nil
}

func (c *guestConn) header(op uint16) header {
	h := c.p.header(c.key, op)
	h.fwdCnt = c.read
	c.told = c.read
	return h
}

// flush sends what there is credit for.
func (c *guestConn) flush() {
	for c.open && !c.closed && len(c.send) > 0 {
		n := min(len(c.send), int(c.hostBuf-(c.sent-c.hostRead)), 3000)
		if n <= 0 {
			return
		}
		h := c.header(opRW)
		h.len = uint32(n)
		c.p.transmit(h, c.send[:n])
		c.send = c.send[n:]
		c.sent += uint32(n)
	}
	if c.open && !c.closed && c.shutAfter != 0 {
		h := c.header(opShutdown)
		h.flags, c.shutAfter = c.shutAfter, 0
		c.p.transmit(h, nil)
	}
	if c.open && !c.closed && c.read-c.told >= c.p.window/2 {
		c.p.transmit(c.header(opCreditUpdate), nil)
	}
}

// pump does all that a driver can do without waiting.
func (p *peer) pump() {
	for _, r := range p.d.Rings {
		_, err := r.Collect()
		p.must(err)
	}
	p.fill()
	for _, c := range p.conns {
		c.flush()
	}
	for len(p.outbox) > 0 && p.post(p.outbox[0]) {
		p.outbox = p.outbox[1:]
	}
	for _, r := range p.d.Rings {
		p.must(r.Kick())
	}
}

// until works until done. It waits for interrupts only; the host's side calls p.d.Interrupt after it has done what
// done asks for.
func (p *peer) until(what string, done func() bool) {
	p.t.Helper()
	for p.pump(); !done(); p.pump() {
		if _, err := p.d.Wait(p.ctx); err != nil {
			p.t.Fatalf("until %s: %v", what, err)
		}
	}
}

// settle works until the device has nothing more to do with what it was sent so far.
func (p *peer) settle() {
	p.t.Helper()
	p.until("all is sent", func() bool { return len(p.outbox) == 0 && p.d.Rings[queueTX].Pending() == 0 })
	p.d.Idle()
	p.pump()
}

// host runs f, a host program, on a goroutine. The function that it returns works until f has ended.
func (p *peer) host(f func() error) (wait func()) {
	done := make(chan error, 1)
	go func() {
		done <- f()
		_ = p.d.Interrupt()
	}()
	return func() {
		p.t.Helper()
		p.until("the host program ends", func() bool { return len(done) > 0 })
		p.must(<-done)
	}
}

// move is a snapshot and a resume in a new process.
func (p *peer) move() {
	p.t.Helper()
	p.must(p.d.Transport.Quiesce(p.ctx))
	s, err := p.d.Transport.Save()
	p.must(err)
	b, err := s.MarshalBinary()
	p.must(err)
	p.must(p.d.Transport.Close())
	p.must(p.d.Attach(p.device()))
	p.must(s.UnmarshalBinary(b))
	p.must(p.d.Transport.Restore(s))
	p.must(p.d.Transport.Resume())
}
