//go:build linux && amd64

package memory_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/cryovisor/cryovisor/memory"
)

// stillKinds are the kinds of memory that a Still can be of, with the same data
// where there is a snapshot beneath.
var stillKinds = map[string]func(t testing.TB, o *oracle) *memory.Memory{
	"small": func(t testing.TB, o *oracle) *memory.Memory {
		return newCold(t, o.size, memory.Options{SmallPages: true})
	},
	"huge": func(t testing.TB, o *oracle) *memory.Memory { return newCold(t, o.size, memory.Options{}) },
	"lazy": func(t testing.TB, o *oracle) *memory.Memory { return mapImage(t, newImage(t, o), memory.MapOptions{}) },
	"eager": func(t testing.TB, o *oracle) *memory.Memory {
		return mapImage(t, newImage(t, o), memory.MapOptions{Eager: true})
	},
}

// protect makes a Still, or skips where there is none to be had.
func protect(t testing.TB, m *memory.Memory, expected []memory.Range) *memory.Still {
	t.Helper()
	s, err := m.Protect(context.Background(), expected)
	if errors.Is(err, memory.ErrNotPermitted) || errors.Is(err, memory.ErrKernel) || errors.Is(err, memory.ErrNoWriteProtect) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func mustDirty(t testing.TB, m *memory.Memory) []memory.Range {
	t.Helper()
	dirty, err := m.Dirty(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	return dirty
}

// contents copies what pages hold.
func contents(t testing.TB, m *memory.Memory, ranges []memory.Range) map[uint64][]byte {
	t.Helper()
	pages := make(map[uint64][]byte)
	for _, r := range ranges {
		for gpa := r.GPA; gpa < r.End(); gpa += page {
			view, err := m.View(gpa, page)
			if err != nil {
				t.Fatal(err)
			}
			pages[gpa] = bytes.Clone(view)
		}
	}
	return pages
}

// A Still of every kind of memory is what was there when it was frozen, byte for
// byte, whoever writes: before Protect, during it, until Freeze, and afterwards
// to everything, faster than it is read; several times in a row.
func TestStillIsExact(t *testing.T) {
	size, data := sparse()
	for kind, make := range stillKinds {
		for _, buffers := range []int{1, 0} {
			t.Run(fmt.Sprintf("%s/%d", kind, buffers), func(t *testing.T) {
				rng := newRand(t)
				m := make(t, newOracle(rng, size, data...))
				tc := mustToucher(t, m)
				for round := range 3 {
					stillRound(t, rng, tc, data, buffers, round)
				}
			})
		}
	}
}

func stillRound(t *testing.T, rng *rand.Rand, tc *toucher, data []memory.Range, buffers, round int) {
	t.Helper()
	m := tc.m
	pages := pagesOf(rng, data)
	scribble(t, rng, tc, pages[:len(pages)/2])
	expected := mustDirty(t, m)
	scribble(t, rng, tc, pages[len(pages)/4:len(pages)*3/4]) // it is stale now
	stop := scribbleOn(t, rng, m, pages)
	s := protect(t, m, expected)
	stop()
	scribble(t, rng, tc, pages[len(pages)/3:len(pages)/2])

	frozen := mustDirty(t, m)
	want := contents(t, m, frozen)
	s.SetBuffers(buffers)
	if err := s.Freeze(frozen); err != nil {
		t.Fatal(err)
	}
	stop = scribbleOn(t, rng, m, pages)
	overwriteAll(t, rng, m, frozen, func() { compareStill(t, rng, s, frozen, want) })
	stop()
	if st := s.Stats(); st.Copies == 0 {
		t.Errorf("round %d: no write was ever held: %+v", round, st)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := m.Err(); err != nil {
		t.Fatal(err)
	}
}

// scribble writes to pages, reads them and discards them, in every way.
func scribble(t *testing.T, rng *rand.Rand, tc *toucher, pages []uint64) {
	t.Helper()
	for _, gpa := range pages {
		if err := scribbleOnce(rng, tc, gpa); err != nil {
			t.Fatal(err)
		}
	}
}

func scribbleOnce(rng *rand.Rand, tc *toucher, gpa uint64) error {
	p := []byte(fmt.Sprintf("%16x", rng.Uint64()))
	at := gpa + rng.Uint64N(page-16)
	var err error
	switch rng.IntN(8) {
	case 0, 1, 2:
		_, err = tc.m.WriteAt(p, int64(at))
	case 3, 4, 5:
		err = tc.store(p, at)
	case 6:
		_, err = tc.load(gpa, 8)
	case 7:
		err = tc.m.Discard(gpa, page)
	}
	return err
}

// scribbleOn has two goroutines scribble until stop is called.
func scribbleOn(t *testing.T, rng *rand.Rand, m *memory.Memory, pages []uint64) (stop func()) {
	var end atomic.Bool
	var wg sync.WaitGroup
	for range 2 {
		mine := rand.New(rand.NewPCG(rng.Uint64(), 1))
		tc := mustToucher(t, m)
		wg.Go(func() {
			for !end.Load() {
				if err := scribbleOnce(mine, tc, pages[mine.IntN(len(pages))]); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	return func() {
		end.Store(true)
		wg.Wait()
	}
}

// overwriteAll calls read while all pages are changed, one way or the other.
func overwriteAll(t *testing.T, rng *rand.Rand, m *memory.Memory, frozen []memory.Range, read func()) {
	t.Helper()
	var wg sync.WaitGroup
	pages := pagesOf(rng, frozen)
	for part := range 3 {
		tc := mustToucher(t, m)
		wg.Go(func() {
			p := bytes.Repeat([]byte("overwritten!...."), page/16)
			for i := part; i < len(pages); i += 3 {
				var err error
				switch part {
				case 0:
					_, err = m.WriteAt(p, int64(pages[i]))
				case 1:
					err = tc.store(p, pages[i])
				case 2:
					err = m.Discard(pages[i], page)
				}
				if err != nil {
					t.Errorf("page %#x: %v", pages[i], err)
				}
			}
		})
	}
	read()
	wg.Wait()
}

// compareStill reads all of a Still, what it wants first, with two goroutines.
func compareStill(t *testing.T, rng *rand.Rand, s *memory.Still, frozen []memory.Range, want map[uint64][]byte) {
	t.Helper()
	r := &stillReader{s: s, want: want, left: make(map[uint64]bool)}
	order := pagesOf(rng, frozen)
	for _, gpa := range order {
		r.left[gpa] = true
	}
	var wg sync.WaitGroup
	for part := range 2 {
		wg.Go(func() {
			for i := part; i < len(order); i += 2 {
				select {
				case wanted := <-s.Wanted():
					for gpa := wanted.GPA; gpa < wanted.End(); gpa += page {
						r.read(t, gpa)
					}
				default:
				}
				r.read(t, order[i])
			}
		})
	}
	wg.Wait()
}

type stillReader struct {
	s    *memory.Still
	want map[uint64][]byte

	mu   sync.Mutex
	left map[uint64]bool
}

// read reads the page at gpa unless somebody has.
func (r *stillReader) read(t *testing.T, gpa uint64) {
	r.mu.Lock()
	mine := r.left[gpa]
	delete(r.left, gpa)
	r.mu.Unlock()
	if !mine {
		return
	}
	got := make([]byte, page)
	if n, err := r.s.ReadAt(got, int64(gpa)); err != nil || n != page {
		t.Errorf("read of page %#x: %d, %v", gpa, n, err)
	} else if !bytes.Equal(got, r.want[gpa]) {
		t.Errorf("page %#x is not what it was", gpa)
	}
}
