package elfcore_test

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"io"
	"slices"
	"testing"

	"github.com/cryovisor/cryovisor/internal/elfcore"
)

const page = elfcore.PageSize

var le = binary.LittleEndian

// cpu is a processor whose registers all differ.
func cpu(id int) elfcore.CPU {
	n := uint64(id) << 32
	next := func() uint64 { n++; return n * 0x0102_0304_0506_0708 }
	seg := func() elfcore.SegmentReg {
		return elfcore.SegmentReg{Selector: uint32(next() & 0xffff), Limit: uint32(next()), Attributes: uint32(next()), Base: next()}
	}
	return elfcore.CPU{
		ID: id,
		Regs: elfcore.Regs{
			RAX: next(), RBX: next(), RCX: next(), RDX: next(), RSI: next(), RDI: next(), RSP: next(), RBP: next(),
			R8: next(), R9: next(), R10: next(), R11: next(), R12: next(), R13: next(), R14: next(), R15: next(),
			RIP: next(), RFLAGS: next(),
		},
		CS: seg(), DS: seg(), ES: seg(), FS: seg(), GS: seg(), SS: seg(), LDT: seg(), TR: seg(), GDT: seg(), IDT: seg(),
		CR0: next(), CR2: next(), CR3: next(), CR4: next(), KernelGSBase: next(),
		FX: bytes.Repeat([]byte{byte(id + 1)}, elfcore.FXSize),
	}
}

// readNote takes the first note of b apart.
func readNote(t *testing.T, b []byte) (name string, kind uint32, desc, rest []byte) {
	t.Helper()
	if len(b) < 12 {
		t.Fatalf("%d bytes are left", len(b))
	}
	names, descs := int(le.Uint32(b)), int(le.Uint32(b[4:]))
	from := 12 + (names+3)/4*4
	to := from + descs
	return string(b[12:][:names]), le.Uint32(b[8:]), b[from:to], b[(to+3)/4*4:]
}

// words are 64-bit words of b, from an offset on.
func words(b []byte, from int, n int) (out []uint64) {
	for i := range n {
		out = append(out, le.Uint64(b[from+8*i:]))
	}
	return out
}

// TestNotes compares with the structs by their offsets in memory.
func TestNotes(t *testing.T) {
	cpus := []elfcore.CPU{cpu(0), cpu(1)}
	cpus[1].FX = nil
	l, err := elfcore.NewLayout(cpus, []elfcore.Range{{Len: page}}, 1)
	if err != nil {
		t.Fatal(err)
	}
	b, err := l.Headers([]elfcore.Segment{{Len: page}})
	if err != nil {
		t.Fatal(err)
	}
	notes := b[64+2*56:]
	for i, c := range cpus {
		name, kind, d, rest := readNote(t, notes)
		notes = rest
		if name != "CORE\x00" || kind != 1 || len(d) != 336 || le.Uint32(d[32:]) != uint32(i+1) {
			t.Fatalf("note %q of type %d, %d bytes, of thread %d", name, kind, len(d), le.Uint32(d[32:]))
		}
		want := []uint64{
			c.R15, c.R14, c.R13, c.R12, c.RBP, c.RBX, c.R11, c.R10, c.R9, c.R8, c.RAX, c.RCX, c.RDX, c.RSI, c.RDI, 0,
			c.RIP, uint64(c.CS.Selector), c.RFLAGS, c.RSP, uint64(c.SS.Selector), c.FS.Base, c.GS.Base,
			uint64(c.DS.Selector), uint64(c.ES.Selector), uint64(c.FS.Selector), uint64(c.GS.Selector),
		}
		if got := words(d, 112, 27); !slices.Equal(got, want) {
			t.Errorf("registers %x, want %x", got, want)
		}
		if valid := le.Uint32(d[328:]); valid != uint32(1-i) {
			t.Errorf("floating point registers: %d", valid)
		}
		if c.FX == nil {
			continue
		}
		name, kind, d, notes = readNote(t, notes)
		if name != "CORE\x00" || kind != 2 || !bytes.Equal(d, c.FX) {
			t.Errorf("note %q of type %d: %x", name, kind, d)
		}
	}
	for _, c := range cpus {
		name, kind, d, rest := readNote(t, notes)
		notes = rest
		if name != "QEMU\x00" || kind != 0 || len(d) != 440 || le.Uint32(d) != 1 || le.Uint32(d[4:]) != 440 {
			t.Fatalf("note %q of type %d, %d bytes: %x", name, kind, len(d), d[:8])
		}
		want := []uint64{
			c.RAX, c.RBX, c.RCX, c.RDX, c.RSI, c.RDI, c.RSP, c.RBP,
			c.R8, c.R9, c.R10, c.R11, c.R12, c.R13, c.R14, c.R15, c.RIP, c.RFLAGS,
		}
		for _, s := range []elfcore.SegmentReg{c.CS, c.DS, c.ES, c.FS, c.GS, c.SS, c.LDT, c.TR, c.GDT, c.IDT} {
			want = append(want, uint64(s.Limit)<<32|uint64(s.Selector), uint64(s.Attributes), s.Base)
		}
		want = append(want, c.CR0, 0, c.CR2, c.CR3, c.CR4, c.KernelGSBase)
		if got := words(d, 8, len(want)); !slices.Equal(got, want) {
			t.Errorf("state %x, want %x", got, want)
		}
	}
	if len(notes) > 0 {
		t.Errorf("%d bytes follow the notes", len(notes))
	}
}

