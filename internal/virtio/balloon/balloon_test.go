package balloon_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/cryovisor/cryovisor/internal/virtio"
	"github.com/cryovisor/cryovisor/internal/virtio/balloon"
	"github.com/cryovisor/cryovisor/internal/virtio/virtiotest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var errNotRAM = errors.New("not RAM")

// record is memory of 1 MiB that remembers what was discarded.
type record struct {
	mu     sync.Mutex
	ranges []virtio.Segment
}

func (r *record) Discard(gpa, n uint64) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if gpa > 1<<20 || n > 1<<20-gpa {
		return errNotRAM
	}
	r.ranges = append(r.ranges, virtio.Segment{GPA: gpa, Len: uint32(n)})
	return nil
}

func (r *record) covers(gpa, n uint64) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.ContainsFunc(r.ranges, func(s virtio.Segment) bool {
		return s.GPA <= gpa && gpa+n <= s.GPA+uint64(s.Len)
	})
}

func frames(list ...uint32) []byte {
	var b []byte
	for _, f := range list {
		b = binary.LittleEndian.AppendUint32(b, f)
	}
	return b
}

func newDevice() virtio.Device { return balloon.New(balloon.Config{Memory: &record{}}) }

func TestConformance(t *testing.T) {
	mem := &record{}
	virtiotest.Run(t, virtiotest.Subject{
		New: func() virtio.Device { return balloon.New(balloon.Config{Memory: mem}) },
		Next: func(rng *rand.Rand) virtiotest.Request {
			req := virtiotest.Request{Queue: rng.IntN(5)}
			first, n := uint32(rng.IntN(200)), uint32(1+rng.IntN(50))
			check := func(_ []byte, written uint32) error {
				if written != 0 || req.Queue != 1 && !mem.covers(uint64(first)*4096, 4096) {
					return fmt.Errorf("queue %d: page %d was not discarded, or %d bytes written", req.Queue, first, written)
				}
				return nil
			}
			req.Check = check
			if req.Queue < 2 {
				for f := range n {
					req.Out = append(req.Out, frames(first+f)...)
				}
			} else {
				req.In, req.Segments = 1, []virtio.Segment{{GPA: uint64(first) * 4096, Len: n * 4096}}
			}
			return req
		},
	})
}

func newDriver(t *testing.T, dev virtio.Device, features virtio.Feature) *virtiotest.Driver {
	t.Helper()
	d := virtiotest.NewDriver(virtiotest.NewRAM(1<<20), rand.New(rand.NewPCG(1, 2)))
	if err := d.Attach(dev); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Transport.Close() })
	if err := d.Init(features|virtio.FeatureVersion1, 128); err != nil {
		t.Fatal(err)
	}
	return d
}

func TestRequests(t *testing.T) {
	report := []virtio.Segment{{GPA: 0x40000, Len: 0x8000}}
	for name, c := range map[string]struct {
		features virtio.Feature
		req      virtiotest.Request
		want     []virtio.Segment
		pending  int
		err      error
	}{
		"runs":             {0, virtiotest.Request{Out: frames(9, 3, 8, 7, 3, 20)}, []virtio.Segment{{GPA: 0x3000, Len: 0x1000}, {GPA: 0x7000, Len: 0x3000}, {GPA: 0x14000, Len: 0x1000}}, 0, nil},
		"deflate":          {0, virtiotest.Request{Queue: 1, Out: frames(9)}, nil, 0, nil},
		"report as Linux":  {balloon.FeatureReporting, virtiotest.Request{Queue: 2, In: 1, Segments: report}, report, 0, nil},
		"report as spec":   {balloon.FeatureReporting, virtiotest.Request{Queue: 4, In: 1, Segments: report}, report, 0, nil},
		"not negotiated":   {0, virtiotest.Request{Queue: 2, In: 1, Segments: report}, nil, 1, nil},
		"not RAM":          {0, virtiotest.Request{Out: frames(0xffffffff)}, nil, 0, errNotRAM},
		"report no RAM":    {balloon.FeatureReporting, virtiotest.Request{Queue: 2, In: 1, Segments: []virtio.Segment{{GPA: 1 << 40, Len: 4096}}}, nil, 0, errNotRAM},
		"odd list":         {0, virtiotest.Request{Out: make([]byte, 5)}, nil, 0, virtio.ErrProtocol},
		"readable report":  {balloon.FeatureReporting, virtiotest.Request{Queue: 2, Out: []byte{1}}, nil, 0, virtio.ErrProtocol},
		"very long list":   {0, virtiotest.Request{Segments: []virtio.Segment{{GPA: 0, Len: 512 << 10}}}, nil, 0, virtio.ErrProtocol},
		"list of no bytes": {0, virtiotest.Request{In: 4}, nil, 0, nil},
	} {
		t.Run(name, func(t *testing.T) {
			mem := &record{}
			d := newDriver(t, balloon.New(balloon.Config{Memory: mem}), c.features)
			ring := d.Rings[c.req.Queue]
			if ok, err := ring.Post(c.req); !ok || err != nil {
				t.Fatal(ok, err)
			}
			if err := ring.Kick(); err != nil {
				t.Fatal(err)
			}
			d.Idle()
			if _, err := ring.Collect(); err != nil {
				t.Fatal(err)
			}
			err := d.Transport.Err()
			if !errors.Is(err, c.err) || c.err != nil && !errors.Is(err, virtio.ErrProtocol) {
				t.Errorf("error %v, want %v", err, c.err)
			}
			if !slices.Equal(mem.ranges, c.want) || ring.Pending() != c.pending {
				t.Errorf("discarded %v, want %v; %d pending", mem.ranges, c.want, ring.Pending())
			}
		})
	}
}

