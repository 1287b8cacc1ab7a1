// Package elfcore lays out a machine's memory and processors as an ELF core file, as QEMU's dump-guest-memory does and gdb, crash and
// their like read: a note for each processor, and a segment for each run of memory that one address range shows.
//
// The file begins with room for the headers of as many mappings as there may be, so that these can be found out in the file
// itself; memory follows once, in the order of its addresses. A mapping is one more header, which points into it.
//
// Sources of the layouts and constants: the System V ABI (ELF-64), chapters 4 and 5; for the notes, Linux, include/linux/elfcore.h and
// arch/x86/include/asm/user_64.h, and QEMU, target/i386/arch_dump.c, which is the description of its note.
package elfcore

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
)

// PageSize is what memory is aligned to in the file.
const PageSize = 4096

// Range is a run of guest physical memory, in bytes, of whole pages.
type Range struct{ GPA, Len uint64 }

// Segment says that Len bytes at the virtual address Virtual are the memory from GPA on, which must lie in one Range.
type Segment struct{ Virtual, GPA, Len uint64 }

// Layout says where what lies in a file.
type Layout struct {
	ram   []Range
	notes []byte
	data  int64 // where memory begins
}

// maxHeaders is how many program headers a file has at most: one more would be PN_XNUM, which says that the number is elsewhere.
const maxHeaders = 0xffff - 1

// MaxSegments is how many segments a file can have.
const MaxSegments = maxHeaders - 1 // one header is for the notes

const (
	fileHeaderSize    = 64
	programHeaderSize = 56
)

// ErrSegments says that there are more segments than there is room for.
var ErrSegments = errors.New("elfcore: too many segments")

// NewLayout lays out a file for the memory in ram, which ascends, with room for the headers of up to so many segments.
func NewLayout(cpus []CPU, ram []Range, segments int) (*Layout, error) {
	if segments > MaxSegments {
		return nil, fmt.Errorf("%w: %d, at most %d", ErrSegments, segments, MaxSegments)
	}
	l := &Layout{ram: ram, notes: notes(cpus)}
	headers := fileHeaderSize + programHeaderSize*(1+segments) + len(l.notes)
	l.data = int64(headers+PageSize-1) / PageSize * PageSize
	return l, nil
}

// Size of the file in bytes.
func (l *Layout) Size() int64 {
	size := l.data
	for _, r := range l.ram {
		size += int64(r.Len)
	}
	return size
}

// Offset is where the n bytes of memory at gpa lie in the file; ok is false if they do not lie in one range of memory.
func (l *Layout) Offset(gpa, n uint64) (off int64, ok bool) {
	off = l.data
	for _, r := range l.ram {
		if gpa >= r.GPA && n <= r.Len && gpa-r.GPA <= r.Len-n {
			return off + int64(gpa-r.GPA), true
		}
		off += int64(r.Len)
	}
	return 0, false
}

// Headers is what the file begins with. Readers look for an address in the segments in their order. The first of them should have the
// lowest physical address, as crash takes what lies before its contents for the headers. There is an error if a segment is no memory, or if
// there are more than the layout has room for (ErrSegments).
func (l *Layout) Headers(segments []Segment) ([]byte, error) {
	end := fileHeaderSize + programHeaderSize*(1+len(segments))
	if int64(end+len(l.notes)) > l.data {
		return nil, fmt.Errorf("%w: %d", ErrSegments, len(segments))
	}
	var b bytes.Buffer
	put := func(v any) { _ = binary.Write(&b, binary.LittleEndian, v) } // of fixed size: neither it nor the buffer fails
	put(elf.Header64{
		Ident: [elf.EI_NIDENT]byte{
			0x7f, 'E', 'L', 'F', byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), byte(elf.EV_CURRENT), byte(elf.ELFOSABI_NONE),
		},
		Type: uint16(elf.ET_CORE), Machine: uint16(elf.EM_X86_64), Version: uint32(elf.EV_CURRENT),
		Phoff: fileHeaderSize, Ehsize: fileHeaderSize, Phentsize: programHeaderSize, Phnum: uint16(1 + len(segments)),
	})
	put(elf.Prog64{Type: uint32(elf.PT_NOTE), Off: uint64(end), Filesz: uint64(len(l.notes)), Memsz: uint64(len(l.notes))})
	for _, s := range segments {
		off, ok := l.Offset(s.GPA, s.Len)
		if !ok {
			return nil, fmt.Errorf("elfcore: segment of %d bytes at GPA %#x is not memory", s.Len, s.GPA)
		}
		put(elf.Prog64{
			Type: uint32(elf.PT_LOAD), Flags: uint32(elf.PF_R | elf.PF_W | elf.PF_X),
			Off: uint64(off), Vaddr: s.Virtual, Paddr: s.GPA, Filesz: s.Len, Memsz: s.Len,
		})
	}
	b.Write(l.notes)
	return b.Bytes(), nil
}
