//go:build linux && amd64

package vmm

import (
	"errors"
	"math"
	"math/rand/v2"
	"testing"
)

// spot is a device that notes where it was reached.
type spot struct{ reads, writes []uint64 }

func (s *spot) read(off uint64, data []byte) {
	s.reads = append(s.reads, off)
	clear(data)
}

func (s *spot) write(off uint64, _ []byte) error {
	s.writes = append(s.writes, off)
	return nil
}

// TestBusLooksUpAsAListDoes adds ranges and looks addresses up at random, and
// compares with the definition: a list that is searched from end to end.
func TestBusLooksUpAsAListDoes(t *testing.T) {
	for seed := range uint64(200) {
		r := rand.New(rand.NewPCG(seed, 1))
		const space = 64
		var b bus
		var list []busRange
		for range 12 {
			first := r.Uint64N(space)
			last := first + r.Uint64N(8) - 1 // some are empty
			dev := &spot{}
			err := b.add("device", first, last, dev)
			if want := !mayAdd(list, first, last); want != errors.Is(err, ErrConfig) || want != (err != nil) {
				t.Fatalf("seed %d: adding %d-%d to %v: %v, want an error: %v", seed, first, last, list, err, want)
			}
			if err == nil {
				list = append(list, busRange{first: first, last: last, dev: dev})
			}
		}
		for addr := range uint64(space + 16) {
			for n := 1; n <= 8; n++ {
				checkFind(t, &b, list, addr, n)
			}
		}
	}
}

func mayAdd(list []busRange, first, last uint64) bool {
	if first > last {
		return false
	}
	for _, r := range list {
		if first <= r.last && r.first <= last {
			return false
		}
	}
	return true
}

func checkFind(t *testing.T, b *bus, list []busRange, addr uint64, n int) {
	t.Helper()
	var want ioDevice
	var wantOff uint64
	for _, r := range list {
		if addr >= r.first && addr+uint64(n)-1 <= r.last {
			want, wantOff = r.dev, addr-r.first
		}
	}
	if dev, off := b.find(addr, n); dev != want || off != wantOff {
		t.Fatalf("%d bytes at %d in %v: %p at %d, want %p at %d", n, addr, list, dev, off, want, wantOff)
	}
}

func TestBusAtTheEndOfTheWorld(t *testing.T) {
	var b bus
	dev := &spot{}
	if err := b.add("last", math.MaxUint64-3, math.MaxUint64, dev); err != nil {
		t.Fatal(err)
	}
	if got, off := b.find(math.MaxUint64, 1); got != dev || off != 3 {
		t.Errorf("the last byte is at %d of %v", off, got)
	}
	if got, _ := b.find(math.MaxUint64, 2); got != nil {
		t.Error("an access beyond the last address reached a device")
	}
}

func TestBusWhereNothingAnswers(t *testing.T) {
	var b bus
	dev := &spot{}
	if err := b.add("device", 0x10, 0x13, dev); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		addr    uint64
		n       int
		reached bool
	}{
		{0xf, 1, false},
		{0xf, 2, false}, // straddles the start
		{0x10, 4, true},
		{0x12, 2, true},
		{0x13, 1, true},
		{0x13, 2, false}, // straddles the end
		{0x10, 8, false},
		{0x14, 1, false},
	} {
		*dev = spot{}
		data := make([]byte, tc.n)
		b.read(tc.addr, data)
		if err := b.write(tc.addr, data); err != nil {
			t.Fatal(err)
		}
		for _, v := range data {
			if want := byte(0xff); !tc.reached && v != want || tc.reached && v != 0 {
				t.Errorf("%d bytes at %#x read %x", tc.n, tc.addr, data)
			}
		}
		if got := len(dev.reads) == 1 && len(dev.writes) == 1; got != tc.reached {
			t.Errorf("%d bytes at %#x: device reached: %v", tc.n, tc.addr, got)
		}
	}
}
