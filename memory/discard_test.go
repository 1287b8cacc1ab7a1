//go:build linux && amd64

package memory_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/cryovisor/cryovisor/memory"
	"golang.org/x/sys/unix"
)

// Reads, writes and discards in any order, by system calls and by the accessors,
// give what the model says, and so does the dirty set.
func TestDiscardIsExact(t *testing.T) {
	size, data := sparse()
	zeros := func(_ uint64, n int) []byte { return make([]byte, n) }
	for kind, make := range map[string]func(t *testing.T, o *oracle) (*memory.Memory, *model){
		"lazy": func(t *testing.T, o *oracle) (*memory.Memory, *model) {
			return mapImage(t, newImage(t, o), memory.MapOptions{}), newModel(o.bytes)
		},
		"eager": func(t *testing.T, o *oracle) (*memory.Memory, *model) {
			return mapImage(t, newImage(t, o), memory.MapOptions{Eager: true}), newModel(o.bytes)
		},
		"cold": func(t *testing.T, _ *oracle) (*memory.Memory, *model) {
			return newCold(t, size, memory.Options{SmallPages: true}), newModel(zeros)
		},
	} {
		t.Run(kind, func(t *testing.T) {
			rng := newRand(t)
			m, want := make(t, newOracle(rng, size, data...))
			tc := mustToucher(t, m)
			steps := 4000
			if testing.Short() {
				steps = 1000
			}
			for i := range steps {
				if err := discardStep(rng, tc, want, data); err != nil {
					t.Fatal(err)
				}
				if i%(steps/10) == 0 {
					checkDirty(t, m, want)
				}
			}
			checkDirty(t, m, want)
			for _, r := range m.Ranges() {
				if err := m.Discard(r.GPA, r.Len); err != nil {
					t.Fatal(err)
				}
				want.discard(r.GPA, r.Len)
			}
			checkDirty(t, m, want)
		})
	}
}

// discardStep does one thing in memory and in the model, at random.
func discardStep(rng *rand.Rand, tc *toucher, want *model, data []memory.Range) error {
	r := data[rng.IntN(len(data))]
	at := r.GPA + rng.Uint64N(r.Len/page)*page
	p := randomBytes(rng, 1+rng.IntN(page))
	off := rng.Uint64N(page - uint64(len(p)) + 1)
	var got []byte
	var err error
	switch rng.IntN(5) {
	case 0:
		_, err = tc.m.WriteAt(p, int64(at+off))
		want.write(p, at+off)
		return err
	case 1:
		err = tc.store(p, at+off)
		want.write(p, at+off)
		return err
	case 2:
		gpa := at + rng.Uint64N(page)
		n := rng.Uint64N(min(r.End()-gpa, 32*page) + 1)
		if rng.IntN(2) == 0 {
			gpa, n = at, page
		}
		err = tc.m.Discard(gpa, n)
		want.discard(gpa, n)
		return err
	case 3:
		got = make([]byte, page)
		_, err = tc.m.ReadAt(got, int64(at))
	case 4:
		got, err = tc.load(at, page)
	}
	if err == nil && !bytes.Equal(got, want.page(at)) {
		err = fmt.Errorf("page %#x is wrong", at)
	}
	return err
}

func checkDirty(t *testing.T, m *memory.Memory, want *model) {
	t.Helper()
	got, err := m.Dirty(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	compareDirty(t, m, got, want.dirty())
}

// The memory of discarded pages goes back to the host, huge pages included.
func TestDiscardGivesBack(t *testing.T) {
	for _, small := range []bool{false, true} {
		m := newCold(t, 64*mib, memory.Options{SmallPages: small})
		if _, err := m.WriteAt(bytes.Repeat([]byte{1}, 16*mib), 0); err != nil {
			t.Fatal(err)
		}
		// The ends are covered in part.
		if err := m.Discard(100, 16*mib-200); err != nil {
			t.Fatal(err)
		}
		dirty, err := m.Dirty(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		want := []memory.Range{{GPA: 0, Len: page}, {GPA: 16*mib - page, Len: page}}
		if len(dirty) != 2 || dirty[0] != want[0] || dirty[1] != want[1] {
			t.Errorf("SmallPages %v: dirty is %v, want %v", small, dirty, want)
		}
	}
}

// A page that was given up stays inaccessible when it is discarded, and so does
// it not become zeros.
func TestDiscardOfPoison(t *testing.T) {
	o := newOracle(newRand(t), mib, memory.Range{Len: mib})
	m := mapImage(t, newImage(t, o), memory.MapOptions{})
	broken := errors.New("the disk is gone")
	o.setTrouble(func(context.Context, int64) error { return broken })
	tc := mustToucher(t, m)
	bad := firstRun(t, o, false).gpa
	if _, err := tc.load(bad, page); !errors.Is(err, unix.EFAULT) {
		t.Fatalf("system call: %v, want EFAULT", err)
	}
	o.setTrouble(nil)
	if err := m.Discard(0, mib); err != nil {
		t.Fatal(err)
	}
	if _, err := tc.load(bad, page); !errors.Is(err, unix.EFAULT) {
		t.Errorf("system call after Discard: %v, want EFAULT", err)
	}
	if _, err := m.ReadAt(make([]byte, 1), int64(bad)); !errors.Is(err, broken) {
		t.Errorf("accessor after Discard: %v", err)
	}
}

// A page of zeros that was discarded is missing again, and View says so.
func TestDiscardedIsNotResident(t *testing.T) {
	o := newOracle(newRand(t), 2*mib, memory.Range{Len: mib})
	m := mapImage(t, newImage(t, o), memory.MapOptions{})
	zero, full := firstRun(t, o, true).gpa, firstRun(t, o, false).gpa
	for _, gpa := range []uint64{zero, full} {
		if _, err := m.WriteAt([]byte("mine"), int64(gpa)); err != nil {
			t.Fatal(err)
		}
		if err := m.Discard(gpa, page); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := m.View(zero, page); !errors.Is(err, memory.ErrNotResident) {
		t.Errorf("view of a discarded page of zeros: %v", err)
	}
	if view, err := m.View(full, page); err != nil || !bytes.Equal(view, o.bytes(full, page)) {
		t.Errorf("view of a discarded page that the image has is not the image's: %v", err)
	}
}
