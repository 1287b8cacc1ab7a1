package virtio_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"testing"

	"github.com/cryovisor/cryovisor/internal/virtio"
	"github.com/cryovisor/cryovisor/internal/virtio/virtiotest"
)

func newEcho() virtio.Device { return &echo{} }

func FuzzQueue(f *testing.F) {
	for _, features := range []virtio.Feature{0, virtio.FeatureIndirect | virtio.FeatureEventIdx} {
		f.Add(uint64(features), virtiotest.RingImage(f, newEcho, features,
			virtiotest.Request{Queue: 0, Out: make([]byte, 500), In: 600},
			virtiotest.Request{Queue: 1, Out: make([]byte, 3), In: 3},
			virtiotest.Request{Queue: 1, Out: make([]byte, 30), In: 30}))
	}
	f.Fuzz(func(t *testing.T, features uint64, image []byte) {
		virtiotest.FuzzRings(t, newEcho, virtio.Feature(features), image)
	})
}

func FuzzMMIO(f *testing.F) {
	reg := func(which byte, v uint32) []byte { return binary.LittleEndian.AppendUint32([]byte{which}, v) }
	f.Add([]byte(nil), bytes.Join([][]byte{
		reg(8, 1), reg(8, 3), reg(2, 1), reg(1, 1), reg(8, 11), // to FEATURES_OK
		reg(3, 0), reg(4, 16), reg(9, 0x1000), reg(11, 0x2000), reg(13, 0x3000), reg(5, 1), // a queue
		reg(8, 15), reg(6, 0), reg(5, 0), reg(5, 1), reg(0x80, 0x101), reg(8, 0),
	}, nil))
	f.Fuzz(func(t *testing.T, image, ops []byte) {
		virtiotest.FuzzRegisters(t, newEcho, image, ops)
	})
}

func FuzzState(f *testing.F) {
	for _, s := range []virtio.State{
		{},
		{Type: 0x1234, Status: 15, Interrupt: 1, Features: virtio.FeatureVersion1, Device: []byte{7}, Queues: []virtio.QueueState{
			{Ready: true, Size: 16, Next: 0xffff, Used: 3, Desc: 0x1000, Driver: 0x2000, Device: 0x3000}, {Size: 128},
		}},
	} {
		b, err := s.MarshalBinary()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var s virtio.State
		if err := s.UnmarshalBinary(b); err != nil {
			var newer *virtio.StateVersionError
			if !errors.Is(err, virtio.ErrState) && !errors.As(err, &newer) {
				t.Fatalf("untyped error: %v", err)
			}
			return
		}
		again, err := s.MarshalBinary()
		if err != nil || !bytes.Equal(again, b) {
			t.Fatalf("%x is accepted, and encoded as %x, %v", b, again, err)
		}
		restoreFuzzed(t, s)
	})
}

// restoreFuzzed checks that a decoded state either is refused by a device or leaves one that works on.
func restoreFuzzed(t *testing.T, s virtio.State) {
	ram := virtiotest.NewRAM(16 << 10)
	tr, err := virtio.New(newEcho(), virtio.Config{
		Memory: ram, Doorbell: virtio.NewBell(), Interrupt: func() error { return nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	defer tr.Close()
	if err := tr.Restore(s); err != nil {
		if !errors.Is(err, virtio.ErrState) {
			t.Fatalf("untyped error: %v", err)
		}
		return
	}
	if saved, err := tr.Save(); err != nil {
		t.Fatal(err)
	} else if a, _ := saved.MarshalBinary(); !bytes.Equal(a, must(s.MarshalBinary())) {
		t.Fatal("a restored state is saved as another")
	}
	if err := tr.Resume(); err != nil {
		t.Fatal(err)
	}
}

func must(b []byte, err error) []byte {
	if err != nil {
		panic(err)
	}
	return b
}
