//go:build linux && amd64

package memory_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"regexp"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/cryovisor/cryovisor/memory"
)

const huge = 2 * mib

// collapse collapses until so many bytes are in huge pages, as the kernel may have none to give for a moment. It skips the test where
// the kernel can't do it at all.
func collapse(t *testing.T, m *memory.Memory, want uint64) {
	t.Helper()
	if !memory.CanCollapse() {
		t.Skip("this kernel can't move an image to huge pages")
	}
	var n uint64
	for try := 0; try == 0 || n < want && try < 1000; try++ {
		var err error
		if n, err = m.Collapse(context.Background()); err != nil {
			t.Fatal(err)
		}
	}
	if n != want {
		t.Errorf("%d bytes are in huge pages, not %d", n, want)
	}
}

func populate(t *testing.T, m *memory.Memory) {
	t.Helper()
	if err := m.Populate(context.Background()); err != nil {
		t.Fatal(err)
	}
}

// inHugePages is how many bytes of the image's mapping, at its address, the kernel has mapped as huge pages.
func inHugePages(t *testing.T, m *memory.Memory) (bytes uint64) {
	t.Helper()
	maps, err := os.ReadFile("/proc/self/smaps")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut("\n"+string(maps), fmt.Sprintf("\n%x-", m.HostAddr(0)))
	found := regexp.MustCompile(`ShmemPmdMapped: +(\d+) kB`).FindStringSubmatch(rest)
	if found == nil {
		t.Fatal("the mapping is not in smaps")
	}
	if _, err := fmt.Sscan(found[1], &bytes); err != nil {
		t.Fatal(err)
	}
	return bytes << 10
}

// Memory in huge pages is what it was: what the machine reads, what it writes after that, what is reclaimed,
// what it discards, and what another machine of the image finds.
func TestCollapse(t *testing.T) {
	for _, eager := range []bool{false, true} {
		t.Run(fmt.Sprintf("eager %v", eager), func(t *testing.T) {
			rng := newRand(t)
			all := []memory.Range{{Len: 8 * mib}}
			o := newOracleOf(rng, 6, 4, 9*mib, all...)
			img := newImage(t, o)
			m := mapImage(t, img, memory.MapOptions{Eager: eager})
			populate(t, m)
			before := held(t, img)
			touched := inChunks(o, pagesOf(rng, []memory.Range{{GPA: 2 * mib, Len: huge}}))[0]
			if _, err := m.ReadAt(make([]byte, page), int64(touched)); err != nil {
				t.Fatal(err)
			}
			collapse(t, m, 8*mib)
			mapped, err := m.Mapped(t.Context())
			if err != nil || len(mapped) != 1 || mapped[0] != (memory.Range{GPA: 2 * mib, Len: huge}) || inHugePages(t, m) != huge {
				t.Errorf("what was touched is not all that is mapped, or not in huge pages: %v, %v", mapped, err)
			}
			for gpa := int64(0); gpa < 8*mib; gpa += huge {
				if _, err := m.ReadAt(make([]byte, 1), gpa); err != nil {
					t.Fatal(err)
				}
			}
			if n := inHugePages(t, m); n != 8*mib {
				t.Errorf("%d bytes are mapped in huge pages", n)
			}
			if s := m.Stats(); s.HugeBytes != 8*mib || before+s.FilledBytes != held(t, img) {
				t.Errorf("held %d, then %d; %+v", before, held(t, img), s)
			}
			want := newModel(o.bytes)
			pages := pagesOf(rng, all)
			comparePages(t, m, want, pages)
			checkDirty(t, m, want)
			some := pages[:len(pages)/8]
			writePages(t, m, want, some)
			comparePages(t, m, want, pages)
			checkDirty(t, m, want)
			if !eager {
				reclaim(t, img, len(some))
			}
			comparePages(t, m, want, pages)
			other := mapImage(t, img, memory.MapOptions{Eager: eager})
			comparePages(t, other, newModel(o.bytes), pages)
			if err := m.Discard(0, 4*mib); err != nil {
				t.Fatal(err)
			}
			want.discard(0, 4*mib)
			comparePages(t, m, want, pages)
			checkDirty(t, m, want)
		})
	}
}

