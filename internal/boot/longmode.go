package boot

import (
	"encoding/binary"
	"fmt"
	"io"
)

// CPU is the registers with which a vCPU starts; those that are not here are zero.
type CPU struct {
	RIP, RSP, RSI, RFLAGS uint64

	CR0, CR3, CR4, EFER uint64

	CS, DS, ES, FS, GS, SS Segment
	TR, LDT                Segment
	GDT, IDT               Table
}

// Segment is a segment register with its hidden part (Intel SDM volume 3, 3.4.5), field by field.
type Segment struct {
	Base             uint64
	Limit            uint32 // in bytes, whatever G says
	Selector         uint16
	Type             uint8
	Present          bool
	DPL              uint8
	DB, S, L, G, AVL bool
	Unusable         bool
}

// Table is GDTR or IDTR.
type Table struct {
	Base  uint64
	Limit uint16
}

// Control register bits (Intel SDM volume 3, 2.5 and 2.2.1).
const (
	cr0PE = 1 << 0
	cr0MP = 1 << 1
	cr0ET = 1 << 4
	cr0NE = 1 << 5
	cr0WP = 1 << 16
	cr0PG = 1 << 31

	cr4PAE        = 1 << 5
	cr4OSFXSR     = 1 << 9
	cr4OSXMMEXCPT = 1 << 10

	eferLME = 1 << 8
	eferLMA = 1 << 10

	rflagsFixed = 1 << 1
)

// Selectors: the first two are the boot protocol's __BOOT_CS and __BOOT_DS.
const (
	selCode = 0x10
	selData = 0x18
	selTSS  = 0x20
)

const (
	tssOffset = 0x100 // from gdtBase
	tssSize   = 0x68
	idtNone   = 0
)

// Page table entry bits.
const (
	ptePresent  = 1 << 0
	pteWritable = 1 << 1
	pteLarge    = 1 << 7
	largePage   = 2 << 20
	pteCount    = 512
)

// Flat is an image without any header, which starts in 64-bit mode at CPL 0.
type Flat struct {
	Image   Image
	Base    uint64 // address to load it at: LowEnd or above, below the 32-bit hole
	Entry   uint64 // address of its first instruction
	MemSize uint64 // memory of the guest in bytes
}

// LoadFlat puts f.Image into w (as Load does, with the same errors) and returns the registers of vCPU 0: flat segments,
// interrupts off, no IDT, SSE on, a stack below 32 KiB, and guest memory, the 32-bit hole included, mapped at its
// physical address by writable supervisor pages of 2 MiB, 4 GiB of addresses at least and MaxIdentityMap at most. The
// tables are in the range that LowUsed returns.
func LoadFlat(w io.WriterAt, f Flat) (CPU, error) {
	if f.Image.ReaderAt == nil || f.Image.Size <= 0 {
		return CPU{}, fmt.Errorf("%w: the flat image is empty", ErrMalformed)
	}
	span := Range{GPA: f.Base, Len: uint64(f.Image.Size)}
	if err := checkSpan("flat image", span, lowRAM(f.MemSize)); err != nil {
		return CPU{}, err
	}
	if f.Entry < span.GPA || f.Entry >= span.End() {
		return CPU{}, fmt.Errorf("%w: entry point %#x is outside the flat image at %s", ErrMalformed, f.Entry, span)
	}
	top := f.MemSize
	if top > holeStart {
		top += holeEnd - holeStart
	}
	if top < f.MemSize || top > MaxIdentityMap {
		return CPU{}, &TooLargeError{What: "identity map of guest memory", Need: top, Have: MaxIdentityMap}
	}
	if err := copyIn(w, f.Base, f.Image, 0, span.Len, "flat image"); err != nil {
		return CPU{}, err
	}
	c, err := writeLongMode(w, max(bootGiB, int((top+1<<30-1)>>30)))
	if err != nil {
		return CPU{}, err
	}
	c.CR0 |= cr0MP | cr0WP
	c.CR4 |= cr4OSFXSR | cr4OSXMMEXCPT
	c.RIP, c.RSP = f.Entry, stackTop
	return c, nil
}

// writeLongMode writes a GDT, a TSS and an identity map of the first gib GiB, and returns registers that use them.
func writeLongMode(w io.WriterAt, gib int) (CPU, error) {
	c := CPU{
		RFLAGS: rflagsFixed,
		CR0:    cr0PE | cr0ET | cr0NE | cr0PG,
		CR3:    tablesBase,
		CR4:    cr4PAE,
		EFER:   eferLME | eferLMA,
		CS:     Segment{Limit: 0xffffffff, Selector: selCode, Type: 0xb, Present: true, S: true, L: true, G: true},
		TR:     Segment{Base: gdtBase + tssOffset, Limit: tssSize - 1, Selector: selTSS, Type: 0xb, Present: true},
		LDT:    Segment{Unusable: true},
		GDT:    Table{Base: gdtBase, Limit: selTSS + 16 - 1},
		IDT:    Table{Limit: idtNone},
	}
	data := Segment{Limit: 0xffffffff, Selector: selData, Type: 0x3, Present: true, DB: true, S: true, G: true}
	c.DS, c.ES, c.FS, c.GS, c.SS = data, data, data, data, data

	gdt := make([]byte, tssOffset+tssSize)
	le := binary.LittleEndian
	le.PutUint64(gdt[selCode:], c.CS.descriptor())
	le.PutUint64(gdt[selData:], data.descriptor())
	le.PutUint64(gdt[selTSS:], c.TR.descriptor()) // and its upper half is zero: the base is below 4 GiB
	if err := writeAt(w, gdt, gdtBase, "GDT"); err != nil {
		return CPU{}, err
	}
	return c, writeAt(w, identityMap(gib), tablesBase, "page tables")
}

// descriptor is s as an entry of a GDT (Intel SDM volume 3, figure 3-8).
func (s Segment) descriptor() uint64 {
	limit := uint64(s.Limit)
	if s.G {
		limit >>= 12
	}
	bit := func(b bool, n int) uint64 {
		if b {
			return 1 << n
		}
		return 0
	}
	return limit&0xffff | s.Base&0xffffff<<16 | uint64(s.Type)<<40 | bit(s.S, 44) | uint64(s.DPL)<<45 | bit(s.Present, 47) |
		limit>>16&0xf<<48 | bit(s.AVL, 52) | bit(s.L, 53) | bit(s.DB, 54) | bit(s.G, 55) | s.Base>>24&0xff<<56
}

// identityMap is the page tables, from tablesBase on, of the first gib GiB.
func identityMap(gib int) []byte {
	t := make([]byte, (2+gib)*pageSize)
	le := binary.LittleEndian
	const table = ptePresent | pteWritable
	le.PutUint64(t, tablesBase+pageSize|table)
	for g := range gib {
		le.PutUint64(t[pageSize+8*g:], uint64(tablesBase+(2+g)*pageSize)|table)
	}
	for i := range gib * pteCount {
		le.PutUint64(t[2*pageSize+8*i:], uint64(i)*largePage|table|pteLarge)
	}
	return t
}
