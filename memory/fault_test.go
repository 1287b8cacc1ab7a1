//go:build linux && amd64

package memory_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"testing"

	"github.com/cryovisor/cryovisor/confine/confinetest"
	"github.com/cryovisor/cryovisor/memory"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) {
	confinetest.Main()
	if os.Getenv(gcChild) != "" {
		os.Exit(gcMain())
	}
	goleak.VerifyTestMain(m)
}

// A toucher has the kernel touch guest memory in a system call, as KVM does: a
// fault there blocks a thread that the Go scheduler knows to be away.
type toucher struct {
	m    *memory.Memory
	file int // a memfd that the kernel copies to and from
}

func newToucher(m *memory.Memory) (*toucher, error) {
	fd, err := unix.MemfdCreate("toucher", unix.MFD_CLOEXEC)
	return &toucher{m, fd}, err
}

func (t *toucher) close() { unix.Close(t.file) }

// load has the kernel read n bytes at gpa.
func (t *toucher) load(gpa uint64, n int) ([]byte, error) {
	if _, err := t.call(unix.SYS_PWRITE64, gpa, n); err != nil {
		return nil, err
	}
	p := make([]byte, n)
	_, err := unix.Pread(t.file, p, 0)
	return p, err
}

// store has the kernel write p at gpa.
func (t *toucher) store(p []byte, gpa uint64) error {
	if _, err := unix.Pwrite(t.file, p, 0); err != nil {
		return err
	}
	_, err := t.call(unix.SYS_PREAD64, gpa, len(p))
	return err
}

func (t *toucher) call(number uintptr, gpa uint64, n int) (int, error) {
	done, _, errno := unix.Syscall6(number, uintptr(t.file), t.m.HostAddr(gpa), uintptr(n), 0, 0, 0)
	if errno != 0 {
		return 0, errno
	}
	if int(done) != n {
		return int(done), fmt.Errorf("%d bytes of %d", done, n)
	}
	return n, nil
}

func mustToucher(t testing.TB, m *memory.Memory) *toucher {
	t.Helper()
	tc, err := newToucher(m)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(tc.close)
	return tc
}

// sparse is a layout with data on both sides of the hole and at the very ends.
func sparse() (size uint64, data []memory.Range) {
	return 6 * gib, []memory.Range{
		{GPA: 0, Len: 2 * mib},
		{GPA: gib + 5*page, Len: 3*mib + page},
		{GPA: 3*gib - 2*mib, Len: 2 * mib},
		{GPA: 4 * gib, Len: mib},
		{GPA: 7*gib - mib, Len: mib},
	}
}

func newRand(t testing.TB) *rand.Rand {
	seed := rand.Uint64()
	t.Logf("seed %#x", seed)
	return rand.New(rand.NewPCG(seed, 1))
}

// pagesOf lists the pages of ranges in random order.
func pagesOf(rng *rand.Rand, ranges []memory.Range) []uint64 {
	var pages []uint64
	for _, r := range ranges {
		for gpa := r.GPA; gpa < r.End(); gpa += page {
			pages = append(pages, gpa)
		}
	}
	rng.Shuffle(len(pages), func(i, j int) { pages[i], pages[j] = pages[j], pages[i] })
	return pages
}

// Every page is right, whether a system call faults it in or the accessor, on
// several threads at once and in several machines of one image, of which each
// sees its own writes only.
func TestLazyIsExact(t *testing.T) {
	rng := newRand(t)
	size, data := sparse()
	o := newOracle(rng, size, data...)
	img := newImage(t, o)
	var wg sync.WaitGroup
	for id := range 3 {
		m := mapImage(t, img, memory.MapOptions{})
		pages := pagesOf(rng, data)
		pages = append(pages, 2*gib, 2*gib+mib, 5*gib, 6*gib)
		for thread := range 2 {
			tc := mustToucher(t, m)
			wg.Go(func() {
				for i, gpa := range pages {
					if i%2 != thread {
						continue
					}
					if err := visit(tc, o, gpa, byte(id), i); err != nil {
						t.Errorf("machine %d: %v", id, err)
						return
					}
				}
			})
		}
	}
	wg.Wait()
	if got, most := o.fetches.Load(), int64(len(o.chunks)); got != most {
		t.Errorf("%d fetches of %d chunks by 3 machines", got, most)
	}
}