// A machine maps what another has moved to huge pages 2 MiB at a time.
func TestCollapseIsShared(t *testing.T) {
	o := newOracleOf(newRand(t), 6, 4, 8*mib, memory.Range{Len: 8 * mib})
	img := newImage(t, o)
	m := mapImage(t, img, memory.MapOptions{})
	populate(t, m)
	collapse(t, m, 8*mib)
	other := mapImage(t, img, memory.MapOptions{})
	for gpa := uint64(0); gpa < 8*mib; gpa += huge {
		if _, err := mustToucher(t, other).load(gpa+5*page, page); err != nil {
			t.Fatal(err)
		}
	}
	if n := inHugePages(t, other); n != 8*mib || other.Stats().Faults != 0 {
		t.Errorf("%d bytes are mapped in huge pages, after %d faults", n, other.Stats().Faults)
	}
}

// What is not worth it, or not possible, stays in small pages, and what it was.
func TestCollapseNot(t *testing.T) {
	rng := newRand(t)
	few := memory.Range{GPA: 4 * mib, Len: 900 << 10}
	written := memory.Range{GPA: 12 * mib, Len: huge}
	last := memory.Range{GPA: 16 * mib, Len: huge - page}
	data := []memory.Range{few, written, last}
	o := newOracleOf(rng, 6, 4, last.End(), data...)
	img := newImage(t, o)
	m := mapImage(t, img, memory.MapOptions{})
	want := newModel(o.bytes)
	populate(t, m)
	writePages(t, m, want, []uint64{written.GPA + 77*page})
	collapse(t, m, 0)
	if s := m.Stats(); s.HugeBytes != 0 || s.FilledBytes != 0 {
		t.Errorf("stats %+v", s)
	}
	comparePages(t, m, want, pagesOf(rng, data))
	booted := newCold(t, 4*mib, memory.Options{})
	if n, err := booted.Collapse(context.Background()); n != 0 || err != nil {
		t.Errorf("of a machine that booted: %d, %v", n, err)
	}
}

// Zeros that a machine has mapped for itself stay where they are: the kernel would take them away.
func TestCollapseSparesZeros(t *testing.T) {
	o := newOracleOf(newRand(t), 6, 4, 8*mib, memory.Range{Len: 8 * mib})
	img := mappedImage(t, o)
	m, other := mapImage(t, img, memory.MapOptions{}), mapImage(t, img, memory.MapOptions{})
	var zero run
	for _, r := range o.runs {
		if r.chunk < 0 && r.gpa >= 2*mib && r.gpa+r.length <= 4*mib {
			zero = r
		}
	}
	tc := mustToucher(t, other)
	if _, err := tc.load(zero.gpa, page); err != nil {
		t.Fatal(err)
	}
	populate(t, m)
	collapse(t, m, 6*mib)
	img.SetLimit(memory.MinLimit) // takes pages
	img.SetLimit(0)
	if got, err := tc.load(zero.gpa, page); err != nil || !bytes.Equal(got, make([]byte, page)) {
		t.Errorf("zeros have become something else: %v", err)
	}
}

// Where a part of 2 MiB has not been fetched, nothing is done, and nothing for an image with a limit.
func TestCollapseIncomplete(t *testing.T) {
	rng := newRand(t)
	all := memory.Range{Len: 16 * mib}
	o := newOracleOf(rng, 6, 4, all.Len, all)
	img := newImage(t, o)
	m := mapImage(t, img, memory.MapOptions{})
	chunks := inTurn(o)
	if err := img.Prefetch(context.Background(), chunks[1:], 1); err != nil {
		t.Fatal(err)
	}
	whole := all.Len
	for gpa := uint64(0); gpa < all.Len; gpa += huge {
		for at := gpa; at < gpa+huge; at += page {
			if o.find(at).chunk == chunks[0] {
				whole -= huge
				break
			}
		}
	}
	img.SetLimit(1 << 30)
	collapse(t, m, 0)
	img.SetLimit(0)
	collapse(t, m, whole)
	if whole == all.Len {
		t.Error("nothing was missing")
	}
	comparePages(t, m, newModel(o.bytes), pagesOf(rng, []memory.Range{all}))
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := m.Collapse(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := m.Collapse(context.Background()); !errors.Is(err, memory.ErrClosed) {
		t.Errorf("closed: %v", err)
	}
}

// When the kernel can't split a huge page, for somebody uses it, punching a part out of it makes zeros of that part.
// The image must not take them for what was there.
func TestReclaimFromHugePageInUse(t *testing.T) {
	rng := newRand(t)
	o := newOracleOf(rng, 6, 4, 4*mib, memory.Range{Len: 4 * mib})
	img := newImage(t, o)
	m := mapImage(t, img, memory.MapOptions{})
	populate(t, m)
	collapse(t, m, 4*mib)
	unpin := pinPage(t, img, 100*page)
	want := newModel(o.bytes)
	var some []uint64
	for i := range 64 {
		some = append(some, uint64(i+90)*page)
	}
	writePages(t, m, want, some)
	reclaim(t, img, 0)
	fresh := mapImage(t, img, memory.MapOptions{})
	comparePages(t, fresh, newModel(o.bytes), pagesOf(rng, []memory.Range{{Len: 4 * mib}}))
	comparePages(t, m, want, some)
	if err := fresh.Close(); err != nil {
		t.Fatal(err)
	}
	unpin()
	reclaim(t, img, len(some))
	if err := m.Discard(0, 4*mib); err != nil {
		t.Fatal(err)
	}
	comparePages(t, m, newModel(o.bytes), pagesOf(rng, []memory.Range{{Len: 4 * mib}}))
}

// pinPage has a pipe refer to a page of the image.
func pinPage(t *testing.T, img *memory.Image, gpa uint64) (unpin func()) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	at := int64(gpa)
	if n, err := unix.Splice(img.FD(), &at, int(w.Fd()), nil, page, 0); err != nil || n != page {
		t.Fatalf("splice: %d, %v", n, err)
	}
	return func() { r.Close(); w.Close() }
}