// A new target reaches the driver once, also when it is set while the device is quiesced, and moves with it.
func TestTarget(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	dev := balloon.New(balloon.Config{Memory: &record{}})
	dev.SetTarget(3) // before there is a driver
	d := newDriver(t, dev, 0)
	expect := func(target uint32) {
		t.Helper()
		status, err := d.Wait(ctx)
		if got := d.Reg(virtiotest.RegConfig); err != nil || status&2 == 0 || got != target {
			t.Fatalf("interrupt status %d, target %d, want %d: %v", status, got, target, err)
		}
	}
	expect(3)
	dev.SetTarget(7)
	expect(7)
	d.SetReg(virtiotest.RegConfig, 99) // not the driver's
	d.SetReg(virtiotest.RegConfig+4, 5)
	if dev.Actual() != 5 || d.Reg(virtiotest.RegConfig) != 7 || d.Reg(virtiotest.RegConfig+8) != 0 {
		t.Errorf("actual %d, config %d", dev.Actual(), d.Reg(virtiotest.RegConfig))
	}
	if err := d.Transport.Quiesce(ctx); err != nil {
		t.Fatal(err)
	}
	dev.SetTarget(8)
	s, err := d.Transport.Save()
	if err != nil {
		t.Fatal(err)
	}
	d.Transport.Close()
	dev = balloon.New(balloon.Config{Memory: &record{}})
	if err := d.Attach(dev); err != nil {
		t.Fatal(err)
	}
	if err := d.Transport.Restore(s); err != nil {
		t.Fatal(err)
	}
	if err := d.Transport.Resume(); err != nil {
		t.Fatal(err)
	}
	expect(8)
	if dev.Actual() != 5 {
		t.Errorf("actual %d after the move", dev.Actual())
	}
	d.SetReg(virtiotest.RegStatus, 0)
	if dev.Actual() != 0 {
		t.Errorf("actual %d after a reset", dev.Actual())
	}
}

func TestRestoreRefuses(t *testing.T) {
	for _, state := range [][]byte{nil, {1}, make([]byte, 13), append([]byte{2}, make([]byte, 12)...), append([]byte{1}, make([]byte, 13)...)} {
		if err := newDevice().Restore(state); !errors.Is(err, virtio.ErrState) {
			t.Errorf("%x: %v", state, err)
		}
	}
}

func FuzzRings(f *testing.F) {
	for _, features := range []virtio.Feature{0, balloon.FeatureReporting | virtio.FeatureIndirect | virtio.FeatureEventIdx} {
		f.Add(uint64(features), virtiotest.RingImage(f, newDevice, features,
			virtiotest.Request{Out: frames(1, 2, 3, 9)}, virtiotest.Request{Queue: 1, Out: frames(1, 2)},
			virtiotest.Request{Queue: 2, In: 1, Segments: []virtio.Segment{{GPA: 0x10000, Len: 0x2000}}}))
	}
	f.Fuzz(func(t *testing.T, features uint64, image []byte) {
		virtiotest.FuzzRings(t, newDevice, virtio.Feature(features), image)
	})
}

func FuzzRegisters(f *testing.F) {
	reg := func(which byte, v uint32) []byte { return binary.LittleEndian.AppendUint32([]byte{which}, v) }
	f.Add([]byte(nil), bytes.Join([][]byte{
		reg(8, 3), reg(2, 1), reg(1, 1), reg(8, 11), reg(3, 0), reg(4, 16), reg(9, 0x1000), reg(11, 0x2000),
		reg(13, 0x3000), reg(5, 1), reg(8, 15), reg(6, 0), reg(15, 7), reg(0x80, 0x104),
	}, nil))
	f.Fuzz(func(t *testing.T, image, ops []byte) { virtiotest.FuzzRegisters(t, newDevice, image, ops) })
}

func TestHostileVCPUs(t *testing.T) {
	virtiotest.Hostile(t, newDevice, balloon.FeatureReporting|virtio.FeatureIndirect|virtio.FeatureEventIdx,
		virtiotest.Request{Out: frames(1, 2, 3, 9)}, virtiotest.Request{Queue: 1, Out: frames(1, 2)},
		virtiotest.Request{Queue: 2, In: 1, Segments: []virtio.Segment{{GPA: 0x10000, Len: 0x2000}}})
}
