package nic

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"math"
	"os"
	"testing"
	"time"

	"github.com/cryovisor/cryovisor/internal/virtio"
	"github.com/cryovisor/cryovisor/internal/virtio/virtiotest"
)

// noDeadline is a Tap whose reads can't be ended.
type noDeadline struct{ *fakeTap }

func (noDeadline) SetReadDeadline(time.Time) error { return os.ErrNoDeadline }

func TestNewRefuses(t *testing.T) {
	for name, cfg := range map[string]Config{
		"no tap":      {MAC: testMAC},
		"no MAC":      {Tap: newFakeTap()},
		"group MAC":   {Tap: newFakeTap(), MAC: [6]byte{3, 0, 0, 0, 0, 1}},
		"small MTU":   {Tap: newFakeTap(), MAC: testMAC, MTU: 67},
		"no deadline": {Tap: noDeadline{newFakeTap()}, MAC: testMAC},
	} {
		if d, err := New(cfg); !errors.Is(err, ErrConfig) || d != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestConfigSpace(t *testing.T) {
	d := newFakeTap().open(t, 9000)
	want := append(testMAC[:], 1, 0, 0, 0, 0x28, 0x23, 0, 0)
	for off := range len(want) + 2 {
		got := bytes.Repeat([]byte{0xff}, 4)
		d.ReadConfig(uint64(off), got)
		padded := append(bytes.Clone(want), make([]byte, 8)...)
		if !bytes.Equal(got, padded[off:off+4]) {
			t.Errorf("at %d: %x", off, got)
		}
	}
	got := []byte{0xff, 0xff}
	if d.ReadConfig(math.MaxUint64, got); got[0] != 0 || got[1] != 0 {
		t.Errorf("beyond the end: %x", got)
	}
	d.WriteConfig(0, []byte{9, 9, 9, 9, 9, 9})
	got = make([]byte, 6)
	if d.ReadConfig(0, got); !bytes.Equal(got, testMAC[:]) {
		t.Errorf("the MAC address was written: %x", got)
	}
}

// header returns a frame with a byte of its header set.
func header(at int, v byte) []byte {
	b := testFrame(1, 60)
	b[at] = v
	return b
}

func TestTransmit(t *testing.T) {
	const longest = DefaultMTU + 22
	for name, c := range map[string]struct {
		out  []byte
		sent bool
	}{
		"a frame":            {testFrame(1, 60), true},
		"the shortest":       {make([]byte, headerSize+ethernetHeader), true},
		"the longest":        {testFrame(1, longest), true},
		"unknown flags":      {header(0, 0xfe), true},
		"lengths in header":  {header(2, 0xff), true},
		"number of buffers":  {header(headerNumBuffers, 3), true},
		"too long":           {testFrame(1, longest+1), false},
		"far too long":       {testFrame(1, 100000), false},
		"header only":        {make([]byte, headerSize), false},
		"half a header":      {make([]byte, headerSize/2), false},
		"half a MAC address": {make([]byte, headerSize+3), false},
		"no checksum":        {header(0, flagNeedsChecksum), false},
		"TCP segments":       {header(1, 1), false},
		"ECN":                {header(1, 0x80), false},
	} {
		t.Run(name, func(t *testing.T) {
			tap := newFakeTap()
			d := tap.open(t, 0)
			g := boot(t, d, offered|virtio.FeatureIndirect)
			g.post(virtiotest.Request{Queue: txQueue, Out: c.out})
			g.await(txQueue)
			want := Stats{TxDropped: 1}
			var out [][]byte
			if c.sent {
				want = Stats{TxFrames: 1}
				out = [][]byte{append(make([]byte, headerSize), c.out[headerSize:]...)}
			}
			sent := tap.sent()
			if len(sent) != len(out) || len(out) > 0 && !bytes.Equal(sent[0], out[0]) {
				t.Fatalf("sent %x", sent)
			}
			if s := d.Stats(); s != want {
				t.Fatalf("%+v", s)
			}
		})
	}
}

func TestTapRefusesFrame(t *testing.T) {
	tap := newFakeTap()
	tap.refuse = true
	d := tap.open(t, 0)
	g := boot(t, d, offered)
	g.post(virtiotest.Request{Queue: txQueue, Out: testFrame(1, 60)})
	g.await(txQueue)
	if s := d.Stats(); s != (Stats{TxDropped: 1}) || g.Transport.Err() != nil {
		t.Fatalf("%+v, %v", s, g.Transport.Err())
	}
}

// TestReceiveHostile has the tap send a frame, and then a good one, which must arrive.
func TestReceiveHostile(t *testing.T) {
	good := testFrame(7, 60)
	for name, c := range map[string]struct {
		frame   []byte
		buffer  int // for the first frame
		arrives bool
	}{
		"a frame":         {testFrame(1, 60), 72, true},
		"the longest":     {testFrame(1, DefaultMTU+22), 1534, true},
		"checked already": {header(0, 2), 72, true},
		"empty":           {nil, 0, false},
		"header only":     {make([]byte, headerSize), 0, false},
		"too long":        {testFrame(1, DefaultMTU+23), 0, false},
		"far too long":    {testFrame(1, 100000), 0, false},
		"no checksum":     {header(0, flagNeedsChecksum), 0, false},
		"TCP segments":    {header(1, 4), 0, false},
		"small buffer":    {testFrame(1, 61), 72, false},
	} {
		t.Run(name, func(t *testing.T) {
			tap := newFakeTap(c.frame, good)
			d := tap.open(t, 0)
			g := boot(t, d, offered)
			arrived := func(frame []byte) func(in []byte, n uint32) error {
				return func(in []byte, n uint32) error {
					want := append(make([]byte, headerSize), frame[headerSize:]...)
					want[headerNumBuffers] = 1
					if !bytes.Equal(in[:n], want) {
						t.Errorf("got %x, not %x", in[:n], want)
					}
					return nil
				}
			}
			want := Stats{RxFrames: 1, RxDropped: 1}
			switch {
			case c.arrives:
				want = Stats{RxFrames: 2}
				g.post(virtiotest.Request{Queue: rxQueue, In: c.buffer, Check: arrived(c.frame)})
			case c.buffer > 0:
				g.post(virtiotest.Request{Queue: rxQueue, In: c.buffer, Check: func(_ []byte, n uint32) error {
					if n != 0 {
						t.Errorf("%d bytes of a frame that does not fit", n)
					}
					return nil
				}})
			}
			g.post(virtiotest.Request{Queue: rxQueue, In: 1534, Check: arrived(good)})
			g.await(rxQueue)
			if s := d.Stats(); s != want {
				t.Fatalf("%+v", s)
			}
		})
	}
}

// TestBadBuffers has the driver break the protocol. The device is good again after a reset.
func TestBadBuffers(t *testing.T) {
	nowhere := []virtio.Segment{{GPA: 1 << 40, Len: 1000}}
	for name, req := range map[string]virtiotest.Request{
		"send from nowhere":         {Queue: txQueue, Segments: nowhere},
		"receive to nowhere":        {Queue: rxQueue, In: 1000, Segments: nowhere},
		"command from nowhere":      {Queue: ctrlQueue, Segments: nowhere},
		"answer to nowhere":         {Queue: ctrlQueue, In: 1000, Segments: nowhere},
		"command without an answer": {Queue: ctrlQueue, Out: []byte{classAnnounce, commandAnnounce}},
	} {
		t.Run(name, func(t *testing.T) {
			tap := newFakeTap(testFrame(1, 60))
			g := boot(t, tap.open(t, 0), offered)
			g.post(req)
			for g.Reg(virtiotest.RegStatus)&virtiotest.NeedsReset == 0 {
				_, err := g.Wait(g.ctx)
				g.must(err)
			}
			if g.Transport.Err() == nil {
				t.Fatal("no reason is given")
			}
			g.move(func() *Device { return tap.open(t, 0) })
			g.must(g.Init(offered|virtio.FeatureVersion1, 64))
			g.post(virtiotest.Request{Queue: txQueue, Out: testFrame(2, 60)})
			g.await(txQueue)
			if len(tap.sent()) != 1 {
				t.Fatal("the device does not work after a reset")
			}
		})
	}
}

func TestCommands(t *testing.T) {
	announce := []byte{classAnnounce, commandAnnounce}
	for name, c := range map[string]struct {
		features virtio.Feature
		out      []byte
		in       int
		answer   byte
	}{
		"announced":              {offered, announce, 1, answerOK},
		"room for more":          {offered, announce, 100, answerOK},
		"not negotiated":         {offered &^ FeatureAnnounce, announce, 1, answerErr},
		"announce, unknown":      {offered, []byte{classAnnounce, 1}, 1, answerErr},
		"receive mode":           {offered, []byte{0, 0, 1}, 1, answerErr},
		"MAC address":            {offered, []byte{1, 1, 2, 0, 0, 0, 0, 1}, 1, answerErr},
		"VLAN":                   {offered, []byte{2, 0, 5, 0}, 1, answerErr},
		"queue pairs":            {offered, []byte{4, 0, 2, 0}, 1, answerErr},
		"half a command":         {offered, []byte{classAnnounce}, 1, answerErr},
		"nothing but the answer": {offered, nil, 1, answerErr},
	} {
		t.Run(name, func(t *testing.T) {
			g := boot(t, newFakeTap().open(t, 0), c.features)
			g.post(virtiotest.Request{Queue: ctrlQueue, Out: c.out, In: c.in, Check: func(in []byte, n uint32) error {
				if n != 1 || in[0] != c.answer {
					t.Errorf("answer %x, %d bytes", in, n)
				}
				return nil
			}})
			g.await(ctrlQueue)
		})
	}
}

// TestNoControlQueue checks that a queue whose feature was not negotiated is left alone.
func TestNoControlQueue(t *testing.T) {
	g := boot(t, newFakeTap().open(t, 0), offered&^FeatureCtrlVQ)
	g.post(virtiotest.Request{Queue: ctrlQueue, Out: []byte{classAnnounce, commandAnnounce}, In: 1})
	g.Idle()
	if n, err := g.Rings[ctrlQueue].Collect(); n != 0 || err != nil {
		t.Fatalf("%d commands were obeyed, %v", n, err)
	}
}

// TestAnnounce follows a restored device: it asks for an announcement after each Start until it is
// acknowledged, and not after that, nor of a driver that can't.
func TestAnnounce(t *testing.T) {
	tap := newFakeTap()
	fresh := func() *Device { return tap.open(t, 0) }
	g := boot(t, fresh(), offered)
	if s := g.netStatus(); s != statusLinkUp {
		t.Fatalf("status %#x after boot", s)
	}
	generation := g.Reg(virtiotest.RegConfigGeneration)
	g.move(fresh)
	if s := g.config(); s != statusLinkUp|statusAnnounce {
		t.Fatalf("status %#x after a resume", s)
	}
	if g.Reg(virtiotest.RegConfigGeneration) == generation {
		t.Fatal("the config space has the same generation")
	}
	g.must(g.Transport.Quiesce(g.ctx))
	g.must(g.Transport.Resume())
	if s := g.config(); s != statusLinkUp|statusAnnounce {
		t.Fatalf("status %#x, and the driver has not announced itself", s)
	}
	g.post(virtiotest.Request{Queue: ctrlQueue, Out: []byte{classAnnounce, commandAnnounce}, In: 1})
	g.await(ctrlQueue)
	if s := g.netStatus(); s != statusLinkUp {
		t.Fatalf("status %#x after the acknowledgement", s)
	}
	generation = g.Reg(virtiotest.RegConfigGeneration)
	g.must(g.Transport.Quiesce(g.ctx))
	g.must(g.Transport.Resume())
	if g.Reg(virtiotest.RegConfigGeneration) != generation {
		t.Fatal("the config space changed after the acknowledgement")
	}
	g.move(fresh)
	g.must(g.Init(offered|virtio.FeatureVersion1, 64))
	if s := g.netStatus(); s != statusLinkUp {
		t.Fatalf("status %#x after a reset", s)
	}
	g.must(g.Init(offered&^FeatureCtrlVQ|virtio.FeatureVersion1, 64))
	g.move(fresh)
	if s := g.config(); s != statusLinkUp {
		t.Fatalf("status %#x for a driver that can't acknowledge it", s)
	}
}

// TestRestoredSettings checks that a driver keeps the address and the MTU that it knows.
func TestRestoredSettings(t *testing.T) {
	tap := newFakeTap()
	g := boot(t, tap.open(t, 4000), offered)
	g.move(func() *Device {
		tap.open(t, 0)
		d, err := New(Config{Tap: tap, MAC: [6]byte{2, 9, 9, 9, 9, 9}})
		g.must(err)
		return d
	})
	var b [configSize]byte
	g.Transport.Read(virtiotest.RegConfig, b[:])
	if mtu := binary.LittleEndian.Uint16(b[configMTU:]); !bytes.Equal(b[:6], testMAC[:]) || mtu != 4000 {
		t.Fatalf("MAC address %x, MTU %d", b[:6], mtu)
	}
	tap.feed(testFrame(1, 4014))
	g.post(virtiotest.Request{Queue: rxQueue, In: 5000, Check: func(_ []byte, n uint32) error {
		if n != headerSize+4014 {
			t.Errorf("%d bytes", n)
		}
		return nil
	}})
	g.await(rxQueue)
}

// TestUnplug takes the tap away: frames that were there arrive, the link is down, and the device needs no reset.
func TestUnplug(t *testing.T) {
	tap := newFakeTap()
	d := tap.open(t, 0)
	g := boot(t, d, offered)
	tap.change(func() { tap.in, tap.readErr = [][]byte{testFrame(1, 60)}, io.ErrUnexpectedEOF })
	if s := g.config(); s != 0 {
		t.Fatalf("status %#x without a tap", s)
	}
	if err := d.LinkErr(); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Fatal(err)
	}
	g.must(g.Transport.Quiesce(g.ctx))
	g.must(g.Transport.Resume())
	g.post(virtiotest.Request{Queue: rxQueue, In: 100})
	g.await(rxQueue)
	if g.Transport.Err() != nil || d.Stats().RxFrames != 1 {
		t.Fatalf("%v, %+v", g.Transport.Err(), d.Stats())
	}
	tap.change(func() { tap.readErr = nil })
	g.move(func() *Device { return tap.open(t, 0) })
	if s := g.config(); s != statusLinkUp|statusAnnounce {
		t.Fatalf("status %#x with another tap", s)
	}
}

// TestBackpressure checks that a driver without buffers makes the device stop reading, not remember, and that
// nothing is lost by a Stop, or a reset, while the reader waits.
func TestBackpressure(t *testing.T) {
	const frames = 3 * backlogFrames
	tap := newFakeTap()
	g := boot(t, tap.open(t, 0), offered)
	for i := range uint64(frames) {
		tap.feed(testFrame(i, 60))
	}
	tap.left(frames - backlogFrames)
	g.must(g.Transport.Quiesce(g.ctx))
	g.must(g.Transport.Resume())
	g.must(g.Init(offered|virtio.FeatureVersion1, 64))
	tap.change(func() {
		if n := len(tap.in); n != frames-backlogFrames {
			t.Errorf("%d frames are left", n)
		}
	})
	next := uint64(0)
	for range frames {
		g.post(virtiotest.Request{Queue: rxQueue, In: 72, Check: func(in []byte, _ uint32) error {
			if got := binary.LittleEndian.Uint64(in[headerSize+ethernetHeader:]); got != next {
				t.Fatalf("frame %d in place of %d", got, next)
			}
			next++
			return nil
		}})
		g.await(rxQueue)
	}
}
