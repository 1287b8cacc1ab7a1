package boot

import "fmt"

// Range is Len bytes of guest memory from guest physical address GPA on.
type Range struct{ GPA, Len uint64 }

// End is the address behind the range.
func (r Range) End() uint64 { return r.GPA + r.Len }

func (r Range) String() string { return fmt.Sprintf("[%#x, %#x)", r.GPA, r.End()) }

func (r Range) overlaps(o Range) bool { return r.GPA < o.End() && o.GPA < r.End() }

const (
	pageSize = 4 << 10
	// holeStart and holeEnd bound the 32-bit hole, which is never RAM.
	holeStart = 3 << 30
	holeEnd   = 4 << 30
	// maxMemory is what four levels of page tables can map, and some: Linux maps half of it.
	maxMemory = 1 << 47
)

// Guest memory below 1 MiB. Linux gives none of [0, 640 KiB) back before it has copied what it needs from there, and
// is told to leave the rest alone.
const (
	gdtBase     = 0x1000  // GDT and TSS
	paramsBase  = 0x2000  // struct boot_params, one page
	stackTop    = 0x8000  // the first vCPU's stack grows down from here
	cmdlineBase = 0x10000 // command line
	cmdlineRoom = 0x10000
	tablesBase  = 0x20000 // page tables: PML4, PDPT, then a page directory per GiB
	lowRAMEnd   = 0x9fc00 // where the extended BIOS data area of a PC starts

	// ACPIBase and ACPIEnd bound memory that kernels are told to leave alone, for ACPI tables.
	ACPIBase = 0xe0000
	ACPIEnd  = 0xff000

	// resetVector is where a PC's firmware starts, in real mode.
	resetVector = 0xffff0

	// LowEnd is where images may be loaded from: everything below it is the loader's, or reserved.
	LowEnd = 0x100000
)

// MaxIdentityMap is the memory in bytes that LoadFlat can map.
const MaxIdentityMap = maxGiB << 30

const (
	bootGiB = 4  // what Linux gets mapped: it maps more by itself
	maxGiB  = 64 // what fits below lowRAMEnd
)

// LowUsed is the part of guest memory below 1 MiB that Load and LoadFlat write, but for the 16 bytes below 1 MiB that
// Config.Reset asks for.
func LowUsed() Range {
	return Range{GPA: gdtBase, Len: tablesBase + (2+maxGiB)*pageSize - gdtBase}
}

// lowRAM is the RAM below the 32-bit hole of a guest with size bytes.
func lowRAM(size uint64) Range { return Range{Len: min(size, holeStart)} }

// checkSpan checks that r lies in RAM below the 32-bit hole and above the low structures.
func checkSpan(what string, r, ram Range) error {
	if r.GPA < LowEnd {
		return &OverlapError{A: what, B: "low memory", ARange: r, BRange: Range{Len: LowEnd}}
	}
	if r.GPA > ram.End() || r.Len > ram.End()-r.GPA {
		return &TooLargeError{What: what + " at " + r.String(), Need: r.Len, Have: ram.End() - min(r.GPA, ram.End())}
	}
	return nil
}
