package virtio_test

import (
	"bytes"
	"encoding/binary"
	"sync/atomic"
	"testing"

	"github.com/cryovisor/cryovisor/internal/virtio"
	"github.com/cryovisor/cryovisor/internal/virtio/virtiotest"
)

// wide is a device whose config space is one field of 8 bytes.
type wide struct {
	echo
	value atomic.Uint64
}

func (w *wide) ReadConfig(off uint64, p []byte) {
	clear(p)
	if b := binary.LittleEndian.AppendUint64(nil, w.value.Load()); off < uint64(len(b)) {
		copy(p, b[off:])
	}
}

func (w *wide) WriteConfig(uint64, []byte) {}

// A change between two halves of a field is seen by the generation, whether or not the device has told of it yet, and
// even if the field is back at its old value.
func TestTornConfigRead(t *testing.T) {
	const before, after = 0x1_0000_0001, 0x2_0000_0002
	for name, c := range map[string]struct {
		between, then []uint64
		differs       bool
	}{
		"no change":                {nil, nil, false},
		"in between":               {[]uint64{after}, nil, true},
		"after both":               {nil, []uint64{after}, true},
		"in between and back":      {[]uint64{after}, []uint64{before}, true},
		"twice, and nobody looked": {[]uint64{after, before}, nil, false},
	} {
		w := &wide{}
		w.value.Store(before)
		d := bareDriver(t, w)
		generation := d.Reg(virtiotest.RegConfigGeneration)
		lo := d.Reg(virtiotest.RegConfig)
		for _, v := range c.between {
			w.value.Store(v)
		}
		hi := d.Reg(virtiotest.RegConfig + 4)
		for _, v := range c.then {
			w.value.Store(v)
		}
		again := d.Reg(virtiotest.RegConfigGeneration)
		if (again != generation) != c.differs {
			t.Errorf("%s: generations %d and %d", name, generation, again)
		}
		if torn := lo != hi; torn && again == generation {
			t.Errorf("%s: halves %d and %d of one generation", name, lo, hi)
		}
	}
}

// A change that came with a snapshot is seen as well, and a driver that saw the generation before it looks again.
func TestGenerationMoves(t *testing.T) {
	w := &wide{}
	d := bareDriver(t, w)
	generation := d.Reg(virtiotest.RegConfigGeneration)
	must(nil, d.Transport.Quiesce(t.Context()))
	s, err := d.Transport.Save()
	if err != nil || s.Generation != generation {
		t.Fatalf("generation %d, saved as %d, %v", generation, s.Generation, err)
	}
	must(nil, d.Transport.Close())
	w = &wide{}
	w.value.Store(1)
	must(nil, d.Attach(w))
	must(nil, d.Transport.Restore(s))
	must(nil, d.Transport.Resume())
	moved := d.Reg(virtiotest.RegConfigGeneration)
	if moved == generation || d.Reg(virtiotest.RegConfigGeneration) != moved {
		t.Errorf("generation %d before the move, %d after it", generation, moved)
	}
}

func TestConfigReads(t *testing.T) {
	w := &wide{}
	w.value.Store(0x8877665544332211)
	d := bareDriver(t, w)
	for off, want := range map[uint64][]byte{
		0: {0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88, 0}, 3: {0x44}, 7: {0x88, 0}, 8: {0, 0, 0, 0},
		0xfc: make([]byte, 8), 0x100: {0}, 1 << 63: {0, 0},
	} {
		got := bytes.Repeat([]byte{0xee}, len(want))
		d.Transport.Read(virtiotest.RegConfig+off, got)
		if !bytes.Equal(got, want) {
			t.Errorf("at %#x: %x, want %x", off, got, want)
		}
	}
}

var _ virtio.Device = (*wide)(nil)