// visit reads a page one way, checks it, writes a part one way, and reads all of
// it the other way.
func visit(tc *toucher, o *oracle, gpa uint64, id byte, i int) error {
	want := o.bytes(gpa, page)
	got := make([]byte, page)
	var err error
	mark := bytes.Repeat([]byte{id + 1}, 100)
	switch i % 4 {
	case 0, 1:
		got, err = tc.load(gpa, page)
	case 2:
		_, err = tc.m.ReadAt(got, int64(gpa))
	case 3: // a write is the first to touch it
		copy(got, want)
	}
	if err != nil {
		return fmt.Errorf("first read of %#x: %w", gpa, err)
	}
	if !bytes.Equal(got, want) {
		return fmt.Errorf("page %#x is wrong", gpa)
	}
	copy(want[1000:], mark)
	if i%8 < 4 {
		err = tc.store(mark, gpa+1000)
	} else {
		_, err = tc.m.WriteAt(mark, int64(gpa+1000))
	}
	if err != nil {
		return fmt.Errorf("write of %#x: %w", gpa, err)
	}
	if _, err = tc.m.ReadAt(got, int64(gpa)); err != nil || !bytes.Equal(got, want) {
		return fmt.Errorf("page %#x is wrong after a write (%w)", gpa, err)
	}
	return nil
}

// The dirty set of a lazy, an eager and a cold memory is what was written,
// exactly, however it was written.
func TestDirtyIsExact(t *testing.T) {
	size, data := sparse()
	kinds := map[string]func(t *testing.T, o *oracle) *memory.Memory{
		"lazy": func(t *testing.T, o *oracle) *memory.Memory {
			return mapImage(t, newImage(t, o), memory.MapOptions{})
		},
		"eager": func(t *testing.T, o *oracle) *memory.Memory {
			return mapImage(t, newImage(t, o), memory.MapOptions{Eager: true})
		},
		"cold": func(t *testing.T, _ *oracle) *memory.Memory {
			return newCold(t, size, memory.Options{SmallPages: true})
		},
	}
	for kind, make := range kinds {
		t.Run(kind, func(t *testing.T) {
			rng := newRand(t)
			o := newOracle(rng, size, data...)
			m := make(t, o)
			if got, err := m.Dirty(context.Background()); err != nil || len(got) != 0 {
				t.Fatalf("dirty before anything happened: %v, %v", got, err)
			}
			written := touchAll(t, rng, m, append(pagesOf(rng, data), 2*gib, 5*gib+page, 6*gib))
			got, err := m.Dirty(context.Background())
			if err != nil {
				t.Fatal(err)
			}
			compareDirty(t, m, got, written)
		})
	}
}

