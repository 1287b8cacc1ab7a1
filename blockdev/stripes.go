package blockdev

import "sync"

// stripes are locks for ranges of a disk: of ranges that share a block, one is locked at a time.
type stripes [64]sync.Mutex

// stripeShift makes stripes of 64 KiB: of the largest block of an overlay.
const stripeShift = 16

// lock locks a range that is not empty, and returns what unlocks it.
func (s *stripes) lock(off, n int64) (unlock func()) {
	first, last := off>>stripeShift, (off+n-1)>>stripeShift
	if last-first >= int64(len(s)) {
		first, last = 0, int64(len(s))-1
	}
	// In ascending order, whatever the range, so that no two callers wait for each other.
	from, to := int(first%int64(len(s))), int(last%int64(len(s)))
	each := func(do func(m *sync.Mutex)) {
		for i := range s {
			if from <= to && from <= i && i <= to || from > to && (i >= from || i <= to) {
				do(&s[i])
			}
		}
	}
	each((*sync.Mutex).Lock)
	return func() { each((*sync.Mutex).Unlock) }
}
