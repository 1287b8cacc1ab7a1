package boot

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"testing"
)

var le = binary.LittleEndian

// guest is guest memory of size bytes that holds only the pages that were written, and refuses what is not RAM.
type guest struct {
	size  uint64
	pages map[uint64][]byte
}

var errNotRAM = errors.New("not RAM")

func newGuest(size uint64) *guest { return &guest{size: size, pages: map[uint64][]byte{}} }

func (g *guest) WriteAt(p []byte, gpa int64) (int, error) {
	a := uint64(gpa)
	if end := min(g.size, 3<<30); gpa < 0 || a > end || uint64(len(p)) > end-a {
		return 0, errNotRAM
	}
	for n := 0; n < len(p); {
		at := a + uint64(n)
		page := g.pages[at/pageSize]
		if page == nil {
			page = make([]byte, pageSize)
			g.pages[at/pageSize] = page
		}
		n += copy(page[at%pageSize:], p[n:])
	}
	return len(p), nil
}

func (g *guest) read(gpa, n uint64) []byte {
	out := make([]byte, n)
	for i := range out {
		if page := g.pages[(gpa+uint64(i))/pageSize]; page != nil {
			out[i] = page[(gpa+uint64(i))%pageSize]
		}
	}
	return out
}

func (g *guest) u64(gpa uint64) uint64 { return le.Uint64(g.read(gpa, 8)) }
func (g *guest) u32(gpa uint64) uint32 { return le.Uint32(g.read(gpa, 4)) }

func image(b []byte) Image { return Image{ReaderAt: bytes.NewReader(b), Size: int64(len(b))} }

// pattern is n bytes that show where they came from.
func pattern(seed byte, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = seed + byte(i*31+i>>8)
	}
	return b
}

const (
	testSetupSects = 1
	testPref       = 16 << 20
	testInitSize   = 4 << 20
	testCmdlineMax = 255
)

// bzImage is a well-formed relocatable kernel of protocol 2.15 with code as its protected-mode part.
func bzImage(code []byte, edit func(b []byte)) []byte {
	b := make([]byte, (testSetupSects+1)*sector)
	b[offSetupSects] = testSetupSects
	le.PutUint32(b[offSysSize:], uint32(len(code)+15)/16)
	le.PutUint16(b[offBootFlag:], bootFlag)
	b[offJump], b[offJump+1] = 0xeb, 0x26c-offMagic
	copy(b[offMagic:], headerMagic)
	le.PutUint16(b[offVersion:], 0x020f)
	b[offLoadFlags] = loadedHigh | keepSegments | canUseHeap
	le.PutUint32(b[offInitrdMax:], 0x7fffffff)
	le.PutUint32(b[offAlignment:], 2<<20)
	b[offRelocatable] = 1
	le.PutUint16(b[offXLoadFlags:], xlfKernel64)
	le.PutUint32(b[offCmdlineSize:], testCmdlineMax)
	le.PutUint32(b[offSubarch:], 7)
	le.PutUint64(b[offSetupData:], 0xdead0000)
	le.PutUint64(b[offPrefAddress:], testPref)
	le.PutUint32(b[offInitSize:], testInitSize)
	le.PutUint32(b[0x268:], 0x1234) // kernel_info_offset: the end of the header
	b[0x26c] = 0xcc                 // code behind the header, which must not reach boot_params
	if edit != nil {
		edit(b)
	}
	return append(b, code...)
}

// phdr is an ELF program header.
type phdr struct {
	typ                       uint32
	off, paddr, filesz, memsz uint64
}

const testELFData = 0x200 // where the data of test ELF files starts

// vmlinux is an ELF file with two segments, the second with bss, and a note.
func vmlinux(entry uint64, data []byte, hdrs []phdr) []byte {
	b := make([]byte, testELFData)
	copy(b, "\x7fELF\x02\x01\x01")
	le.PutUint16(b[16:], etExec)
	le.PutUint16(b[18:], emX86_64)
	le.PutUint64(b[24:], entry)
	le.PutUint64(b[32:], elfHeaderSize)
	le.PutUint16(b[54:], elfPhdrSize)
	le.PutUint16(b[56:], uint16(len(hdrs)))
	for i, h := range hdrs {
		p := b[elfHeaderSize+i*elfPhdrSize:]
		le.PutUint32(p, h.typ)
		le.PutUint64(p[8:], h.off)
		le.PutUint64(p[16:], 0xffffffff80000000+h.paddr)
		le.PutUint64(p[24:], h.paddr)
		le.PutUint64(p[32:], h.filesz)
		le.PutUint64(p[40:], h.memsz)
	}
	return append(b, data...)
}

func testPhdrs() []phdr {
	return []phdr{
		{ptLoad, testELFData, testPref, 0x3000, 0x3000},
		{ptLoad, testELFData + 0x3000, testPref + 0x200000, 0x1000, 0x5000},
		{4, testELFData, 0, 16, 16},
	}
}

type failingReader struct{}

func (failingReader) ReadAt([]byte, int64) (int, error) { return 0, io.ErrClosedPipe }

func wantErr(t *testing.T, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("error is %v, want %v", err, want)
	}
}
