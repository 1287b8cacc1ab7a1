package memory

import (
	"slices"

	"github.com/cryovisor/cryovisor/internal/pagemap"
)

// MinLimit is the least limit of an image, in bytes.
const MinLimit = 4 << 20

// Shares of a limit. Prefetches stop below what the image is cut to, so that they never
// cause a cut; and the youngest stay, so that a thread that waited for
// a page gets to touch it.
const (
	cutTo      = 8 // the limit, less an eighth
	prefetchTo = 4 // less a quarter
	keepYoung  = 2 // a half
)

// SetLimit bounds what the image holds of the snapshot's memory to about so many bytes, at least
// MinLimit; 0 is no bound. When a fetch has brought it above that, what it has is
// dropped, chunk by chunk, until an eighth of the limit is free: first chunks of which no machine has touched a
// page, those that came first before the others; then the others, those that came first
// before the others too. The kernel does not tell cheaply which pages were used lately: what is dropped
// although it is needed comes back for the price of a fault, and is young then. What machines have written is
// their own, and not counted.
//
// It is exceeded by what comes at the same time; by an access of Go code to more memory
// than that; while another process has the image, and in one that has it from another; and while a machine is mapped
// eagerly. The source must be a [RunSource], or nothing is dropped. Views of
// what a machine has not written must not be in use.
func (img *Image) SetLimit(bytes uint64) {
	if bytes > 0 {
		bytes = max(bytes, MinLimit)
	}
	img.filling.Lock() // a Collapse under way is over then, and the next one knows
	img.limit.Store(bytes)
	img.filling.Unlock()
	if img.hold() { // else its file is closed
		img.trim()
		_ = img.release() // an error is about a file that nobody uses any more
	}
}

// holds is how many bytes the image has of the snapshot's memory.
func (img *Image) holds() uint64 { return uint64(img.pages.Load()) * PageSize }

// full says whether nothing should be fetched ahead any more.
func (img *Image) full() bool {
	limit := img.limit.Load()
	if limit == 0 || img.eager.Load() > 0 {
		return false
	}
	return img.holds() >= limit-limit/prefetchTo
}

// trim keeps the image within its limit. Who comes while another does it goes on. What
// fails is tried again after the next fetch.
func (img *Image) trim() {
	limit := img.limit.Load()
	for progress := true; progress && limit > 0 && img.holds() > limit && !img.shared() && img.eager.Load() == 0; {
		if !img.trimming.TryLock() {
			return
		}
		before := img.evictedPages.Load()
		img.cut(limit)
		progress = img.evictedPages.Load() > before
		img.trimming.Unlock() // who has come meanwhile, and gone on, may have brought too much
	}
}

// cut drops pages until the image is well below the limit. The caller holds trimming.
func (img *Image) cut(limit uint64) {
	pm, err := pagemap.Open()
	if err != nil {
		return
	}
	defer pm.Close()
	victims, err := img.victims(pm, limit/keepYoung)
	for len(victims) > 0 && err == nil && img.holds() > limit-limit/cutTo {
		err = img.evict(pm, victims[0])
		victims = victims[1:]
	}
}

// A victim is a chunk that may be dropped.
type victim struct {
	chunk int64
	age   uint64
	runs  []Range
}

// victims are the chunks of which the image has pages, in the order in which they are
// to go, without the youngest, which have keep bytes. It is a guess: what machines touch meanwhile is not seen.
func (img *Image) victims(pm *pagemap.Map, keep uint64) ([]victim, error) {
	img.mu.Lock()
	all := make([]victim, 0, len(img.ages))
	for chunk, age := range img.ages {
		all = append(all, victim{chunk: chunk, age: age})
	}
	img.mu.Unlock()
	slices.SortFunc(all, func(a, b victim) int { return int(int64(b.age - a.age)) })
	mapped, err := img.mapped(pm)
	if err != nil {
		return nil, err
	}
	var idle, used []victim
	for _, v := range all {
		if v.runs, err = img.runs(v.chunk); err != nil {
			return nil, err
		}
		size, touched := uint64(0), false
		for _, r := range v.runs {
			for _, h := range img.held(r) {
				size += h.Len
			}
			touched = touched || mapped.next(r.GPA/PageSize, r.End()/PageSize, true) < r.End()/PageSize
		}
		switch {
		case keep > 0:
			keep -= min(keep, size)
		case size > 0 && touched:
			used = append(used, v)
		case size > 0:
			idle = append(idle, v)
		}
	}
	slices.Reverse(idle)
	slices.Reverse(used)
	return append(idle, used...), nil
}

