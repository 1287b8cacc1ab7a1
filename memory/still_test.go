//go:build linux && amd64

package memory_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/cryovisor/cryovisor/memory"
	"golang.org/x/sys/unix"
)

const unit = 256 << 10 // what a Still copies at once

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

// still is a Still whose wishes come from a channel.
type still struct {
	*memory.Still
	wanted chan memory.Range
}

func (s *still) Freeze(ranges []memory.Range) error {
	return s.Still.Freeze(ranges, func(r memory.Range) {
		select {
		case s.wanted <- r:
		default:
		}
	})
}

// protect makes a Still, or skips where there is none to be had.
func protect(t testing.TB, m *memory.Memory, expected []memory.Range) *still {
	t.Helper()
	s, err := m.Protect(context.Background(), expected)
	if errors.Is(err, memory.ErrNotPermitted) || errors.Is(err, memory.ErrKernel) || errors.Is(err, memory.ErrNoWriteProtect) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return &still{s, make(chan memory.Range, 1024)}
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
				for round := range 2 {
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
	if err := tc.store(after, frozen[0].GPA); err != nil { // one write at least comes before it is read
		t.Fatal(err)
	}
	stop = scribbleOn(t, rng, m, pages)
	overwriteAll(t, rng, m, frozen, func() { compareStill(t, rng, s, frozen, want) })
	stop()
	if st := s.Stats(); st.Copies == 0 {
		t.Errorf("round %d: nothing was ever copied: %+v", round, st)
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
func compareStill(t *testing.T, rng *rand.Rand, s *still, frozen []memory.Range, want map[uint64][]byte) {
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
				case wanted := <-s.wanted:
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
	if r.wrong > 0 {
		t.Errorf("%d pages of %d are not what they were, %#x for one", r.wrong, len(order), r.first)
	}
}

type stillReader struct {
	s    *still
	want map[uint64][]byte

	mu    sync.Mutex
	left  map[uint64]bool
	wrong int
	first uint64
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
		r.mu.Lock()
		r.wrong++
		r.first = gpa
		r.mu.Unlock()
	}
}

// frozenAt makes a Memory of each kind with its first 4 MiB written, and a Still of
// them with one buffer. Nobody has read anything.
func frozenAt(t *testing.T, f func(t *testing.T, m *memory.Memory, s *still)) {
	for kind, make := range stillKinds {
		t.Run(kind, func(t *testing.T) {
			m := make(t, newOracle(newRand(t), 128*mib, memory.Range{Len: 4 * mib}))
			fill(t, m, 4*mib)
			frozen := mustDirty(t, m)
			s := protect(t, m, frozen)
			s.SetBuffers(1)
			if err := s.Freeze(frozen); err != nil {
				t.Fatal(err)
			}
			f(t, m, s)
		})
	}
}

var before, after = bytes.Repeat([]byte("before.."), page/8), bytes.Repeat([]byte("after..."), page/8)

// fill writes "before" to the first n bytes.
func fill(t *testing.T, m *memory.Memory, n uint64) {
	t.Helper()
	for gpa := uint64(0); gpa < n; gpa += page {
		if _, err := m.WriteAt(before, int64(gpa)); err != nil {
			t.Fatal(err)
		}
	}
}

// await waits until f is true.
func await(f func() bool) {
	for !f() {
		runtime.Gosched()
	}
}

// holdWriters begins writes of each kind, of which the first takes the only buffer
// and the others have to wait. ended gets what becomes of each.
func holdWriters(t *testing.T, m *memory.Memory, s *still) (n int, ended chan error) {
	t.Helper()
	tc := mustToucher(t, m)
	if err := tc.store(after, 0); err != nil {
		t.Fatal(err)
	}
	if w := <-s.wanted; w.GPA != 0 || w.Len != unit {
		t.Fatalf("wanted %+v", w)
	}
	ended = make(chan error, 3)
	go func() { ended <- tc.store(after, unit) }()
	go func() {
		_, err := m.WriteAt(after, 2*unit)
		ended <- err
	}()
	go func() { ended <- m.Discard(3*unit, unit) }()
	await(func() bool { return s.Stats().Waiting == 1 })
	return 3, ended
}

// Writers that wait go on as the Still is read.
func TestStillIsReadToLetWritersGo(t *testing.T) {
	frozenAt(t, func(t *testing.T, m *memory.Memory, s *still) {
		n, ended := holdWriters(t, m, s)
		got := make([]byte, unit)
		for at := int64(0); at < int64(n+1)*unit; at += unit {
			if _, err := s.ReadAt(got, at); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, bytes.Repeat(before, unit/page)) {
				t.Errorf("%#x is not what it was", at)
			}
		}
		for range n {
			if err := <-ended; err != nil {
				t.Error(err)
			}
		}
		if _, err := m.ReadAt(got[:page], unit); err != nil || !bytes.Equal(got[:page], after) {
			t.Errorf("the write is lost: %v", err)
		}
	})
}

// Close and Fail let writers go that wait, whoever reads.
func TestStillGivenUp(t *testing.T) {
	broken := errors.New("broken")
	for name, end := range map[string]func(m *memory.Memory, s *still) error{
		"close": func(_ *memory.Memory, s *still) error { return errors.Join(s.Close(), s.Close()) },
		"fail":  func(m *memory.Memory, _ *still) error { m.Fail(broken); return nil },
	} {
		t.Run(name, func(t *testing.T) {
			frozenAt(t, func(t *testing.T, m *memory.Memory, s *still) {
				n, ended := holdWriters(t, m, s)
				if err := end(m, s); err != nil {
					t.Fatal(err)
				}
				for range n {
					if err := <-ended; err != nil {
						t.Error(err)
					}
				}
				_, err := s.ReadAt(make([]byte, page), 4*unit)
				if want := map[string]error{"close": memory.ErrStillClosed, "fail": broken}[name]; !errors.Is(err, want) {
					t.Errorf("read: %v, want %v", err, want)
				}
				if err := s.Freeze(nil); err == nil {
					t.Error("it can be frozen")
				}
				if err := s.Close(); err != nil {
					t.Error(err)
				}
			})
		})
	}
}

// The end of the memory is the end of its Still: a system call that waits to write
// gets an error, and nobody hangs.
func TestMemoryCloseEndsStill(t *testing.T) {
	frozenAt(t, func(t *testing.T, m *memory.Memory, s *still) {
		n, ended := holdWriters(t, m, s)
		if err := m.Close(); err != nil {
			t.Fatal(err)
		}
		for range n {
			// Or it was let go, just before the memory went out of reach.
			if err := <-ended; err != nil && !errors.Is(err, unix.EFAULT) && !errors.Is(err, memory.ErrClosed) {
				t.Error(err)
			}
		}
		if _, err := s.ReadAt(make([]byte, page), 4*unit); !errors.Is(err, memory.ErrClosed) {
			t.Errorf("read: %v", err)
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		if _, err := m.Protect(context.Background(), nil); !errors.Is(err, memory.ErrClosed) {
			t.Errorf("protect: %v", err)
		}
	})
}

// A page that was discarded before Protect and written after it is Freeze's to
// protect, whatever Protect was told to expect.
func TestProtectOfDiscarded(t *testing.T) {
	for kind, make := range stillKinds {
		t.Run(kind, func(t *testing.T) {
			rng := newRand(t)
			m := make(t, newOracle(rng, 128*mib, memory.Range{Len: 4 * mib}))
			fill(t, m, 4*mib)
			expected := mustDirty(t, m)
			if err := m.Discard(0, 4*mib); err != nil {
				t.Fatal(err)
			}
			s := protect(t, m, expected)
			tc := mustToucher(t, m)
			var frozen []memory.Range
			for gpa := uint64(0); gpa < 4*mib; gpa += unit {
				if err := tc.store(before, gpa); err != nil {
					t.Fatal(err)
				}
				frozen = append(frozen, memory.Range{GPA: gpa, Len: page})
			}
			if err := s.Freeze(frozen); err != nil {
				t.Fatal(err)
			}
			want := contents(t, m, frozen)
			for _, r := range frozen {
				if err := tc.store(after, r.GPA); err != nil {
					t.Fatal(err)
				}
			}
			compareStill(t, rng, s, frozen, want)
		})
	}
}

// The kernel's pages of zeros, huge ones too, are protected like others where Dirty
// reports them, and stay so when a part of their huge page is let go.
func TestStillOfZeros(t *testing.T) {
	for _, small := range []bool{true, false} {
		rng := newRand(t)
		m := newCold(t, 16*mib, memory.Options{SmallPages: small})
		tc := mustToucher(t, m)
		for gpa := uint64(0); gpa < 16*mib; gpa += page {
			if _, err := tc.load(gpa, 8); err != nil {
				t.Fatal(err)
			}
		}
		s := protect(t, m, mustDirty(t, m))
		for gpa := uint64(0); gpa < 16*mib; gpa += 2 * mib {
			if err := tc.store(before, gpa+unit); err != nil {
				t.Fatal(err)
			}
		}
		frozen := mustDirty(t, m)
		want := contents(t, m, frozen)
		if err := s.Freeze(frozen); err != nil {
			t.Fatal(err)
		}
		for _, gpa := range pagesOf(rng, m.Ranges()) {
			if err := tc.store(after, gpa); err != nil {
				t.Fatal(err)
			}
			if s.Stats().Copies == 32 {
				break // half of the buffers: nobody reads yet
			}
		}
		compareStill(t, rng, s, frozen, want)
	}
}

// Protect changes nothing for the machine, and Close takes it back.
func TestProtectAlone(t *testing.T) {
	for kind, make := range stillKinds {
		t.Run(kind, func(t *testing.T) {
			m := make(t, newOracle(newRand(t), 128*mib, memory.Range{Len: 4 * mib}))
			fill(t, m, 4*mib)
			tc := mustToucher(t, m)
			for range 2 {
				s := protect(t, m, mustDirty(t, m))
				if _, err := m.Protect(context.Background(), nil); !errors.Is(err, memory.ErrFrozen) {
					t.Errorf("a second Still: %v", err)
				}
				for _, gpa := range []uint64{unit, unit + page, 2 * unit} {
					if err := tc.store(after, gpa); err != nil {
						t.Fatal(err)
					}
				}
				await(func() bool { return s.Stats().Waiting == 0 })
				if held := s.Stats().Held; held != 2 {
					t.Errorf("%d writes to 2 pieces of memory were held", held)
				}
				if err := s.Close(); err != nil {
					t.Fatal(err)
				}
				if err := tc.store(after, 3*unit); err != nil {
					t.Fatal(err)
				}
				if held := s.Stats().Held; held != 2 {
					t.Errorf("a write was held after Close")
				}
			}
		})
	}
}

// Writes go on while a Still is closed: those that find a page protected and those that let one go at the same time. Nothing of the Still is
// gone while somebody still uses it.
func TestCloseBesideWrites(t *testing.T) {
	for kind, make := range stillKinds {
		t.Run(kind, func(t *testing.T) {
			const written = 4 * mib
			m := make(t, newOracle(newRand(t), 8*mib, memory.Range{Len: 8 * mib}))
			fill(t, m, written)
			for range 100 {
				s := protect(t, m, nil)
				if err := s.Freeze([]memory.Range{{Len: written}}); err != nil {
					t.Fatal(err)
				}
				var writing sync.WaitGroup
				for w := range 3 {
					writing.Go(func() {
						for gpa := int64(w * page); gpa < written; gpa += 64 * page {
							if _, err := m.WriteAt([]byte{1}, gpa); err != nil {
								t.Error(err)
								return
							}
						}
					})
				}
				if err := s.Close(); err != nil {
					t.Error(err)
				}
				writing.Wait()
				if err := m.Err(); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
}

func TestStillErrors(t *testing.T) {
	m := mapImage(t, newImage(t, newOracle(newRand(t), 5*gib, memory.Range{Len: mib})), memory.MapOptions{})
	fill(t, m, 16*page)
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := m.Protect(ctx, mustDirty(t, m)); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	s := protect(t, m, nil)
	var outside *memory.RangeError
	for _, bad := range [][]memory.Range{
		{{GPA: 1, Len: page}},
		{{GPA: 0, Len: 1}},
		{{GPA: page, Len: page}, {GPA: 0, Len: page}},
		{{GPA: 3*gib - page, Len: 2 * page}},
		{{GPA: 6 * gib, Len: page}},
	} {
		if err := s.Freeze(bad); !errors.As(err, &outside) {
			t.Errorf("Freeze(%v): %v, want a RangeError", bad, err)
		}
	}
	p := make([]byte, 2*page)
	if _, err := s.ReadAt(p, 0); !errors.Is(err, memory.ErrNotHeld) {
		t.Errorf("read before Freeze: %v", err)
	}
	if err := s.Freeze([]memory.Range{{GPA: 0, Len: 16 * page}}); err != nil {
		t.Fatal(err)
	}
	if err := s.Freeze(nil); !errors.Is(err, memory.ErrFrozen) {
		t.Errorf("a second Freeze: %v", err)
	}
	if _, err := s.ReadAt(p, 3*gib-page); !errors.As(err, &outside) {
		t.Errorf("read of what is not RAM: %v", err)
	}
	if _, err := s.ReadAt(p, page); err != nil {
		t.Error(err)
	}
	for _, bad := range []struct {
		gpa int64
		n   int
	}{{2 * page, page}, {8*page + 1, page}, {8 * page, 1}, {15 * page, 2 * page}} {
		if _, err := s.ReadAt(p[:bad.n], bad.gpa); !errors.Is(err, memory.ErrNotHeld) {
			t.Errorf("read of %d bytes at %#x: %v", bad.n, bad.gpa, err)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = protect(t, m, nil)
	if err := s.Freeze([]memory.Range{{GPA: 64 * mib, Len: page}}); !errors.Is(err, memory.ErrNotResident) {
		t.Errorf("freeze of a missing page: %v", err)
	}
}

// A write that can't be let go fails the memory and gets an error, and nobody hangs.
func TestRefusedWrite(t *testing.T) {
	frozenAt(t, func(t *testing.T, m *memory.Memory, s *still) {
		// Something else lies in the middle of what is to be let go.
		const flags = unix.MAP_PRIVATE | unix.MAP_ANONYMOUS | unix.MAP_FIXED
		_, _, errno := unix.Syscall6(unix.SYS_MMAP, m.HostAddr(unit+8*page), page, unix.PROT_READ|unix.PROT_WRITE, flags, ^uintptr(0), 0)
		if errno != 0 {
			t.Fatal(errno)
		}
		if err := mustToucher(t, m).store(after, unit+page); !errors.Is(err, unix.EFAULT) {
			t.Errorf("system call: %v, want EFAULT", err)
		}
		<-m.Failed()
		if _, err := m.WriteAt(after, unit+page); err == nil {
			t.Error("WriteAt of the page that was given up")
		}
		if _, err := s.ReadAt(make([]byte, page), 0); err == nil {
			t.Error("a Still can be read that misses a page")
		}
	})
}
