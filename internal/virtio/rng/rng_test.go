package rng_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"
	"testing/iotest"

	"go.uber.org/goleak"

	"github.com/cryovisor/cryovisor/internal/virtio"
	"github.com/cryovisor/cryovisor/internal/virtio/rng"
	"github.com/cryovisor/cryovisor/internal/virtio/virtiotest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// ones is a source whose bytes are known.
type ones struct{}

func (ones) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = 1
	}
	return len(p), nil
}

func newDevice() virtio.Device { return rng.New(rng.Config{}) }

func TestConformance(t *testing.T) {
	virtiotest.Run(t, virtiotest.Subject{
		New: func() virtio.Device { return rng.New(rng.Config{Source: iotest.HalfReader(ones{})}) },
		Next: func(r *rand.Rand) virtiotest.Request {
			n := 1 + r.IntN(20000)
			return virtiotest.Request{In: n, Check: func(in []byte, written uint32) error {
				if int(written) != n || !bytes.Equal(in, bytes.Repeat([]byte{1}, n)) {
					return fmt.Errorf("%d bytes of %d, or wrong ones", written, n)
				}
				return nil
			}}
		},
	})
}

// serve posts one request and returns the answer, or why the device failed.
func serve(t *testing.T, dev virtio.Device, req virtiotest.Request) (in []byte, written uint32, err error) {
	t.Helper()
	d := virtiotest.NewDriver(virtiotest.NewRAM(1<<20), rand.New(rand.NewPCG(1, 2)))
	if err := d.Attach(dev); err != nil {
		t.Fatal(err)
	}
	defer d.Transport.Close()
	if err := d.Init(virtio.FeatureVersion1, 64); err != nil {
		t.Fatal(err)
	}
	req.Check = func(b []byte, n uint32) error { in, written = b, n; return nil }
	if ok, err := d.Rings[0].Post(req); !ok || err != nil {
		t.Fatal(ok, err)
	}
	if err := d.Rings[0].Kick(); err != nil {
		t.Fatal(err)
	}
	d.Idle()
	if _, err := d.Rings[0].Collect(); err != nil {
		t.Fatal(err)
	}
	return in, written, d.Transport.Err()
}

func TestDefaultSource(t *testing.T) {
	in, n, err := serve(t, newDevice(), virtiotest.Request{In: 64})
	if err != nil || n != 64 || bytes.Equal(in, make([]byte, 64)) {
		t.Errorf("%d bytes: %x, %v", n, in, err)
	}
}

func TestLargeRequestGetsAPart(t *testing.T) {
	_, n, err := serve(t, newDevice(), virtiotest.Request{In: 1, Segments: []virtio.Segment{{GPA: 0x10000, Len: 512 << 10}}})
	if err != nil || n != 64<<10 {
		t.Errorf("%d bytes, %v", n, err)
	}
}

func TestFailures(t *testing.T) {
	broken := errors.New("broken")
	source := rng.New(rng.Config{Source: iotest.ErrReader(broken)})
	if _, _, err := serve(t, source, virtiotest.Request{In: 8}); !errors.Is(err, broken) {
		t.Errorf("broken source: %v", err)
	}
	for _, req := range []virtiotest.Request{{Out: []byte{1}}, {Out: []byte{1}, In: 8}} {
		if _, _, err := serve(t, newDevice(), req); !errors.Is(err, virtio.ErrProtocol) {
			t.Errorf("readable buffer: %v", err)
		}
	}
	if err := newDevice().Restore([]byte{1}); !errors.Is(err, virtio.ErrState) {
		t.Errorf("state: %v", err)
	}
	if err := newDevice().Stop(context.Background()); err != nil {
		t.Error(err)
	}
}

func FuzzRings(f *testing.F) {
	for _, features := range []virtio.Feature{0, virtio.FeatureIndirect | virtio.FeatureEventIdx} {
		f.Add(uint64(features), virtiotest.RingImage(f, newDevice, features,
			virtiotest.Request{In: 100}, virtiotest.Request{In: 6000}, virtiotest.Request{Out: []byte{1}, In: 1}))
	}
	f.Fuzz(func(t *testing.T, features uint64, image []byte) {
		virtiotest.FuzzRings(t, newDevice, virtio.Feature(features), image)
	})
}

func FuzzRegisters(f *testing.F) {
	reg := func(which byte, v uint32) []byte { return binary.LittleEndian.AppendUint32([]byte{which}, v) }
	f.Add([]byte(nil), bytes.Join([][]byte{
		reg(8, 3), reg(2, 1), reg(1, 1), reg(8, 11), reg(3, 0), reg(4, 16), reg(9, 0x1000), reg(11, 0x2000),
		reg(13, 0x3000), reg(5, 1), reg(8, 15), reg(6, 0),
	}, nil))
	f.Fuzz(func(t *testing.T, image, ops []byte) { virtiotest.FuzzRegisters(t, newDevice, image, ops) })
}

func TestHostileVCPUs(t *testing.T) {
	virtiotest.Hostile(t, newDevice, virtio.FeatureIndirect|virtio.FeatureEventIdx,
		virtiotest.Request{In: 100}, virtiotest.Request{In: 6000})
}
