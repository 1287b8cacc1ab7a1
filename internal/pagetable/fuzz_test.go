package pagetable_test

import (
	"encoding/binary"
	"testing"

	"github.com/cryovisor/cryovisor/internal/pagetable"
)

// translate is the oracle: one address, one entry after the other.
func translate(g guest, ram []pagetable.Range, r pagetable.Root, linear uint64) (gpa uint64, ok bool) {
	inRAM := func(a uint64) bool {
		for _, m := range ram {
			if a >= m.GPA && a < m.GPA+m.Len {
				return true
			}
		}
		return false
	}
	top := 39
	if r.CR4&(1<<12) != 0 {
		top = 48
	}
	if high := int64(linear) >> (top + 8); high != 0 && high != -1 {
		return 0, false // not canonical
	}
	const address = 0xf_ffff_ffff_f000
	table := r.CR3 & address
	for shift := top; ; shift -= 9 {
		if !inRAM(table) {
			return 0, false
		}
		e := binary.LittleEndian.Uint64(g[table+linear>>shift%512*8:])
		size := uint64(1) << shift
		switch {
		case e&present == 0:
			return 0, false
		case shift == 12:
			gpa = e&address + linear%size
			return gpa, inRAM(gpa)
		case e&large == 0:
			table = e & address
			continue
		case shift > 30 || e&address&(size-1)&^page != 0:
			return 0, false
		}
		gpa = e&address&^(size-1) + linear%size
		return gpa, inRAM(gpa)
	}
}

// FuzzWalk: whatever is in memory, what a walk returns is what the processor would find, in order, and all of it unless it says
// otherwise; and the walk ends. The memory is 16 pages with a hole of 4.
func FuzzWalk(f *testing.F) {
	tables := fourLevels()
	tables.set(0x4000, 1, 0x6000|present)
	tables.set(0x4000, 2, 0xf000|present)
	f.Add([]byte(tables[0x1000:]), uint64(0x1000), false, uint64(0x2000))
	tables.set(0x1000, 256, 0x2000|present)
	tables.set(0x1000, 511, 0x1000|present) // itself
	tables.set(0x3000, 3, present|large)
	tables.set(0x2000, 3, present|large|page)
	tables.set(0x5000, 1, 0x1000|present)
	tables.set(0x5000, 511, 0x5000|present)
	f.Add([]byte(tables[0x1000:]), uint64(0x1000), false, uint64(0x600000))
	f.Add([]byte(tables[0x1000:]), uint64(0x5000), true, uint64(0xffff_ff80_0000_2000))
	for i := range 512 {
		tables.set(0x1000, i, 0x1000|present)
	}
	f.Add([]byte(tables[0x1000:]), uint64(0x1000), false, uint64(0x2000))
	f.Add([]byte{}, uint64(1)<<51, true, uint64(0))
	f.Fuzz(func(t *testing.T, content []byte, cr3 uint64, five bool, probe uint64) {
		g := make(guest, 16*page)
		copy(g[0x1000:], content)
		ram := []pagetable.Range{{GPA: 0, Len: 8 * page}, {GPA: 12 * page, Len: 4 * page}}
		root := at(paging4, cr3)
		if five {
			root = at(paging5, cr3)
		}
		limits := pagetable.Limits{Tables: 300, Mappings: 2000}
		got, complete := walk(t, g, ram, limits, root)
		if len(got) > limits.Mappings {
			t.Fatalf("%d mappings", len(got))
		}
		inside := false
		for i, m := range got {
			if i > 0 && got[i-1].Linear+got[i-1].Len-1 >= m.Linear {
				t.Fatalf("%#x after %#x", m, got[i-1])
			}
			for _, off := range []uint64{0, m.Len / 2, m.Len - 1} {
				if gpa, ok := translate(g, ram, root, m.Linear+off); !ok || gpa != m.GPA+off {
					t.Fatalf("%#x is %#x (%v), not %#x", m.Linear+off, gpa, ok, m.GPA+off)
				}
			}
			inside = inside || probe-m.Linear < m.Len
		}
		if _, ok := translate(g, ram, root, probe); complete && ok != inside {
			t.Fatalf("%#x: mapped %v, found %v", probe, ok, inside)
		}
	})
}
