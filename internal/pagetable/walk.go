package pagetable

import (
	"encoding/binary"
	"fmt"
	"io"
)

// Bits of an entry of a table (4.5.4, "Linear-Address Translation with 4-Level Paging and 5-Level Paging", and its tables).
const (
	present     = 1 << 0
	large       = 1 << 7                     // PS: the entry maps memory by itself
	largePAT    = 1 << 12                    // of an entry with PS: a memory type, not a part of the address
	addressMask = (1<<52 - 1) &^ (1<<12 - 1) // bits 51:12
	entries     = pageSize / entrySize       // of a table
	entrySize   = 8
	indexBits   = 9
	offsetBits  = 12
	maxLevels   = 5
)

// Limits bound a walk, which hostile tables can otherwise make as long as they like.
type Limits struct {
	// Tables is how many tables are read, those that are reached several times counted as often.
	Tables int
	// Mappings is how many mappings are returned. Memory for some more is needed to find them.
	Mappings int
}

// Walk returns what the tables of the roots map of a guest's memory, ascending by linear address, not overlapping, and
// merged where they continue one another. Where two roots map the same address, the first of them has it. What they map that is not in ram,
// which ascends, is left out. mem is read at guest physical addresses in ram only.
//
// Where a limit is reached, complete is false, and some mappings are missing; the upper halves of the address spaces, which are the kernel's in all
// operating systems, are walked before the lower halves of any. An error is one of mem's.
func Walk(mem io.ReaderAt, ram []Range, roots []Root, limits Limits) (mappings []Mapping, complete bool, err error) {
	w := &walker{mem: mem, ram: ram, limits: limits}
	walked := make(map[Root]bool)
	for _, upper := range []bool{true, false} {
		clear(walked)
		for _, r := range roots {
			space := Root{CR3: r.top(), CR4: uint64(r.levels())}
			if r.levels() == 0 || walked[space] {
				continue
			}
			walked[space] = true
			if err := w.half(r, upper); err != nil {
				return nil, false, err
			}
		}
	}
	return w.mappings, !w.cut, nil
}

// walker is a Walk under way.
type walker struct {
	mem    io.ReaderAt
	ram    []Range
	limits Limits

	mappings []Mapping // of the halves that have been walked
	found    []Mapping // of the one that is being walked
	tables   int       // that have been read
	stop     bool      // the half that is being walked has reached a limit
	cut      bool      // some half has

	// pages are the tables that are being walked, one of each level. A table that refers to itself is walked again as one of the
	// level below, so it goes no deeper than others.
	pages [maxLevels + 1][pageSize]byte
}

// half walks the upper or the lower half of an address space.
func (w *walker) half(r Root, upper bool) error {
	w.found, w.stop = nil, false
	first, base := 0, uint64(0)
	if upper {
		// Bits above those that are translated are copies of the highest one that is (canonical addresses).
		first, base = entries/2, ^uint64(0)<<(r.levels()*indexBits+offsetBits)
	}
	if err := w.table(r.levels(), r.top(), base, first, first+entries/2); err != nil {
		return err
	}
	all := join(w.mappings, w.found)
	if len(all) > w.limits.Mappings {
		w.limit() // with the first taken out, the second of two address spaces may be in many more pieces
		return nil
	}
	w.mappings = all
	return nil
}

// table walks entries first to end of the table at gpa. base is the linear address that its entry 0 maps.
func (w *walker) table(level int, gpa, base uint64, first, end int) error {
	if !w.inRAM(gpa) {
		return nil
	}
	if w.tables == w.limits.Tables {
		w.limit()
		return nil
	}
	w.tables++
	page := w.pages[level][:]
	if n, err := w.mem.ReadAt(page, int64(gpa)); n < pageSize {
		return fmt.Errorf("page table at GPA %#x: %w", gpa, err)
	}
	shift := offsetBits + (level-1)*indexBits
	for i := first; i < end; i++ {
		e := binary.LittleEndian.Uint64(page[i*entrySize:])
		if e&present == 0 {
			continue
		}
		if err := w.entry(level, e, base+uint64(i)<<shift, 1<<shift); err != nil {
			return err
		}
		if w.stop {
			return nil
		}
	}
	return nil
}

// entry takes an entry that is present and stands for size bytes at linear.
func (w *walker) entry(level int, e, linear, size uint64) error {
	switch {
	case level == 1:
		w.maps(linear, e&addressMask, size)
	case e&large == 0:
		return w.table(level-1, e&addressMask, linear, 0, entries)
	case level <= 3:
		// 2 MiB or 1 GiB. With one of the lower bits set the processor faults, as they are reserved.
		if gpa := e & addressMask &^ largePAT; gpa&(size-1) == 0 {
			w.maps(linear, gpa, size)
		}
	}
	return nil // above that, PS is reserved
}

// maps notes that size bytes at linear show what is at gpa, as far as that is memory.
func (w *walker) maps(linear, gpa, size uint64) {
	for _, r := range w.ram {
		lo, hi := max(gpa, r.GPA), min(gpa+size, r.GPA+r.Len)
		if lo >= hi {
			continue
		}
		found := push(w.found, Mapping{linear + lo - gpa, lo, hi - lo})
		if len(w.mappings)+len(found) > w.limits.Mappings {
			w.limit()
			return
		}
		w.found = found
	}
}

// limit ends the half that is being walked.
func (w *walker) limit() { w.stop, w.cut = true, true }

// inRAM says whether the page at gpa is memory.
func (w *walker) inRAM(gpa uint64) bool {
	for _, r := range w.ram {
		if gpa >= r.GPA && gpa-r.GPA < r.Len {
			return r.Len-(gpa-r.GPA) >= pageSize
		}
	}
	return false
}
