package nic

import (
	"context"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"os"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/cryovisor/cryovisor/internal/virtio"
	"github.com/cryovisor/cryovisor/internal/virtio/virtiotest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var testMAC = [6]byte{2, 0, 0, 0, 0, 7}

// fakeTap is a Tap with endless queues. It can be opened again after a Close.
type fakeTap struct {
	mu      sync.Mutex
	changed *sync.Cond
	in, out [][]byte // for the device to read, and that it wrote
	expired bool     // the read deadline
	closed  bool
	readErr error // when there is nothing to read
	refuse  bool  // writes fail
}

func newFakeTap(in ...[]byte) *fakeTap {
	t := &fakeTap{in: in}
	t.changed = sync.NewCond(&t.mu)
	return t
}

// change does f under the lock.
func (t *fakeTap) change(f func()) {
	t.mu.Lock()
	defer t.mu.Unlock()
	f()
	t.changed.Broadcast()
}

func (t *fakeTap) feed(frames ...[]byte) { t.change(func() { t.in = append(t.in, frames...) }) }

// sent takes what the device wrote since the last call.
func (t *fakeTap) sent() (frames [][]byte) {
	t.change(func() { frames, t.out = t.out, nil })
	return frames
}

// left waits until there are at most n frames to read.
func (t *fakeTap) left(n int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for len(t.in) > n {
		t.changed.Wait()
	}
}

func (t *fakeTap) Read(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for {
		switch {
		case t.closed:
			return 0, os.ErrClosed
		case t.expired:
			return 0, os.ErrDeadlineExceeded
		case len(t.in) > 0:
			n := copy(p, t.in[0])
			t.in = t.in[1:]
			t.changed.Broadcast()
			return n, nil
		case t.readErr != nil:
			return 0, t.readErr
		}
		t.changed.Wait()
	}
}

func (t *fakeTap) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed || t.refuse {
		return 0, errors.New("refused")
	}
	t.out = append(t.out, append([]byte(nil), p...))
	return len(p), nil
}

func (t *fakeTap) SetReadDeadline(at time.Time) error {
	t.change(func() { t.expired = !at.IsZero() })
	return nil
}

func (t *fakeTap) Close() error {
	t.change(func() { t.closed = true })
	return nil
}

// open returns a device on the tap, which is opened again.
func (t *fakeTap) open(tb testing.TB, mtu uint16) *Device {
	t.change(func() { t.closed, t.expired = false, false })
	d, err := New(Config{Tap: t, MAC: testMAC, MTU: mtu})
	if err != nil {
		tb.Fatal(err)
	}
	return d
}

// testFrame returns an empty header and a frame of n bytes, with a number in it.
func testFrame(number uint64, n int) []byte {
	b := make([]byte, headerSize+n)
	frame := b[headerSize:]
	copy(frame, testMAC[:])
	binary.BigEndian.PutUint16(frame[12:], testProtocol)
	binary.LittleEndian.PutUint64(frame[ethernetHeader:], number)
	for i := ethernetHeader + 8; i < n; i++ {
		frame[i] = byte(number) + byte(i)
	}
	return b
}

// testProtocol is an EtherType for experiments.
const testProtocol = 0x88b5

// guest is a driver for tests that make one request at a time.
type guest struct {
	*virtiotest.Driver
	t   testing.TB
	ctx context.Context
}

func newGuest(t testing.TB, seed uint64) *guest {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	t.Cleanup(cancel)
	return &guest{virtiotest.NewDriver(virtiotest.NewRAM(1<<20), rand.New(rand.NewPCG(seed, 1))), t, ctx}
}

// boot returns a guest whose driver is ready.
func boot(t testing.TB, d *Device, features virtio.Feature) *guest {
	g := newGuest(t, 1)
	g.must(g.Attach(d))
	t.Cleanup(func() { g.must(g.Transport.Close()) })
	g.must(g.Init(features|virtio.FeatureVersion1, 64))
	return g
}

func (g *guest) must(err error) {
	g.t.Helper()
	if err != nil {
		g.t.Fatal(err)
	}
}

func (g *guest) post(req virtiotest.Request) {
	g.t.Helper()
	ok, err := g.Rings[req.Queue].Post(req)
	g.must(err)
	if !ok {
		g.t.Fatal("no room for a request")
	}
	g.must(g.Rings[req.Queue].Kick())
}

// await waits until a queue's requests are answered.
func (g *guest) await(queue int) {
	g.t.Helper()
	for {
		_, err := g.Rings[queue].Collect()
		g.must(err)
		if g.Rings[queue].Pending() == 0 {
			return
		}
		_, err = g.Wait(g.ctx)
		g.must(err)
	}
}

// config waits for a change of the config space and returns its status.
func (g *guest) config() uint16 {
	g.t.Helper()
	for {
		status, err := g.Wait(g.ctx)
		g.must(err)
		if status&2 != 0 {
			return g.netStatus()
		}
	}
}

func (g *guest) netStatus() uint16 {
	var b [2]byte
	g.Transport.Read(virtiotest.RegConfig+6, b[:])
	return binary.LittleEndian.Uint16(b[:])
}

// move saves the guest's device and restores it as next. The old one is closed.
func (g *guest) move(next func() *Device) {
	g.t.Helper()
	g.must(g.Transport.Quiesce(g.ctx))
	s, err := g.Transport.Save()
	g.must(err)
	g.must(g.Transport.Close())
	g.must(g.Attach(next()))
	g.must(g.Transport.Restore(s))
	g.must(g.Transport.Resume())
}
