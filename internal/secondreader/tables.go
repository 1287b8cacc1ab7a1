package secondreader

import (
	"errors"
	"fmt"
)

const endOfAddresses = 1 << 40 // in pages

// check holds the tables against each other and against the header.
func (m *body) check(h *header) error {
	for _, f := range []func(*header) error{m.checkPacks, m.checkChunks, m.checkExtents} {
		if err := f(h); err != nil {
			return err
		}
	}
	return nil
}

func (m *body) checkPacks(h *header) error {
	var own uint64 // at most 2^16 sizes of at most 2^60 bytes: see the check for an overflow
	for i, p := range m.packs {
		if p.id != h.packs[i] {
			return errors.New("pack table: not the header's list")
		}
		if p.origin == h.id {
			if own+p.file < own {
				return errors.New("pack table: sum of the sizes")
			}
			own += p.file
		} else if h.parent == (id{}) {
			return errors.New("pack table: a pack of another snapshot in one without a parent")
		}
	}
	if own != h.packBytes {
		return errors.New("pack table: sum of the sizes")
	}
	return nil
}

func (m *body) checkChunks(*header) error {
	used := make([]bool, len(m.packs))
	var pack uint32
	var end uint64 // of the chunk before, in its pack
	for _, c := range m.chunks {
		if uint64(c.pack) >= uint64(len(m.packs)) || c.pages < 1 || c.pages > 1024 {
			return errors.New("chunk table: pack or pages")
		}
		full := 4096 * c.pages
		switch {
		case c.codec == 1 && c.length == full:
		case c.codec == 2 && c.length < full && uint64(c.length)*255 >= uint64(full):
		default:
			return fmt.Errorf("chunk table: codec %d, %d bytes for %d pages", c.codec, c.length, c.pages)
		}
		if c.pack != pack {
			end = 0
		}
		if c.pack < pack || c.offset < max(end, preamble) {
			return errors.New("chunk table: not in order, or overlapping")
		}
		size := m.packs[c.pack].plain
		if c.offset > size || size-c.offset < uint64(c.length) {
			return errors.New("chunk table: behind the end of the pack")
		}
		used[c.pack], pack, end = true, c.pack, c.offset+uint64(c.length)
	}
	for _, u := range used {
		if !u {
			return errors.New("chunk table: a pack without a chunk")
		}
	}
	return nil
}

func (m *body) checkExtents(h *header) error {
	used := make([]bool, len(m.chunks))
	var sum [2]uint64 // of memory, of disks
	var last extent
	var end uint64
	for _, e := range m.extents {
		last0 := last
		last = e
		if e.pages == 0 || e.page < end || e.page > endOfAddresses || endOfAddresses-e.page < uint64(e.pages) {
			return errors.New("extent table: empty, out of order, overlapping or out of range")
		}
		if uint64(e.chunk) >= uint64(len(m.chunks)) || uint64(e.first)+uint64(e.pages) > uint64(m.chunks[e.chunk].pages) {
			return errors.New("extent table: not inside its chunk")
		}
		end = e.page + uint64(e.pages)
		if e.page/diskPages != (end-1)/diskPages {
			return errors.New("extent table: an extent of two disks")
		}
		continues := last0.pages > 0 && last0.chunk == e.chunk &&
			last0.page+uint64(last0.pages) == e.page && uint64(last0.first)+uint64(last0.pages) == uint64(e.first)
		if continues && e.page%diskPages != 0 {
			return errors.New("extent table: two extents that are one")
		}
		used[e.chunk] = true
		sum[min(e.page/diskPages, 1)] += uint64(e.pages)
	}
	if sum != [2]uint64{h.memoryPages, h.diskPages} {
		return errors.New("extent table: sum of the pages")
	}
	for _, u := range used {
		if !u {
			return errors.New("extent table: a chunk that nothing uses")
		}
	}
	return nil
}
