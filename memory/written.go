package memory

import (
	"math"
	"math/bits"
)

// TrackWrites begins, or ends, to note which pages WriteAt and Discard change.
// To call it again with the same value does nothing.
func (m *Memory) TrackWrites(on bool) {
	// For writing, so that none that is under way now is missed: what it has
	// stored is in memory before this returns.
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case !on:
		m.written = nil
	case m.written == nil:
		m.written = newBitmap(span(m.size) / PageSize)
	}
}

// NoteWrites adds pages of r that someone else has seen written, while
// TrackWrites is on. log is a dirty log as KVM makes it: a bit for each page, the
// lowest page in bit 0 of word 0, and none set beyond r. r begins at a multiple of
// 64 pages. The error is a *[RangeError].
func (m *Memory) NoteWrites(r Range, log []uint64) error {
	words := (r.Len/PageSize + 63) / 64
	if !inRAM(m.ranges, r.GPA, r.Len) || r.GPA%(64*PageSize) != 0 || uint64(len(log)) != words {
		return &RangeError{Op: "log", GPA: int64(r.GPA), Len: int(min(r.Len, math.MaxInt))}
	}
	m.mu.RLock()
	defer m.mu.RUnlock()
	if m.written == nil {
		return nil
	}
	written := m.written[r.GPA/PageSize/64:]
	for i, word := range log {
		if word != 0 {
			written[i].Or(word)
		}
	}
	return nil
}

// TakeWrites returns the pages noted since TrackWrites(true) or the last
// TakeWrites, in ascending order and merged, and forgets them. A write that is
// under way is in this answer or in the next: read pages after the call that
// returns them.
func (m *Memory) TakeWrites() []Range {
	m.mu.RLock() // for m.written itself; what order does for its bits, see wrote
	defer m.mu.RUnlock()
	var taken []Range
	for i := range m.written {
		if m.written[i].Load() != 0 {
			taken = appendPages(taken, uint64(i)*64*PageSize, m.written[i].Swap(0))
		}
	}
	return taken
}

// wrote notes that the n bytes at gpa have been changed. It comes after the
// change: a TakeWrites that does not see the mark leaves it to the next, and one
// that sees it sees the bytes too. The caller holds mu.
func (m *Memory) wrote(gpa, n uint64) {
	if m.written != nil && n > 0 {
		m.written.set(gpa/PageSize, (gpa+n+PageSize-1)/PageSize)
	}
}

// appendPages appends the pages whose bits are set in word; bit 0 is the page at
// gpa.
func appendPages(ranges []Range, gpa, word uint64) []Range {
	for word != 0 {
		first := bits.TrailingZeros64(word)
		n := bits.TrailingZeros64(^(word >> first))
		ranges = appendRange(ranges, Range{GPA: gpa + uint64(first)*PageSize, Len: uint64(n) * PageSize})
		word &^= (1<<n - 1) << first
	}
	return ranges
}