// mapped are the pages that are in the page tables of any machine.
func (img *Image) mapped(pm *pagemap.Map) (bitmap, error) {
	pages := newBitmap(span(img.size) / PageSize)
	img.mapMu.Lock()
	defer img.mapMu.Unlock()
	for _, m := range img.maps {
		if err := m.addMapped(pm, pages); err != nil {
			return nil, err
		}
	}
	return pages, nil
}

func (m *Memory) addMapped(pm *pagemap.Map, pages bitmap) error {
	m.mu.RLock()
	defer m.mu.RUnlock()
	if m.closed {
		return nil
	}
	for _, r := range m.ranges {
		regions, err := pm.Mapped(m.host(r.GPA), m.host(r.End()))
		if err != nil {
			return err
		}
		for _, g := range regions {
			pages.set(uint64(g.Start-m.host(0))/PageSize, uint64(g.End-m.host(0))/PageSize)
		}
	}
	return nil
}

// evict drops what the image has of a chunk, by the protocol of Reclaim: see spare. What is
// private in a machine becomes its own first; the other machines will ask for it.
func (img *Image) evict(pm *pagemap.Map, v victim) error {
	img.mapMu.Lock()
	defer img.mapMu.Unlock()
	ranges := img.evicted(v.runs)
	if img.shared() || img.eager.Load() > 0 || img.pins(ranges) {
		return nil
	}
	for _, m := range img.maps {
		m.mu.Lock()
		defer m.mu.Unlock()
		if m.closed {
			continue
		}
		for _, r := range ranges {
			regions, err := pm.Private(m.host(r.GPA), m.host(r.End()))
			if err != nil {
				return err
			}
			m.collect(nil, regions)
		}
	}
	if _, err := img.drop(ranges, &img.evictedPages); err != nil {
		return err
	}
	img.mu.Lock()
	defer img.mu.Unlock()
	if img.ages[v.chunk] == v.age {
		delete(img.ages, v.chunk)
	}
	return nil
}

// evicted are the pages that go with runs: those that are there, and whole huge pages, as a part of one can't be taken
// from machines that may touch it meanwhile. The caller holds mapMu.
func (img *Image) evicted(runs []Range) []Range {
	ranges := img.inHuge(runs)
	for _, r := range runs {
		for _, h := range img.held(r) {
			for gpa := h.GPA; gpa < h.End(); {
				end := min(h.End(), gpa&^(hugePage-1)+hugePage)
				if !img.huge.get(gpa / hugePage) {
					ranges = appendRange(ranges, Range{GPA: gpa, Len: end - gpa})
				}
				gpa = end
			}
		}
	}
	return ranges
}

// pin keeps the chunks of the n bytes at gpa in the image, once they are there: an
// access that needs more than the limit leaves would never have all of it.
func (img *Image) pin(gpa, n uint64) (unpin func()) {
	r := &Range{GPA: gpa, Len: n}
	img.mapMu.Lock()
	defer img.mapMu.Unlock()
	img.pinned[r] = struct{}{}
	return func() {
		img.mapMu.Lock()
		defer img.mapMu.Unlock()
		delete(img.pinned, r)
	}
}

// pins says whether a part of runs is pinned. The caller holds mapMu.
func (img *Image) pins(runs []Range) bool {
	for pin := range img.pinned {
		for _, r := range runs {
			if r.GPA < pin.End() && pin.GPA < r.End() {
				return true
			}
		}
	}
	return false
}

// fleeting says whether the limit may take any of the n bytes at gpa away. The caller
// holds mu.
func (m *Memory) fleeting(gpa, n uint64) bool {
	if m.lazy == nil || m.img.limit.Load() == 0 {
		return false
	}
	lo, hi := gpa/PageSize, (gpa+n+PageSize-1)/PageSize
	return m.lazy.own.next(lo, hi, false) < hi
}
