package boot

import (
	"encoding/binary"
	"fmt"
	"math"
	"sort"
)

// ELF64 layout (System V ABI, "Object Files"), read by hand: a kernel needs two headers of it, and this way
// every offset and size is checked in one place.
const (
	elfHeaderSize = 64
	elfPhdrSize   = 56
	maxPhdrs      = 128 // kernels have about five

	elfClass64  = 2
	elfLSB      = 1
	etExec      = 2
	etDyn       = 3
	emX86_64    = 62
	ptLoad      = 1
	elfInitrd   = 0x7fffffff // initrd_addr_max of every x86-64 kernel so far
	elfCmdline  = 2047       // COMMAND_LINE_SIZE of x86, without the NUL
	elfAlign    = 0x1000000  // CONFIG_PHYSICAL_ALIGN's upper limit
	elfProtocol = minVersion // what boot_params says in place of a setup header
)

func isELF(head []byte) bool { return len(head) >= 4 && string(head[:4]) == "\x7fELF" }

// parseELF reads an x86-64 vmlinux: PT_LOAD segments go to their physical addresses, and e_entry is the physical
// address of the 64-bit entry, which takes boot_params like a bzImage's.
func parseELF(img Image, head []byte) (*kernel, error) {
	phoff, phnum, err := checkELF(head)
	if err != nil {
		return nil, err
	}
	table := make([]byte, phnum*elfPhdrSize)
	if phoff > uint64(img.Size) || uint64(len(table)) > uint64(img.Size)-phoff {
		return nil, fmt.Errorf("%w: %d bytes, and the program headers are at %#x", ErrTruncated, img.Size, phoff)
	}
	if err := readFull(img, table, int64(phoff), "ELF program headers"); err != nil {
		return nil, err
	}
	k := &kernel{entry: binary.LittleEndian.Uint64(head[24:]), initrdMax: elfInitrd, cmdlineN: elfCmdline}
	var spans []Range
	for ; len(table) > 0; table = table[elfPhdrSize:] {
		span, seg, err := parsePhdr(img, table)
		if err != nil {
			return nil, err
		}
		if span.Len > 0 {
			spans, k.segments = append(spans, span), append(k.segments, seg)
		}
	}
	if k.span, err = cover(spans); err != nil {
		return nil, err
	}
	if !holds(k.segments, k.entry) {
		return nil, fmt.Errorf("%w: entry point %#x is in no loaded segment", ErrMalformed, k.entry)
	}
	k.header = elfSetupHeader()
	return k, nil
}

// checkELF checks the file header and returns where the program headers are, and how many.
func checkELF(head []byte) (phoff uint64, phnum int, err error) {
	if len(head) < elfHeaderSize {
		return 0, 0, fmt.Errorf("%w: %d bytes are no whole ELF header", ErrTruncated, len(head))
	}
	le := binary.LittleEndian
	switch typ, machine := le.Uint16(head[16:]), le.Uint16(head[18:]); {
	case head[4] != elfClass64 || head[5] != elfLSB || machine != emX86_64:
		return 0, 0, &UnsupportedKernelError{What: fmt.Sprintf("an ELF file of class %d, byte order %d, machine %d, and not x86-64",
			head[4], head[5], machine)}
	case typ != etExec && typ != etDyn:
		return 0, 0, &UnsupportedKernelError{What: fmt.Sprintf("an ELF file of type %d, and not executable", typ)}
	}
	phnum = int(le.Uint16(head[56:]))
	if size := le.Uint16(head[54:]); size != elfPhdrSize || phnum == 0 || phnum > maxPhdrs {
		return 0, 0, fmt.Errorf("%w: %d ELF program headers of %d bytes", ErrMalformed, phnum, size)
	}
	return le.Uint64(head[32:]), phnum, nil
}

// parsePhdr reads the program header that p starts with. The span of one that is not loaded has length 0.
func parsePhdr(img Image, p []byte) (Range, segment, error) {
	le := binary.LittleEndian
	off, paddr := le.Uint64(p[8:]), le.Uint64(p[24:])
	filesz, memsz := le.Uint64(p[32:]), le.Uint64(p[40:])
	switch {
	case le.Uint32(p) != ptLoad || memsz == 0:
		return Range{}, segment{}, nil
	case filesz > memsz:
		return Range{}, segment{}, fmt.Errorf("%w: ELF segment at %#x has %d bytes in the file and %d in memory",
			ErrMalformed, paddr, filesz, memsz)
	case paddr > math.MaxUint64-memsz:
		return Range{}, segment{}, fmt.Errorf("%w: ELF segment at %#x of %#x bytes", ErrMalformed, paddr, memsz)
	case off > uint64(img.Size) || filesz > uint64(img.Size)-off:
		return Range{}, segment{}, fmt.Errorf("%w: ELF segment at offset %#x of %#x bytes in a file of %#x",
			ErrTruncated, off, filesz, img.Size)
	}
	return Range{GPA: paddr, Len: memsz}, segment{off: int64(off), gpa: paddr, n: filesz}, nil
}

// cover returns the range from the first to the last of spans, which must not overlap.
func cover(spans []Range) (Range, error) {
	if len(spans) == 0 {
		return Range{}, fmt.Errorf("%w: an ELF file without a loadable segment", ErrMalformed)
	}
	sort.Slice(spans, func(i, j int) bool { return spans[i].GPA < spans[j].GPA })
	for i := range len(spans) - 1 {
		if spans[i].overlaps(spans[i+1]) {
			return Range{}, &OverlapError{A: "ELF segment", B: "ELF segment", ARange: spans[i], BRange: spans[i+1]}
		}
	}
	first, last := spans[0], spans[len(spans)-1]
	return Range{GPA: first.GPA, Len: last.End() - first.GPA}, nil
}

func holds(segs []segment, addr uint64) bool {
	for _, s := range segs {
		if addr >= s.gpa && addr-s.gpa < s.n {
			return true
		}
	}
	return false
}

// elfSetupHeader is the setup header for a kernel that comes without one: what Linux reads of it once it runs.
func elfSetupHeader() []byte {
	h := make([]byte, headerEnd-offSetupSects)
	le := binary.LittleEndian
	le.PutUint16(h[offBootFlag-offSetupSects:], bootFlag)
	copy(h[offMagic-offSetupSects:], headerMagic)
	le.PutUint16(h[offVersion-offSetupSects:], elfProtocol)
	h[offLoadFlags-offSetupSects] = loadedHigh
	le.PutUint32(h[offInitrdMax-offSetupSects:], elfInitrd)
	le.PutUint32(h[offAlignment-offSetupSects:], elfAlign)
	le.PutUint32(h[offCmdlineSize-offSetupSects:], elfCmdline)
	return h
}
