//go:build linux && amd64

package memory_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/cryovisor/cryovisor/internal/kvm"
	"github.com/cryovisor/cryovisor/memory"
)

func held(t *testing.T, img *memory.Image) uint64 {
	t.Helper()
	n, err := img.Held()
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// reclaim checks that a pass frees so many pages, by its own account and the host's. What
// comes behind the page that a thread waited for has to be there first.
func reclaim(t *testing.T, img *memory.Image, pages int) {
	t.Helper()
	await(func() bool { return img.Demands() == 0 })
	before := held(t, img)
	freed, err := img.Reclaim(context.Background())
	if err != nil || freed != uint64(pages)*page {
		t.Fatalf("freed %d bytes (%v), want %d", freed, err, pages*page)
	}
	if after := held(t, img); before-after != freed {
		t.Errorf("freed %d bytes, and the image holds %d less", freed, before-after)
	}
}

// inChunks is those of pages that are in a chunk.
func inChunks(o *oracle, pages []uint64) []uint64 {
	var in []uint64
	for _, gpa := range pages {
		if o.find(gpa).chunk >= 0 {
			in = append(in, gpa)
		}
	}
	return in
}

func writePages(t *testing.T, m *memory.Memory, want *model, pages []uint64) {
	t.Helper()
	tc := mustToucher(t, m)
	for i, gpa := range pages {
		p := fmt.Appendf(nil, "page %#x", gpa)
		var err error
		if i%2 == 0 {
			err = tc.store(p, gpa+10)
		} else {
			_, err = m.WriteAt(p, int64(gpa+10))
		}
		if err != nil {
			t.Fatal(err)
		}
		want.write(p, gpa+10)
	}
}

// comparePages compares pages with the model, one way in turn with the other.
func comparePages(t *testing.T, m *memory.Memory, want *model, pages []uint64) {
	t.Helper()
	tc := mustToucher(t, m)
	for i, gpa := range pages {
		got := make([]byte, page)
		var err error
		if i%2 == 0 {
			got, err = tc.load(gpa, page)
		} else {
			_, err = m.ReadAt(got, int64(gpa))
		}
		if err != nil || !bytes.Equal(got, want.page(gpa)) {
			t.Fatalf("page %#x is wrong (%v)", gpa, err)
		}
	}
}

// What a machine has rewritten, the image does not hold; what it discards is fetched
// again.
func TestReclaimGivesBack(t *testing.T) {
	rng := newRand(t)
	size, data := sparse()
	o := newOracle(rng, size, data...)
	img := newImage(t, o)
	m := mapImage(t, img, memory.MapOptions{})
	want := newModel(o.bytes)
	reclaim(t, img, 0)
	all := pagesOf(rng, data)
	full := inChunks(o, all)
	writePages(t, m, want, all[:len(all)/2])
	reclaim(t, img, len(inChunks(o, all[:len(all)/2])))
	reclaim(t, img, 0)
	comparePages(t, m, want, all) // what was not written is there, or comes
	writePages(t, m, want, all[len(all)/2:])
	if err := m.Populate(context.Background()); err != nil {
		t.Fatal(err)
	}
	if now := held(t, img); now != uint64(len(full))*page {
		t.Fatalf("the image holds %d bytes, want all of its %d pages", now, len(full))
	}
	reclaim(t, img, len(full))
	comparePages(t, m, want, all)
	checkDirty(t, m, want)
	reclaim(t, img, 0)
	for _, r := range data {
		if err := m.Discard(r.GPA, r.Len/page/2*page); err != nil {
			t.Fatal(err)
		}
		want.discard(r.GPA, r.Len/page/2*page)
	}
	if _, err := m.View(full[0], page); want.written[full[0]] == nil && !errors.Is(err, memory.ErrNotResident) {
		t.Errorf("view of what was reclaimed and discarded: %v", err)
	}
	comparePages(t, m, want, all)
	checkDirty(t, m, want)
	if s := m.Stats(); s.ReclaimedBytes == 0 || m.Err() != nil {
		t.Errorf("stats %+v, Err %v", s, m.Err())
	}
}

// What one machine has not written stays, for that machine; an eager one keeps all.
func TestReclaimOfSeveral(t *testing.T) {
	rng := newRand(t)
	o := newOracle(rng, 8*mib, memory.Range{Len: 8 * mib})
	img := newImage(t, o)
	if err := img.Populate(context.Background()); err != nil {
		t.Fatal(err)
	}
	reclaim(t, img, 0) // there may be machines to come
	first, second := mapImage(t, img, memory.MapOptions{}), mapImage(t, img, memory.MapOptions{})
	models := []*model{newModel(o.bytes), newModel(o.bytes), newModel(o.bytes), newModel(o.bytes)}
	pages := inChunks(o, pagesOf(rng, []memory.Range{{Len: 8 * mib}}))
	writePages(t, first, models[0], pages[:300])
	writePages(t, second, models[1], pages[200:600])
	eager := mapImage(t, img, memory.MapOptions{Eager: true})
	writePages(t, eager, models[3], pages[150:300])
	reclaim(t, img, 0)
	if err := errors.Join(eager.Discard(0, 8*mib), eager.Close()); err != nil {
		t.Fatal(err)
	}
	reclaim(t, img, 100)
	comparePages(t, first, models[0], pages)
	comparePages(t, second, models[1], pages)
	third := mapImage(t, img, memory.MapOptions{})
	comparePages(t, third, models[2], pages)
	reclaim(t, img, 0)
	if err := errors.Join(third.Close(), second.Close()); err != nil {
		t.Fatal(err)
	}
	reclaim(t, img, 300)
	if err := first.Discard(0, 8*mib); err != nil {
		t.Fatal(err)
	}
	comparePages(t, first, models[2], pages)

	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := img.Reclaim(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

// Reads, writes and discards by several threads of one machine and of two, while
// pages are reclaimed and prefetched, give what the model says.
func TestReclaimIsExact(t *testing.T) {
	for machines := range 2 {
		t.Run(fmt.Sprintf("%d machines", machines+1), func(t *testing.T) {
			rng := newRand(t)
			size, data := sparse()
			o := newOracleOf(rng, 6, 4, size, data...)
			img := newImage(t, o)
			ctx := context.Background()
			again := repeat(func() error { _, err := img.Reclaim(ctx); return err })
			chunks := inTurn(o)
			ahead := repeat(func() error { return img.Prefetch(ctx, chunks[:len(chunks)/2], 1) })
			steps := 2000
			if testing.Short() {
				steps = 800
			}
			var wg sync.WaitGroup
			for range machines + 1 {
				m, mine := mapImage(t, img, memory.MapOptions{}), rand.New(rand.NewPCG(rng.Uint64(), 2))
				wg.Go(func() { useEverywhere(t, mine, m, o, data, steps) })
			}
			wg.Wait()
			passes, err := again()
			prefetches, perr := ahead()
			if err := errors.Join(err, perr); err != nil {
				t.Fatal(err)
			}
			m := mapImage(t, img, memory.MapOptions{})
			s := m.Stats()
			t.Logf("%d passes, %d prefetches, %+v", passes, prefetches, s)
			if s.ReclaimedBytes == 0 {
				t.Error("nothing was reclaimed")
			}
			comparePages(t, m, newModel(o.bytes), pagesOf(rng, data))
		})
	}
}

// useEverywhere has a thread for each of data do things at random, and checks the
// dirty set at the end.
func useEverywhere(t *testing.T, rng *rand.Rand, m *memory.Memory, o *oracle, data []memory.Range, steps int) {
	all := newModel(o.bytes)
	models := make([]*model, len(data))
	var wg sync.WaitGroup
	for i := range data {
		models[i] = newModel(o.bytes)
		mine := rand.New(rand.NewPCG(rng.Uint64(), 1))
		tc, err := newToucher(m)
		if err != nil {
			t.Error(err)
			return
		}
		wg.Go(func() {
			defer tc.close()
			for range steps {
				if err := discardStep(mine, tc, models[i], data[i:i+1]); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	for _, part := range models {
		maps.Copy(all.written, part.written)
	}
	dirty, err := m.Dirty(context.Background())
	if err != nil || m.Err() != nil {
		t.Errorf("dirty: %v, Err: %v", err, m.Err())
		return
	}
	compareDirty(t, m, dirty, all.dirty())
}

// A Still is what it was when the image has given its pages back.
func TestReclaimDuringStill(t *testing.T) {
	rng := newRand(t)
	o := newOracle(rng, 8*mib, memory.Range{Len: 8 * mib})
	img := newImage(t, o)
	m := mapImage(t, img, memory.MapOptions{})
	want := newModel(o.bytes)
	pages := inChunks(o, pagesOf(rng, []memory.Range{{Len: 8 * mib}}))
	writePages(t, m, want, pages)
	frozen := mustDirty(t, m)
	was := contents(t, m, frozen)
	s := protect(t, m, frozen)
	if err := s.Freeze(frozen); err != nil {
		t.Fatal(err)
	}
	reclaim(t, img, len(pages))
	done := make(chan struct{})
	go func() {
		defer close(done)
		writePages(t, m, want, pages[:100])
	}()
	compareStill(t, rng, s, frozen, was)
	<-done
	comparePages(t, m, want, pages)
	if err := m.Discard(0, 8*mib); err != nil {
		t.Fatal(err)
	}
	comparePages(t, m, newModel(o.bytes), pages)
}

// A guest whose pages are reclaimed while it runs sees its own, and, when they have been
// discarded, those of the snapshot again.
func TestKVMRunDuringReclaim(t *testing.T) {
	levels(t, func(t *testing.T, level uint8) {
		rng := newRand(t)
		size, data := sparse()
		o := newOracleOf(rng, 6, 4, size, data...)
		img := newImage(t, o)
		m := mapImage(t, img, memory.MapOptions{})
		g := newGuest(t, m, level)
		list := visits(rng, pagesOf(rng, data))
		g.list(list)
		for range 3 {
			for _, r := range data {
				g.must(m.Discard(r.GPA, r.Len))
			}
			before := mustDirty(t, m)
			g.must(g.vcpu.SetRegs(kvm.Regs{RIP: guestCode, RFLAGS: 2, RSI: guestList, RDI: guestResult, RDX: doneAddr}))
			again := repeat(func() error { _, err := img.Reclaim(context.Background()); return err })
			g.finish()
			_, err := again()
			g.must(err)
			checkGuest(t, m, o, list, before)
		}
		if m.Stats().ReclaimedBytes == 0 {
			t.Error("nothing was reclaimed")
		}
	})
}