// TestSegments: several addresses show the same contents, which are in the file once.
func TestSegments(t *testing.T) {
	ram := []elfcore.Range{{GPA: 0, Len: 3 * page}, {GPA: 8 * page, Len: 2 * page}}
	segments := []elfcore.Segment{
		{Virtual: 0, GPA: 0, Len: 3 * page},
		{Virtual: 0x100000, GPA: 8 * page, Len: 2 * page},
		{Virtual: ^uint64(0) - page + 1, GPA: 2 * page, Len: page},
		{Virtual: 0xffff_8000_0000_0000, GPA: 9 * page, Len: page},
	}
	l, err := elfcore.NewLayout([]elfcore.CPU{cpu(0)}, ram, 100)
	if err != nil {
		t.Fatal(err)
	}
	file := make([]byte, l.Size())
	for _, r := range ram {
		for gpa := r.GPA; gpa < r.GPA+r.Len; gpa += page {
			off, ok := l.Offset(gpa, page)
			if !ok || off%page != 0 {
				t.Fatalf("%#x lies at %d, %v", gpa, off, ok)
			}
			le.PutUint64(file[off:], gpa+1)
		}
	}
	headers, err := l.Headers(segments)
	if err != nil {
		t.Fatal(err)
	}
	if first, _ := l.Offset(0, page); int64(len(headers)) > first {
		t.Fatalf("%d bytes of headers before %d", len(headers), first)
	}
	copy(file, headers)
	f, err := elf.NewFile(bytes.NewReader(file))
	if err != nil {
		t.Fatal(err)
	}
	if f.Type != elf.ET_CORE || f.Machine != elf.EM_X86_64 || f.Class != elf.ELFCLASS64 || len(f.Progs) != 1+len(segments) || f.Progs[0].Type != elf.PT_NOTE {
		t.Fatalf("%+v", f)
	}
	for i, s := range segments {
		p := f.Progs[1+i]
		if p.Type != elf.PT_LOAD || p.Vaddr != s.Virtual || p.Paddr != s.GPA || p.Filesz != s.Len || p.Memsz != s.Len {
			t.Errorf("%+v, want %+v", p.ProgHeader, s)
		}
		b, err := io.ReadAll(p.Open())
		if err != nil || uint64(len(b)) != s.Len {
			t.Fatalf("%d bytes, %v", len(b), err)
		}
		for at := uint64(0); at < s.Len; at += page {
			if got := le.Uint64(b[at:]); got != s.GPA+at+1 {
				t.Errorf("segment %d at %#x shows %#x", i, at, got-1)
			}
		}
	}
}

func TestTooManySegments(t *testing.T) {
	ram := []elfcore.Range{{Len: page}}
	if _, err := elfcore.NewLayout(nil, ram, elfcore.MaxSegments+1); !errors.Is(err, elfcore.ErrSegments) {
		t.Errorf("%v", err)
	}
	l, err := elfcore.NewLayout(nil, ram, elfcore.MaxSegments)
	if err != nil {
		t.Fatal(err)
	}
	segments := make([]elfcore.Segment, elfcore.MaxSegments)
	b, err := l.Headers(segments)
	if err != nil || le.Uint16(b[56:]) != 0xfffe {
		t.Errorf("%d segments, %v", le.Uint16(b[56:]), err)
	}
	if l, err = elfcore.NewLayout([]elfcore.CPU{cpu(0)}, ram, 1); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Headers(make([]elfcore.Segment, 100)); !errors.Is(err, elfcore.ErrSegments) {
		t.Errorf("%v", err)
	}
}

func TestSegmentIsMemory(t *testing.T) {
	l, err := elfcore.NewLayout(nil, []elfcore.Range{{GPA: page, Len: 2 * page}, {GPA: 4 * page, Len: page}}, 9)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []elfcore.Segment{
		{GPA: 0, Len: page},
		{GPA: 2 * page, Len: 2 * page},
		{GPA: 3 * page, Len: page},
		{GPA: 5 * page, Len: page},
		{GPA: ^uint64(0) - page + 1, Len: page},
		{GPA: page, Len: ^uint64(0)},
	} {
		if b, err := l.Headers([]elfcore.Segment{s}); err == nil || b != nil {
			t.Errorf("%#x is memory", s)
		}
	}
}
