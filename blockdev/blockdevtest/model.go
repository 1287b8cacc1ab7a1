package blockdevtest

import (
	"bytes"
	"fmt"
)

// change is what a call has put, or may have put, at off. A nil data is zeros.
type change struct {
	extent
	data []byte
}

// part returns what of c is within a range.
func (c change) part(e extent) change {
	within := c.clip(e)
	if c.data == nil || within.len() <= 0 {
		return change{extent: within}
	}
	return change{within, c.data[within.off-c.off : within.end-c.off]}
}

// copyTo makes the change in the bytes of a whole disk.
func (c change) copyTo(disk []byte) {
	if c.data == nil {
		clear(disk[c.off:c.end])
	} else {
		copy(disk[c.off:c.end], c.data)
	}
}

// without returns changes without what they say of a range.
func without(changes []change, e extent) []change {
	var left []change
	for _, c := range changes {
		before, after := c.part(extent{c.off, e.off}), c.part(extent{e.end, c.end})
		if before.len() > 0 {
			left = append(left, before)
		}
		if after.len() > 0 {
			left = append(left, after)
		}
	}
	return left
}

// A model is what some ranges of a disk may hold, which one goroutine works in. Models of other ranges may share its slices.
type model struct {
	own []extent
	// now, of the size of the disk, is what calls have made of it; but where calls failed, what they should
	// have made may be there.
	now   []byte
	maybe []change
	// kept is what it was at the last Flush, or what it should have become since. It is nil where nobody crashes.
	kept    []byte
	since   []change
	flushed bool
}

// newModel returns a model of a whole disk, whose slice of contents it uses.
func newModel(disk []byte) *model {
	return &model{own: []extent{{0, int64(len(disk))}}, now: disk}
}

// remember makes m one that knows what a crash may leave. The disk must not have been changed before.
func (m *model) remember() *model {
	m.kept = bytes.Clone(m.now)
	return m
}

// changed notes a call that has succeeded.
func (m *model) changed(c change) {
	m.maybe = without(m.maybe, c.extent)
	c.copyTo(m.now)
	if m.kept != nil {
		m.since = append(m.since, c)
	}
}

// failed notes a call that has failed: each byte of its range is the old one or the new one.
func (m *model) failed(c change) {
	m.maybe = append(m.maybe, c)
	if m.kept != nil {
		m.since = append(m.since, c)
	}
}

// flush notes a Flush that has succeeded.
func (m *model) flush() {
	m.flushed = true
	if m.kept == nil {
		return
	}
	for _, e := range m.own {
		copy(m.kept[e.off:e.end], m.now[e.off:e.end])
	}
	m.since = append([]change(nil), m.maybe...)
}

// read compares what was read with what may be there. What was read is what is there from then on.
func (m *model) read(got []byte, off int64) error {
	e := extent{off, off + int64(len(got))}
	if err := explain(got, off, m.now, m.maybe); err != nil {
		return err
	}
	if len(m.maybe) > 0 { // else got is now, which several may read
		copy(m.now[e.off:e.end], got)
		m.maybe = without(m.maybe, e)
	}
	return nil
}

// reopened compares what a disk that was opened again reads as with what may have outlived, and goes on with that. What has
// outlived once is durable at the next Flush only, so that kept and since stay.
func (m *model) reopened(disk []byte) error {
	for _, e := range m.own {
		if err := explain(disk[e.off:e.end], e.off, m.kept, m.since); err != nil {
			return fmt.Errorf("opened again: %w", err)
		}
		copy(m.now[e.off:e.end], disk[e.off:e.end])
	}
	m.maybe = nil
	return nil
}

// explain returns an error unless each byte of got, which is what a disk holds at off, is the one of base or of a change.
func explain(got []byte, off int64, base []byte, changes []change) error {
	e := extent{off, off + int64(len(got))}
	if bytes.Equal(got, base[e.off:e.end]) {
		return nil
	}
	odd := make([]bool, len(got))
	for i, b := range got {
		odd[i] = b != base[off+int64(i)]
	}
	for _, c := range changes {
		c = c.part(e)
		for at := c.off; at < c.end; at++ {
			if c.data == nil && got[at-off] == 0 || c.data != nil && got[at-off] == c.data[at-c.off] {
				odd[at-off] = false
			}
		}
	}
	first, count := -1, 0
	for i := range odd {
		if odd[i] && first < 0 {
			first = i
		}
		if odd[i] {
			count++
		}
	}
	if count == 0 {
		return nil
	}
	at := off + int64(first)
	return fmt.Errorf("%d of %d bytes at %d are wrong, the first at %d: %#x; it was %#x%s", count, len(got), off, at, got[first],
		base[at], alternatives(changes, at))
}

// alternatives says what else a byte may be.
func alternatives(changes []change, at int64) string {
	s := ""
	for _, c := range changes {
		if c.off <= at && at < c.end {
			b := byte(0)
			if c.data != nil {
				b = c.data[at-c.off]
			}
			s += fmt.Sprintf(", or %#x", b)
		}
	}
	return s
}
