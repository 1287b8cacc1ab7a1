//go:build linux && amd64

package kvm

import (
	"encoding/binary"
	"errors"
	"slices"
	"testing"
	"unsafe"
)

// mappingSize is what KVM_GET_VCPU_MMAP_SIZE says on x86: kvm_run, the page of
// port data, and that of coalesced MMIO.
const mappingSize = 3 * pageSize

// union makes an Exit whose kvm_run union holds words.
func union(reason ExitReason, words ...uint64) Exit {
	e := Exit{Reason: reason, page: make([]byte, mappingSize)}
	for i, w := range words {
		binary.LittleEndian.PutUint64(e.page[int(unionOffset)+8*i:], w)
	}
	return e
}

// ioWord is the first word of kvm_run.io.
func ioWord(direction, size uint8, port uint16, count uint32) uint64 {
	return uint64(direction) | uint64(size)<<8 | uint64(port)<<16 | uint64(count)<<32
}

func TestDecodeIO(t *testing.T) {
	e := union(ExitIO, ioWord(1, 4, 0xcf8, 3), pageSize)
	copy(e.page[pageSize:], "twelve bytes, and more")
	io := must1(e.IO())(t)
	if !io.Out || io.Port != 0xcf8 || io.Size != 4 || io.Count != 3 || string(io.Data) != "twelve bytes" {
		t.Errorf("%+v", io)
	}
	if cap(io.Data) != 12 {
		t.Error("an append to the data would write to the page")
	}
	io.Data[0] = 'T'
	if e.page[pageSize] != 'T' {
		t.Error("the data is a copy")
	}
	if io := must1(union(ExitIO, ioWord(0, 2, 0x60, 1), mappingSize-2).IO())(t); io.Out || len(io.Data) != 2 {
		t.Errorf("at the end of the mapping: %+v", io)
	}
}

func TestDecodeBadIO(t *testing.T) {
	for name, e := range map[string]Exit{
		"in the header":    union(ExitIO, ioWord(1, 1, 1, 1), runSize-1),
		"beyond the end":   union(ExitIO, ioWord(1, 1, 1, 1), mappingSize),
		"across the end":   union(ExitIO, ioWord(1, 4, 1, 1), mappingSize-3),
		"huge offset":      union(ExitIO, ioWord(1, 1, 1, 1), ^uint64(0)),
		"huge count":       union(ExitIO, ioWord(1, 4, 1, ^uint32(0)), pageSize),
		"no access":        union(ExitIO, ioWord(1, 4, 1, 0), pageSize),
		"accesses of 0":    union(ExitIO, ioWord(1, 0, 1, 1), pageSize),
		"accesses of 3":    union(ExitIO, ioWord(1, 3, 1, 1), pageSize),
		"accesses of 255":  union(ExitIO, ioWord(1, 255, 1, 1), pageSize),
		"offset in header": union(ExitIO, ioWord(1, 1, 1, 1), 0),
	} {
		if io, err := e.IO(); !errors.Is(err, ErrBadExit) {
			t.Errorf("%s: %+v, %v", name, io, err)
		}
	}
}

func TestDecodeMMIO(t *testing.T) {
	e := union(ExitMMIO, 0xd0000040, 0x8877665544332211, 1<<32|4)
	m := must1(e.MMIO())(t)
	if !m.Write || m.Addr != 0xd0000040 || !slices.Equal(m.Data, []byte{0x11, 0x22, 0x33, 0x44}) || cap(m.Data) != 4 {
		t.Errorf("%+v", m)
	}
	if m := must1(union(ExitMMIO, 1, 2, 8).MMIO())(t); m.Write || len(m.Data) != 8 {
		t.Errorf("%+v", m)
	}
	for _, n := range []uint64{0, 9, 1 << 31} {
		if m, err := union(ExitMMIO, 1, 2, n).MMIO(); !errors.Is(err, ErrBadExit) {
			t.Errorf("%d bytes: %+v, %v", n, m, err)
		}
	}
}

