package snapshot

import (
	"sync"
	"sync/atomic"
)

// progressMeter passes progress on to a caller's function, from one goroutine at
// a time and never backwards. A goroutine that finds another one reporting
// leaves it to the next.
type progressMeter struct {
	report func(done, total uint64) // may be nil
	total  uint64
	done   atomic.Uint64
	mu     sync.Mutex
}

func (p *progressMeter) add(n uint64) {
	p.done.Add(n)
	if p.report == nil || !p.mu.TryLock() {
		return
	}
	defer p.mu.Unlock()
	p.report(p.done.Load(), p.total)
}

// finish reports that everything is done, after the goroutines have ended.
func (p *progressMeter) finish() {
	if p.report != nil {
		p.report(p.total, p.total)
	}
}