// touchAll reads a half of the pages and writes a third, one way or the other.
// It returns what it wrote.
func touchAll(t *testing.T, rng *rand.Rand, m *memory.Memory, pages []uint64) map[uint64]bool {
	t.Helper()
	tc := mustToucher(t, m)
	written := make(map[uint64]bool)
	p := []byte{1, 2, 3, 4}
	for _, gpa := range pages {
		var err error
		switch rng.IntN(6) {
		case 0:
			_, err = m.ReadAt(p, int64(gpa))
		case 1, 2:
			_, err = tc.load(gpa, 4)
		case 3:
			_, err = m.WriteAt(p, int64(gpa)+77)
			written[gpa] = true
		case 4:
			err = tc.store(p, gpa+page-4)
			written[gpa] = true
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return written
}

// compareDirty checks that got is ascending, merged, viewable, and the pages of
// want.
func compareDirty(t *testing.T, m *memory.Memory, got []memory.Range, want map[uint64]bool) {
	t.Helper()
	end := uint64(0)
	n := 0
	for _, r := range got {
		if r.GPA < end || r.GPA == end && end != 0 || r.Len == 0 {
			t.Fatalf("range %#x+%#x after %#x", r.GPA, r.Len, end)
		}
		end = r.End()
		if _, err := m.View(r.GPA, int(r.Len)); err != nil {
			t.Errorf("view of dirty pages: %v", err)
		}
		for gpa := r.GPA; gpa < end; gpa += page {
			if want[gpa] {
				n++
			} else if view, err := m.View(gpa, page); !zerosAreDirty() || err != nil || !bytes.Equal(view, make([]byte, page)) {
				t.Errorf("page %#x is dirty and nobody wrote to it", gpa)
			}
		}
	}
	if n != len(want) {
		t.Errorf("%d dirty pages, want %d", n, len(want))
	}
}

// zerosAreDirty says whether this kernel is older than 6.7, which has
// PAGEMAP_SCAN and can tell pages of zeros that were only read.
func zerosAreDirty() bool {
	var name unix.Utsname
	var major, minor int
	if unix.Uname(&name) == nil {
		fmt.Sscanf(unix.ByteSliceToString(name.Release[:]), "%d.%d", &major, &minor)
	}
	return major < 6 || major == 6 && minor < 7
}

// A source that fails releases the thread that waits with an error, after the
// hook, and leaves everything else intact.
func TestFailingSource(t *testing.T) {
	rng := newRand(t)
	o := newOracle(rng, 4*mib, memory.Range{Len: 4 * mib})
	m := mapImage(t, newImage(t, o), memory.MapOptions{})
	tc := mustToucher(t, m)
	i := slices.IndexFunc(o.runs, func(r run) bool { return r.chunk >= 0 })
	good := o.runs[i]
	i = slices.IndexFunc(o.runs, func(r run) bool { return r.chunk >= 0 && r.chunk != good.chunk })
	bad := o.runs[i]
	if err := tc.store([]byte("mine"), good.gpa); err != nil {
		t.Fatal(err)
	}
	broken := errors.New("the disk is gone")
	o.setTrouble(func(context.Context, int64) error { return broken })

	if _, err := m.ReadAt(make([]byte, 1), int64(bad.gpa)); !errors.Is(err, broken) {
		t.Errorf("accessor: %v, want the source's error", err)
	}
	if m.Err() != nil {
		t.Error("an access that can report its error failed the whole memory")
	}
	var hooked error
	m.OnFail(func(err error) { hooked = err })
	if _, err := tc.load(bad.gpa, page); !errors.Is(err, unix.EFAULT) {
		t.Fatalf("system call: %v, want EFAULT", err)
	}
	<-m.Failed()
	if !errors.Is(hooked, broken) {
		t.Errorf("hook got %v", hooked)
	}
	var fetch *memory.FetchError
	if err := m.Err(); !errors.Is(err, broken) || !errors.As(err, &fetch) || fetch.Chunk != bad.chunk {
		t.Errorf("Err: %v", err)
	}
	// A page that was given up stays so, even if the source recovers.
	o.setTrouble(nil)
	if err := m.Resident(context.Background(), bad.gpa, page); err != nil {
		t.Error(err)
	}
	if _, err := m.ReadAt(make([]byte, 1), int64(bad.gpa)); !errors.Is(err, broken) {
		t.Errorf("poisoned page: %v", err)
	}
	dirty, err := m.Dirty(context.Background())
	if err != nil || len(dirty) != 1 || dirty[0] != (memory.Range{GPA: good.gpa, Len: page}) {
		t.Fatalf("dirty after the failure: %v, %v", dirty, err)
	}
	view, err := m.View(good.gpa, page)
	if err != nil || string(view[:4]) != "mine" {
		t.Errorf("written page after the failure: %q, %v", view[:4], err)
	}
}

// Fail gets a thread out of a fetch that takes for ever, and so does Close.
func TestGivingUp(t *testing.T) {
	reason := errors.New("enough")
	for name, end := range map[string]func(*memory.Memory){
		"fail":  func(m *memory.Memory) { m.Fail(reason) },
		"close": func(m *memory.Memory) { m.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			o := newOracle(newRand(t), 4*mib, memory.Range{Len: 4 * mib})
			m := mapImage(t, newImage(t, o), memory.MapOptions{})
			started := make(chan struct{}, 100)
			o.setTrouble(func(ctx context.Context, _ int64) error {
				started <- struct{}{}
				<-ctx.Done()
				return ctx.Err()
			})
			result := make(chan error, 2)
			i := slices.IndexFunc(o.runs, func(r run) bool { return r.chunk >= 0 })
			tc := mustToucher(t, m)
			go func() {
				_, err := tc.load(o.runs[i].gpa, page)
				result <- err
			}()
			<-started
			go func() {
				_, err := m.ReadAt(make([]byte, 1), int64(o.runs[i].gpa))
				result <- err
			}()
			end(m)
			for range 2 {
				if err := <-result; err == nil {
					t.Error("read a page that was never fetched")
				}
			}
			if name == "fail" && !errors.Is(m.Err(), reason) {
				t.Errorf("Err: %v", m.Err())
			}
		})
	}
}
