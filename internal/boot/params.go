package boot

import "encoding/binary"

// Offsets in struct boot_params (zero-page.rst of Linux).
const (
	offRSDP        = 0x070
	offE820Entries = 0x1e8
	offE820Table   = 0x2d0
	e820EntrySize  = 20
)

// E820Type says what a range of the memory map is (ACPI 6.5, table 15.2).
type E820Type uint32

// The types that are used here.
const (
	E820RAM      E820Type = 1
	E820Reserved E820Type = 2
)

// E820Entry is a range of the memory map that a guest is given.
type E820Entry struct {
	Range
	Type E820Type
}

// E820 is the memory map of a guest with size bytes of memory, ascending. Of the first MiB, [0, 639 KiB) is RAM and the
// rest is reserved, although there is memory behind it: the place of ACPI tables.
func E820(size uint64) []E820Entry {
	low := lowRAM(size).End()
	m := []E820Entry{{Range{0, min(low, lowRAMEnd)}, E820RAM}}
	if low > lowRAMEnd {
		m = append(m, E820Entry{Range{lowRAMEnd, LowEnd - lowRAMEnd}, E820Reserved})
	}
	if low > LowEnd {
		m = append(m, E820Entry{Range{LowEnd, low - LowEnd}, E820RAM})
	}
	if size > holeStart {
		m = append(m, E820Entry{Range{holeEnd, size - holeStart}, E820RAM})
	}
	return m
}

// writeParams writes boot_params: all zero but for the setup header and what the loader has to tell.
func (l *loader) writeParams() error {
	p := make([]byte, pageSize)
	copy(p[offSetupSects:headerEnd], l.kernel.header)
	le := binary.LittleEndian
	le.PutUint16(p[offVidMode:], vidModeNormal)
	p[offLoaderType] = unknownLoader
	p[offLoadFlags] &^= keepSegments | canUseHeap
	le.PutUint32(p[offCmdlinePtr:], cmdlineBase)
	le.PutUint32(p[offRamdiskImage:], uint32(l.initrd.GPA))
	le.PutUint32(p[offRamdiskSize:], uint32(l.initrd.Len))
	// A kernel file has no say in these: a PC, and no further data.
	le.PutUint32(p[offSubarch:], 0)
	le.PutUint64(p[offSubarchData:], 0)
	le.PutUint64(p[offSetupData:], 0)
	le.PutUint64(p[offRSDP:], l.cfg.RSDP)

	m := E820(l.cfg.MemSize)
	p[offE820Entries] = byte(len(m))
	for i, e := range m {
		b := p[offE820Table+i*e820EntrySize:]
		le.PutUint64(b, e.GPA)
		le.PutUint64(b[8:], e.Len)
		le.PutUint32(b[16:], uint32(e.Type))
	}
	return writeAt(l.w, p, paramsBase, "boot_params")
}
