package memory

import (
	"fmt"
	"math"
)

// Discard takes back the pages of [gpa, gpa+n) whose contents the guest does not
// care for any more. What the guest or a device wrote there is gone, and the
// pages leave the dirty set: those of a machine that booted read as zero, those
// of one that resumed as what the image has, so that the next snapshot stores
// none of them. Their memory goes back to the host, but for the image, which is
// not this machine's alone.
//
// Only whole pages are discarded: one that the range covers in part stays as it
// is. A page that could not be fetched stays inaccessible. The guest may run, and
// what it writes there at the same time may be kept or lost. A [Still] keeps what it
// needs first, which may have to wait for its reader. Views must not be in use. The error is a *[RangeError], matches [ErrClosed], or is the system's.
func (m *Memory) Discard(gpa, n uint64) error {
	if !inRAM(m.ranges, gpa, n) {
		return &RangeError{Op: "discard", GPA: int64(gpa), Len: int(min(n, math.MaxInt))}
	}
	lo, hi := (gpa+PageSize-1)&^(PageSize-1), (gpa+n)&^(PageSize-1)
	hi = max(lo, hi)
	// Nobody is touching a page, or noting it as resident, while this is held:
	// what is missing afterwards is known to be.
	m.mu.Lock()
	for !m.closed && m.guarded(lo, hi-lo) {
		m.mu.Unlock()
		if err := m.release(lo, hi-lo); err != nil {
			return err
		}
		m.mu.Lock()
	}
	defer m.mu.Unlock()
	if m.closed {
		return fmt.Errorf("memory: discard: %w", ErrClosed)
	}
	if lo == hi {
		return nil
	}
	// First, because it is right even if the system call fails halfway: a page
	// that is there and not known to be is only looked at once more.
	if m.lazy != nil {
		m.lazy.own.clear(lo/PageSize, hi/PageSize)
	}
	err := m.mm.discard(Range{GPA: lo, Len: hi - lo})
	m.wrote(lo, hi-lo) // all of it: after an error, nobody knows which pages are gone
	return err
}
