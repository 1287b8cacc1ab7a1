package memory

import (
	"sync/atomic"
	"time"
)

// Stats are counts since the Memory was made.
type Stats struct {
	Faults    uint64        // page faults that reached the pager
	WakeOnly  uint64        // of these: the page was there by the time they were read
	ZeroPages uint64        // pages of zeros mapped
	FaultTime time.Duration // the time that the pager took for all faults
	Slowest   time.Duration // and for the slowest

	PagesFetched  uint64 // pages that the image has, for all of its machines
	ChunksFetched uint64 // chunks that the image has
}

type stats struct {
	faults, wakeOnly, zeroPages atomic.Uint64
	total, slowest              atomic.Int64
}

func (s *stats) fault(took time.Duration) {
	s.faults.Add(1)
	s.total.Add(int64(took))
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
		Faults:    m.stats.faults.Load(),
		WakeOnly:  m.stats.wakeOnly.Load(),
		ZeroPages: m.stats.zeroPages.Load(),
		FaultTime: time.Duration(m.stats.total.Load()),
		Slowest:   time.Duration(m.stats.slowest.Load()),
	}
	if m.img != nil {
		s.PagesFetched = m.img.pagesFetched.Load()
		s.ChunksFetched = m.img.chunksFetched.Load()
	}
	return s
}