func TestDecodeInternalError(t *testing.T) {
	insn := func(size byte) []uint64 {
		b := []byte{size, 0x0f, 0xae, 0x20, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}
		return []uint64{binary.LittleEndian.Uint64(b), binary.LittleEndian.Uint64(b[8:])}
	}
	head := func(suberror uint32, ndata uint64) uint64 { return uint64(suberror) | ndata<<32 }
	for name, c := range map[string]struct {
		words []uint64
		insn  []byte
		ndata int
	}{
		"three bytes":       {append([]uint64{head(1, 3), 1}, insn(3)...), []byte{0x0f, 0xae, 0x20}, 3},
		"impossible length": {append([]uint64{head(1, 3), 1}, insn(200)...), []byte{0x0f, 0xae, 0x20, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, 3},
		"flag not set":      {append([]uint64{head(1, 3), 2}, insn(3)...), nil, 3},
		"too few words":     {append([]uint64{head(1, 2), 1}, insn(3)...), nil, 2},
		"other suberror":    {append([]uint64{head(3, 4), 1}, insn(3)...), nil, 4},
		"too many words":    {[]uint64{head(4, 1<<31)}, nil, 16},
	} {
		ie := union(ExitInternalError, c.words...).InternalError()
		if !slices.Equal(ie.Insn, c.insn) || len(ie.Data) != c.ndata || uint64(ie.Suberror) != c.words[0]&0xff {
			t.Errorf("%s: %+v", name, ie)
		}
	}
}

func TestDecodeOthers(t *testing.T) {
	if f := union(ExitFailEntry, 0x80000021, 3).FailEntry(); f != (FailEntry{Reason: 0x80000021, CPU: 3}) {
		t.Errorf("%+v", f)
	}
	if r := union(ExitUnknown, 77).HardwareReason(); r != 77 {
		t.Errorf("hardware reason %d", r)
	}
	s := union(ExitSystemEvent, EventReset|2<<32, 10, 11, 12).SystemEvent()
	if s.Type != EventReset || !slices.Equal(s.Data, []uint64{10, 11}) {
		t.Errorf("%+v", s)
	}
	if s := union(ExitSystemEvent, EventCrash|1<<63).SystemEvent(); len(s.Data) != 16 {
		t.Errorf("%+v", s)
	}
	if f := union(ExitMemoryFault, 1, 0x5000, pageSize).MemoryFault(); f != (MemoryFault{1, 0x5000, pageSize}) {
		t.Errorf("%+v", f)
	}
}

func TestNames(t *testing.T) {
	for got, want := range map[string]string{
		ExitMMIO.String():           "KVM_EXIT_MMIO",
		ExitReason(33).String():     "KVM_EXIT_33",
		CapXSave2.String():          "CapXSave2",
		CapMemoryFaultInfo.String(): "CapMemoryFaultInfo",
		Cap(1000).String():          "Cap(1000)",
	} {
		if got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}

// FuzzExit decodes a kvm_run page of any content: what comes back lies within
// the page, and behind its header where the guest's data is.
func FuzzExit(f *testing.F) {
	f.Add(union(ExitIO, ioWord(1, 4, 0xcf8, 3), pageSize).page[unionOffset:][:48])
	f.Add(union(ExitMMIO, 0xd0000040, 1, 1<<32|4).page[unionOffset:][:48])
	f.Add(union(ExitInternalError, 1|3<<32, 1, 0xcc01).page[unionOffset:][:48])
	f.Fuzz(func(t *testing.T, data []byte) {
		e := union(ExitUnknown)
		copy(e.page[unionOffset:], data[:min(len(data), 256)])
		within := func(b []byte, from, to uintptr) {
			t.Helper()
			start := uintptr(unsafe.Pointer(&b[0])) - uintptr(unsafe.Pointer(&e.page[0]))
			if start < from || start+uintptr(cap(b)) > to {
				t.Errorf("%d bytes at %#x, outside [%#x, %#x)", cap(b), start, from, to)
			}
		}
		if io, err := e.IO(); err == nil {
			within(io.Data, runSize, mappingSize)
			if len(io.Data) != io.Size*io.Count {
				t.Errorf("%d bytes for %d times %d", len(io.Data), io.Count, io.Size)
			}
		}
		if m, err := e.MMIO(); err == nil {
			within(m.Data, mmioDataOffset, mmioDataOffset+8)
		}
		if ie := e.InternalError(); len(ie.Data) > 16 || len(ie.Insn) > insnMax {
			t.Errorf("%+v", ie)
		}
		if s := e.SystemEvent(); len(s.Data) > 16 {
			t.Errorf("%+v", s)
		}
	})
}
