package lifecycle

import (
	"cmp"
	"slices"

	"github.com/cryovisor/cryovisor/blockdev"
	"github.com/cryovisor/cryovisor/memory"
	"github.com/cryovisor/cryovisor/snapshot"
)

// Lists of ranges are ascending, and their ranges do not overlap.

func memoryRanges(in []memory.Range) []snapshot.Range {
	out := make([]snapshot.Range, len(in))
	for i, r := range in {
		out[i] = snapshot.Range(r)
	}
	return out
}

func diskRanges(in []blockdev.Extent) []snapshot.Range {
	out := make([]snapshot.Range, len(in))
	for i, e := range in {
		out[i] = snapshot.Range{GPA: uint64(e.Off), Len: uint64(e.Len)}
	}
	return out
}

func guestRanges(in []snapshot.Range) []memory.Range {
	out := make([]memory.Range, len(in))
	for i, r := range in {
		out[i] = memory.Range(r)
	}
	return out
}

func diskExtents(in []snapshot.Range) []blockdev.Extent {
	out := make([]blockdev.Extent, len(in))
	for i, r := range in {
		out[i] = blockdev.Extent{Off: int64(r.GPA), Len: int64(r.Len)}
	}
	return out
}

// size is how many bytes ranges cover.
func size(ranges []snapshot.Range) (n uint64) {
	for _, r := range ranges {
		n += r.Len
	}
	return n
}

// merge orders ranges and joins those that touch or overlap.
func merge(ranges []snapshot.Range) []snapshot.Range {
	slices.SortFunc(ranges, func(a, b snapshot.Range) int { return cmp.Compare(a.GPA, b.GPA) })
	out := ranges[:0]
	for _, r := range ranges {
		if n := len(out); n > 0 && r.GPA <= out[n-1].GPA+out[n-1].Len {
			out[n-1].Len = max(out[n-1].Len, r.GPA+r.Len-out[n-1].GPA)
			continue
		}
		out = append(out, r)
	}
	return out
}

// split returns what of in is in by, and what is not.
func split(in, by []snapshot.Range) (inside, outside []snapshot.Range) {
	for _, r := range in {
		for len(by) > 0 && by[0].GPA+by[0].Len <= r.GPA {
			by = by[1:]
		}
		end := r.GPA + r.Len
		for _, o := range by {
			if o.GPA >= end {
				break
			}
			if o.GPA > r.GPA {
				outside = append(outside, snapshot.Range{GPA: r.GPA, Len: o.GPA - r.GPA})
				r.GPA = o.GPA
			}
			to := min(end, o.GPA+o.Len)
			inside = append(inside, snapshot.Range{GPA: r.GPA, Len: to - r.GPA})
			r.GPA = to
		}
		if r.GPA < end {
			outside = append(outside, snapshot.Range{GPA: r.GPA, Len: end - r.GPA})
		}
	}
	return inside, outside
}
