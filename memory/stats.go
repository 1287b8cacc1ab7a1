package memory

import (
	"math/bits"
	"sync/atomic"
	"time"
)

// Stats are counts since the Memory, or the image, was made. Only faults that reach
// the pager are counted: a page that the image has is the kernel's to map, and that
// a prefetch was in time for it shows in what is not here.
type Stats struct {
	Faults     uint64        // page faults that reached the pager
	WakeOnly   uint64        // of these: the page was there by the time they were read
	Prefetched uint64        // of these: the page came, before or while it was waited for, by a prefetch
	ZeroPages  uint64        // pages of zeros mapped
	FaultTime  time.Duration // the time that the pager took for all faults; the thread may have gone on sooner
	Slowest    time.Duration // and for the slowest
	Latency    Latency       // and for each

	// Of the image, for all of its machines. What was reclaimed or evicted and is fetched again
	// counts again.
	PagesFetched   uint64 // pages that came into the image
	ChunksFetched  uint64 // chunks that did
	DemandBytes    uint64 // what came because somebody waited for a page of the chunk
	PrefetchBytes  uint64 // and what came by Prefetch or Populate, before anybody did
	FoundBytes     uint64 // what another process had fetched by the time that this one wanted it
	ReclaimedBytes uint64 // what Reclaim gave back
	EvictedBytes   uint64 // what was dropped because of the limit of the image
	HugeBytes      uint64 // what Collapse has moved to huge pages, as far as it is still there
	FilledBytes    uint64 // pages of zeros that it took memory for
}

// Latency says how long things took: element i counts those that took less than
// 2^i ns, and not less than half of that. The last takes all that is longer.
type Latency [36]uint64

// Quantile returns a time that a share q of all, from 0 to 1, did not exceed: the
// end of an element, so up to twice the true one. It is 0 if there are none.
func (l Latency) Quantile(q float64) time.Duration {
	var all, n uint64
	for _, count := range l {
		all += count
	}
	for i, count := range l {
		if n += count; n > 0 && float64(n) >= q*float64(all) {
			return 1 << i
		}
	}
	return 0
}

type stats struct {
	faults, wakeOnly, prefetched, zeroPages atomic.Uint64
	total, slowest                          atomic.Int64
	latency                                 [len(Latency{})]atomic.Uint64
}

func (s *stats) fault(took time.Duration) {
	s.faults.Add(1)
	s.total.Add(int64(took))
	s.latency[min(bits.Len64(uint64(took)), len(s.latency)-1)].Add(1)
	for old := s.slowest.Load(); int64(took) > old; old = s.slowest.Load() {
		if s.slowest.CompareAndSwap(old, int64(took)) {
			return
		}
	}
}

// Stats returns the counts so far. Each is exact, but they are not all of the
// same instant.
func (m *Memory) Stats() Stats {
	s := Stats{
		Faults:     m.stats.faults.Load(),
		WakeOnly:   m.stats.wakeOnly.Load(),
		Prefetched: m.stats.prefetched.Load(),
		ZeroPages:  m.stats.zeroPages.Load(),
		FaultTime:  time.Duration(m.stats.total.Load()),
		Slowest:    time.Duration(m.stats.slowest.Load()),
	}
	for i := range s.Latency {
		s.Latency[i] = m.stats.latency[i].Load()
	}
	if m.img != nil {
		s.PagesFetched = m.img.fetched()
		s.ChunksFetched = m.img.chunksFetched.Load()
		s.DemandBytes = m.img.demandPages.Load() * PageSize
		s.PrefetchBytes = m.img.aheadPages.Load() * PageSize
		s.FoundBytes = m.img.found.Load() * PageSize
		s.EvictedBytes = m.img.evictedPages.Load() * PageSize
		s.HugeBytes = m.img.huge.count() * hugePage
		s.FilledBytes = m.img.filled.Load() * PageSize
		s.ReclaimedBytes = m.img.reclaimed.Load() * PageSize
	}
	return s
}
