package snapshot

import (
	"bytes"
	"fmt"
	"slices"
)

// Range is a run of guest memory: a guest physical address and a length, both in
// bytes and whole pages. (Of a disk, where it is said: see DiskAddress.)
type Range struct{ GPA, Len uint64 }

// checkRanges checks that ranges are whole pages, ascending and not overlapping,
// and returns how many bytes they cover.
func checkRanges(ranges []Range) (uint64, error) {
	total, end := uint64(0), uint64(0)
	for i, r := range ranges {
		switch {
		case r.GPA%PageSize != 0 || r.Len%PageSize != 0:
			return 0, fmt.Errorf("%w: range %#x+%#x is not made of whole pages", ErrInvalid, r.GPA, r.Len)
		case r.GPA < end:
			return 0, fmt.Errorf("%w: range %d at %#x is not after the one before it", ErrInvalid, i, r.GPA)
		case r.GPA > DiskStride || r.Len > DiskStride-r.GPA:
			return 0, fmt.Errorf("%w: range %#x+%#x is beyond the address space", ErrInvalid, r.GPA, r.Len)
		}
		end = r.GPA + r.Len
		total += r.Len
	}
	return total, nil
}

// overlay returns base with everything inside ranges replaced by top. All three
// are ascending, and top lies inside ranges.
func overlay(base []extent, ranges []Range, top []extent) []extent {
	return merge(subtract(base, ranges), top)
}

// subtract returns what of base lies outside ranges.
func subtract(base []extent, ranges []Range) []extent {
	out := make([]extent, 0, len(base)+len(ranges))
	for _, e := range base {
		for len(ranges) > 0 && (ranges[0].GPA+ranges[0].Len)/PageSize <= e.page {
			ranges = ranges[1:]
		}
		for _, r := range ranges { // usually none or one overlaps
			from, to := r.GPA/PageSize, (r.GPA+r.Len)/PageSize
			if from >= e.end() {
				break
			}
			if from > e.page {
				head := e
				head.count = uint32(from - e.page)
				out = append(out, head)
			}
			cut := uint32(min(to, e.end()) - e.page)
			e.page, e.first, e.count = e.page+uint64(cut), e.first+cut, e.count-cut
			if e.count == 0 {
				break
			}
		}
		if e.count > 0 {
			out = append(out, e)
		}
	}
	return out
}

// merge merges two ascending lists that don't overlap.
func merge(a, b []extent) []extent {
	if len(a) == 0 {
		return b
	}
	out := make([]extent, 0, len(a)+len(b))
	for len(a) > 0 && len(b) > 0 {
		if a[0].page < b[0].page {
			out, a = append(out, a[0]), a[1:]
		} else {
			out, b = append(out, b[0]), b[1:]
		}
	}
	return append(append(out, a...), b...)
}

// compact brings tables into the canonical form of the format: packs ordered by
// id, chunks by pack and offset, extents joined, and nothing that is not used.
// The chunks of each pack must be in the order of their offsets already. It
// changes the slices that it is given.
func compact(packs []packRecord, chunks []chunkRecord, extents []extent) ([]packRecord, []chunkRecord, []extent) {
	usedChunk := make([]bool, len(chunks))
	inPack := make([]uint32, len(packs)) // used chunks of each pack
	for _, e := range extents {
		if !usedChunk[e.chunk] {
			usedChunk[e.chunk] = true
			inPack[chunks[e.chunk].pack]++
		}
	}
	outPacks, newPack, next := compactPacks(packs, inPack)
	total := uint32(0)
	for _, n := range inPack {
		total += n
	}
	outChunks := make([]chunkRecord, total)
	newChunk := make([]uint32, len(chunks))
	for i, c := range chunks {
		if !usedChunk[i] {
			continue
		}
		c.pack = newPack[c.pack]
		newChunk[i] = next[c.pack]
		outChunks[newChunk[i]] = c
		next[c.pack]++
	}
	outExtents := extents[:0]
	for _, e := range extents {
		e.chunk = newChunk[e.chunk]
		if n := len(outExtents); n > 0 && e.continues(outExtents[n-1]) {
			outExtents[n-1].count += e.count
			continue
		}
		outExtents = append(outExtents, e)
	}
	return outPacks, outChunks, outExtents
}

// compactPacks returns the packs that hold chunks, ordered by id, the new index
// of each old one, and the index of the first chunk of each new one.
func compactPacks(packs []packRecord, chunksIn []uint32) (out []packRecord, newIndex, firstChunk []uint32) {
	var order []int
	for i, n := range chunksIn {
		if n > 0 {
			order = append(order, i)
		}
	}
	slices.SortFunc(order, func(a, b int) int { return bytes.Compare(packs[a].id[:], packs[b].id[:]) })
	newIndex = make([]uint32, len(packs))
	at := uint32(0)
	for i, old := range order {
		newIndex[old] = uint32(i)
		out = append(out, packs[old])
		firstChunk = append(firstChunk, at)
		at += chunksIn[old]
	}
	return out, newIndex, firstChunk
}