// Machines that use all of their memory don't notice that it is moved to huge pages, reclaimed and dropped meanwhile.
func TestCollapseUnderLoad(t *testing.T) {
	for _, limit := range []uint64{0, memory.MinLimit} {
		t.Run(fmt.Sprintf("limit %d", limit), func(t *testing.T) {
			rng := newRand(t)
			data := []memory.Range{{Len: 4 * mib}, {GPA: 6 * mib, Len: 4 * mib}}
			o := newOracleOf(rng, 6, 4, 10*mib, data...)
			img := mappedImage(t, o)
			ctx := context.Background()
			first := mapImage(t, img, memory.MapOptions{})
			populate(t, first)
			collapse(t, first, 8*mib)
			if err := first.Close(); err != nil {
				t.Fatal(err)
			}
			var wg sync.WaitGroup
			for range 2 {
				m, mine := mapImage(t, img, memory.MapOptions{}), rand.New(rand.NewPCG(rng.Uint64(), 2))
				wg.Go(func() { useEverywhere(t, mine, m, o, data, 400) })
			}
			stop := repeat(func() error { return collapseAndTake(ctx, img, limit) })
			wg.Wait()
			if _, err := stop(); err != nil {
				t.Error(err)
			}
			m := mapImage(t, img, memory.MapOptions{})
			comparePages(t, m, newModel(o.bytes), pagesOf(rng, data))
			if s := m.Stats(); limit > 0 && s.EvictedBytes == 0 {
				t.Errorf("stats %+v", s)
			}
		})
	}
}

// collapseAndTake moves all of an image to huge pages, by a machine that does nothing else, and then takes from them.
func collapseAndTake(ctx context.Context, img *memory.Image, limit uint64) error {
	m, err := img.Map(ctx, memory.MapOptions{})
	if err != nil {
		return err
	}
	if err = m.Populate(ctx); err == nil {
		_, err = m.Collapse(ctx)
	}
	if err = errors.Join(err, m.Close()); err != nil {
		return err
	}
	img.SetLimit(limit)
	img.SetLimit(0)
	_, err = img.Reclaim(ctx)
	return err
}

// The limit takes whole huge pages, so that no machine meets half of one.
func TestLimitTakesHugePages(t *testing.T) {
	rng := newRand(t)
	all := []memory.Range{{Len: 16 * mib}}
	o := newOracleOf(rng, 6, 4, 16*mib, all...)
	img := mappedImage(t, o)
	m := mapImage(t, img, memory.MapOptions{})
	populate(t, m)
	collapse(t, m, 16*mib)
	img.SetLimit(8 * mib)
	if n := held(t, img); n > 7*mib || n%huge != 0 {
		t.Errorf("the image holds %d bytes", n)
	}
	if s := m.Stats(); s.EvictedBytes != 16*mib-held(t, img) || s.HugeBytes != held(t, img) {
		t.Errorf("stats %+v", s)
	}
	got := make([]byte, 16*mib)
	if _, err := m.ReadAt(got, 0); err != nil || !bytes.Equal(got, o.bytes(0, len(got))) {
		t.Fatal(err)
	}
}
