package memory

import (
	"context"
	"errors"
	"slices"
	"sync/atomic"

	"github.com/cryovisor/cryovisor/internal/pagemap"
)

// How much of an image is looked at at once, and how much of it is given back.
// Fetches, and Go code that accesses the memory of its machines, wait that long: a
// tenth of a millisecond, and a third if all of the step goes (BenchmarkReclaim).
const (
	reclaimWindow = 64 << 20
	reclaimStep   = 2 << 20
)

// Reclaim gives back what the image need not hold: pages of which all of its machines
// have copies of their own, because they have written there. A machine that discards
// its copy fetches the page again. It says how many bytes the host has got back.
//
// Where there is nothing to give back, it costs a millisecond or so for each GiB that
// the image still holds and each machine, and next to nothing where it holds none. A
// guest pays 0.7 us, once, for each page given back, as KVM has to map its copy again.
//
// While another process has the image (Lend), and in one that has it from another
// (AdoptImage), nothing is given back: the other would not know.
//
// Without a machine the image keeps what it has, and so it does while a machine is
// mapped eagerly: that one could not ask for a page. The error is ctx's or the
// system's.
func (img *Image) Reclaim(ctx context.Context) (freed uint64, err error) {
	pm, err := pagemap.Open()
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, pm.Close()) }()
	drop := func(ranges []Range) error {
		n, err := img.drop(ranges, &img.reclaimed)
		freed += n
		return err
	}
	err = inSteps(img.ranges, reclaimWindow, func(window Range) error {
		if err := ctx.Err(); err != nil {
			return err
		}
		some := false
		err := img.spare(pm, window, func(ranges []Range) error {
			some = len(ranges) > 0
			return nil
		})
		if err != nil || !some {
			return err
		}
		return inSteps([]Range{window}, reclaimStep, func(step Range) error { return img.spare(pm, step, drop) })
	})
	return freed, err
}

// spare calls f with the pages of r that the image has and need not hold. While mapMu
// is held there is no new mapping, and while mu of a Memory is, nothing private there
// is discarded, and no Go code is between asking whether a page is resident and
// touching it.
func (img *Image) spare(pm *pagemap.Map, r Range, f func([]Range) error) error {
	img.mapMu.Lock()
	defer img.mapMu.Unlock()
	spare, used := img.held(r), false
	if len(spare) == 0 || img.shared() {
		return nil
	}
	for _, m := range img.maps {
		m.mu.Lock()
		defer m.mu.Unlock()
		if m.closed {
			continue // nobody but the kernel touches it any more, and gets an error
		}
		if m.lazy == nil {
			return nil
		}
		regions, err := pm.Private(m.host(r.GPA), m.host(r.End()))
		if err != nil {
			return err
		}
		spare, used = overlap(spare, m.collect(nil, regions)), true
	}
	if !used {
		return nil
	}
	return f(spare)
}

// held returns the pages of r that the image has. Others may come meanwhile. None is
// taken away while mapMu is held.
func (img *Image) held(r Range) []Range {
	var held []Range
	for lo, end := r.GPA/PageSize, r.End()/PageSize; lo < end; {
		lo = img.present.next(lo, end, true)
		hi := img.present.next(lo, end, false)
		if lo < hi {
			held = append(held, Range{GPA: lo * PageSize, Len: (hi - lo) * PageSize})
		}
		lo = hi
	}
	return held
}

// drop takes ranges, which the image has, out of it, and counts the pages. Nothing is installed meanwhile:
// what is not present any more could be, before the hole is punched.
func (img *Image) drop(ranges []Range, count *atomic.Uint64) (freed uint64, err error) {
	img.filling.Lock()
	defer img.filling.Unlock()
	for _, r := range ranges {
		pages, err := img.take(r)
		freed += pages * PageSize
		count.Add(pages)
		if err != nil {
			return freed, err
		}
	}
	return freed, nil
}

// take takes r out of the image, and says how many pages of it were there and are gone. The caller holds filling for writing.
func (img *Image) take(r Range) (pages uint64, err error) {
	if img.splits(r) {
		if gone, err := img.punchHuge(r); !gone {
			return 0, err
		}
		return img.forget(r)
	}
	pages, err = img.forget(r)
	if err != nil {
		return 0, err
	}
	if err := punch(img.file, r); err != nil {
		return 0, err
	}
	img.huge.clear((r.GPA+hugePage-1)/hugePage, r.End()/hugePage)
	return pages, nil
}

// forget has the chunks of r fetched again when the next page of them is missing, and says how many pages
// were there. Fetches under way don't make them complete any more.
func (img *Image) forget(r Range) (pages uint64, err error) {
	img.mu.Lock()
	defer img.mu.Unlock()
	img.epoch++
	for gpa := r.GPA; gpa < r.End(); {
		run, chunk, err := img.lookup(gpa)
		if err != nil {
			return 0, err
		}
		if chunk >= 0 {
			img.done.clear(uint64(chunk), uint64(chunk)+1)
		}
		gpa = run.End()
	}
	gone := img.present.clear(r.GPA/PageSize, r.End()/PageSize)
	img.pages.Add(-int64(gone))
	return uint64(gone), nil
}

// join adds a Memory to those of which Reclaim must know.
func (img *Image) join(m *Memory) {
	img.mapMu.Lock()
	defer img.mapMu.Unlock()
	img.maps = append(img.maps, m)
	if m.lazy == nil {
		img.eager.Add(1)
	}
}

func (img *Image) leave(m *Memory) {
	img.mapMu.Lock()
	defer img.mapMu.Unlock()
	img.maps = slices.DeleteFunc(img.maps, func(other *Memory) bool { return other == m })
	if m.lazy == nil {
		img.eager.Add(-1)
	}
}
