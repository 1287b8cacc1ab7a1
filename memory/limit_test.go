//go:build linux && amd64

package memory_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/cryovisor/cryovisor/memory"
)

// limitSlack is by how much an image may exceed its limit for a moment: what several
// threads, and a batch of a prefetch, bring at the same time.
const limitSlack = 3 * mib

// mapped is a source that knows where the pages of a chunk are.
type mapped struct{ *oracle }

func (o mapped) ChunkRuns(chunk int64) (runs []memory.Range) {
	for _, r := range o.chunks[chunk] {
		runs = append(runs, memory.Range{GPA: r.gpa, Len: r.length})
	}
	return runs
}

func mappedImage(t *testing.T, o *oracle) *memory.Image {
	t.Helper()
	img, err := memory.NewImage(o.size, mapped{o})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := img.Close(); err != nil {
			t.Error(err)
		}
	})
	return img
}

// An image with a limit keeps about that, and machines with more than that in use have
// the right memory, in the right dirty set, while pages go, are discarded, and are prefetched.
func TestLimitIsExact(t *testing.T) {
	for machines := range 2 {
		t.Run(fmt.Sprintf("%d machines", machines+1), func(t *testing.T) {
			rng := newRand(t)
			size, data := sparse()
			o := newOracleOf(rng, 6, 4, size, data...)
			img := mappedImage(t, o)
			img.SetLimit(1) // that is MinLimit
			ctx := context.Background()
			chunks := inTurn(o)
			ahead := repeat(func() error { return img.Prefetch(ctx, chunks, 1) })
			most := uint64(0)
			watch := repeat(func() error {
				n, err := img.Held()
				most = max(most, n)
				return err
			})
			var wg sync.WaitGroup
			for range machines + 1 {
				m, mine := mapImage(t, img, memory.MapOptions{}), rand.New(rand.NewPCG(rng.Uint64(), 2))
				wg.Go(func() { useEverywhere(t, mine, m, o, data, 400) })
			}
			wg.Wait()
			_, err := ahead()
			_, werr := watch()
			if err := errors.Join(err, werr); err != nil {
				t.Fatal(err)
			}
			m := mapImage(t, img, memory.MapOptions{})
			comparePages(t, m, newModel(o.bytes), pagesOf(rng, data))
			if s := m.Stats(); s.EvictedBytes == 0 || s.ReclaimedBytes != 0 {
				t.Errorf("stats %+v", s)
			}
			await(func() bool { return img.Demands() == 0 }) // what comes behind the page that was waited for
			if n := held(t, img); n > memory.MinLimit {
				t.Errorf("the image holds %d bytes at rest", n)
			}
			if most > memory.MinLimit+limitSlack {
				t.Errorf("the image held %d bytes", most)
			}
		})
	}
}

// What nobody has touched goes first, and of that what came first.
func TestLimitOrder(t *testing.T) {
	rng := newRand(t)
	o := newOracle(rng, 32*mib, memory.Range{Len: 32 * mib})
	img := mappedImage(t, o)
	m := mapImage(t, img, memory.MapOptions{})
	chunks := inTurn(o)
	touched := chunks[:len(chunks)/8] // the oldest
	touchRuns(t, m, o, touched)
	await(func() bool { return img.Demands() == 0 })
	if err := img.Prefetch(context.Background(), chunks, 1); err != nil {
		t.Fatal(err)
	}
	all := held(t, img)
	img.SetLimit(all * 15 / 16) // cut by an eighth of that and a sixteenth
	left := held(t, img)
	if left > all*15/16*7/8 || left < all*15/16*7/8-mib {
		t.Errorf("%d bytes of %d are left", left, all)
	}
	gone := func(chunk int64) bool {
		_, err := m.View(o.chunks[chunk][0].gpa, page)
		return errors.Is(err, memory.ErrNotResident)
	}
	if !gone(touched[0]) {
		t.Error("a page that may go at any time was given to view")
	}
	img.SetLimit(0) // so that what is there can be viewed
	for _, chunk := range touched {
		if gone(chunk) {
			t.Errorf("chunk %d has gone, which a machine has touched", chunk)
		}
	}
	idle := chunks[len(touched):]
	last := len(idle) - 1
	for i, chunk := range idle {
		if gone(chunk) && i > last {
			t.Errorf("chunk %d has gone, and an older one has not", chunk)
		}
		if !gone(chunk) {
			last = min(last, i)
		}
	}
	if !gone(idle[0]) {
		t.Error("the oldest that nobody has touched is there")
	}
}

// What is fetched ahead stays below the limit, and takes nothing from anybody.
func TestLimitStopsPrefetch(t *testing.T) {
	o := newOracle(newRand(t), 32*mib, memory.Range{Len: 32 * mib})
	img := mappedImage(t, o)
	img.SetLimit(8 * mib)
	m := mapImage(t, img, memory.MapOptions{})
	for _, fetch := range []func(context.Context) error{img.Populate, m.Populate} {
		if err := fetch(context.Background()); err != nil {
			t.Fatal(err)
		}
	}
	fetches := o.fetches.Load()
	if err := img.Prefetch(context.Background(), inTurn(o), 1); err != nil {
		t.Fatal(err)
	}
	if n := held(t, img); n > 8*mib || n < 5*mib || m.Stats().EvictedBytes != 0 || o.fetches.Load() != fetches {
		t.Errorf("the image holds %d bytes; %d fetches, then %d; %+v", n, fetches, o.fetches.Load(), m.Stats())
	}
}

// A limit for an image that is closed already does nothing: its file's descriptor may be another file's by then, and no
// hole is to be punched into that.
func TestLimitOfClosed(t *testing.T) {
	o := newOracle(newRand(t), 16*mib, memory.Range{Len: 16 * mib})
	img := mappedImage(t, o)
	if err := img.Populate(context.Background()); err != nil {
		t.Fatal(err)
	}
	pages := img.Pages()
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
	img.SetLimit(memory.MinLimit)
	if n := img.Pages(); n != pages || n == 0 {
		t.Errorf("%d pages, and %d when it was closed", n, pages)
	}
}

// One access may need more than the limit, and an eager machine all there is.
func TestLimitGivesWay(t *testing.T) {
	o := newOracle(newRand(t), 16*mib, memory.Range{Len: 16 * mib})
	img := mappedImage(t, o)
	img.SetLimit(memory.MinLimit)
	m := mapImage(t, img, memory.MapOptions{})
	got := make([]byte, 16*mib)
	for range 2 {
		if _, err := m.ReadAt(got, 0); err != nil || !bytes.Equal(got, o.bytes(0, len(got))) {
			t.Fatalf("all at once: %v", err)
		}
	}
	eager := mapImage(t, img, memory.MapOptions{Eager: true})
	if err := m.Discard(0, 16*mib); err != nil {
		t.Fatal(err)
	}
	if _, err := eager.ReadAt(got, 0); err != nil || !bytes.Equal(got, o.bytes(0, len(got))) {
		t.Fatalf("eager: %v", err)
	}
	zeros := held(t, img) // of which an eager machine has made pages
	for _, r := range o.runs {
		if r.chunk >= 0 && r.gpa < 16*mib {
			zeros -= r.length
		}
	}
	if n := held(t, img); n <= memory.MinLimit {
		t.Errorf("the image holds %d bytes beside an eager machine", n)
	}
	if err := eager.Close(); err != nil {
		t.Fatal(err)
	}
	img.SetLimit(memory.MinLimit)
	if n := held(t, img); n > memory.MinLimit+zeros {
		t.Errorf("the image holds %d bytes", n)
	}
	if _, err := m.ReadAt(got, 0); err != nil || !bytes.Equal(got, o.bytes(0, len(got))) {
		t.Fatal(err)
	}
}
