//go:build linux && amd64

package kvm

import (
	"errors"
	"testing"

	"golang.org/x/sys/unix"
)

// writePages stores to pages 3, 9 and 10, reports, and does it again.
var writePages = []byte{
	0xa2, 0x00, 0x30, // mov [0x3000], al
	0xa2, 0xff, 0x9f, // mov [0x9fff], al
	0xa2, 0x00, 0xa0, // mov [0xa000], al
	0xe6, 0xe1, // out 0xe1, al
	0xeb, 0xf3, // jmp to the beginning
}

const (
	writtenPages = 1<<3 | 1<<9 | 1<<10
	// touchedPages are the written ones and that of the code, which KVM may map
	// writable, and then reports, when the guest first reads it.
	touchedPages = writtenPages | 1<<(codeGPA/pageSize)
)

// checkDirty wants the written pages in a log, and none that was not touched.
func checkDirty(t *testing.T, got uint64) {
	t.Helper()
	if got&writtenPages != writtenPages || got&^touchedPages != 0 {
		t.Fatalf("dirty pages %#x, want %#x, or %#x", got, writtenPages, touchedPages)
	}
}

func TestDirtyLog(t *testing.T) {
	m := newMachine(t, writePages)
	bitmap := make([]uint64, DirtyLogWords(ramSize)+1)
	const sentinel = 0x5555
	bitmap[len(bitmap)-1] = sentinel
	for range 3 {
		m.expectOut(t, 0xe1, 0)
		must(t, m.vm.DirtyLog(0, bitmap))
		checkDirty(t, bitmap[0])
		if bitmap[1] != sentinel {
			t.Fatal("the kernel wrote beyond the bitmap of the region")
		}
		must(t, m.vm.DirtyLog(0, bitmap))
		if bitmap[0] != 0 {
			t.Fatalf("dirty pages %#x after they were read", bitmap[0])
		}
	}
}

func TestClearDirtyLog(t *testing.T) {
	m := newMachine(t, writePages)
	if err := m.sys.Require(CapManualDirtyProtect2); errors.Is(err, errors.ErrUnsupported) {
		t.Skip(err)
	}
	must(t, m.vm.EnableCap(CapManualDirtyProtect2, DirtyLogManualProtect))
	bitmap := make([]uint64, DirtyLogWords(ramSize))
	m.expectOut(t, 0xe1, 0)
	for range 2 { // reading does not forget
		must(t, m.vm.DirtyLog(0, bitmap))
		checkDirty(t, bitmap[0])
	}
	must(t, m.vm.ClearDirtyLog(0, 0, ramSize/pageSize, []uint64{1 << 9}))
	must(t, m.vm.DirtyLog(0, bitmap))
	if bitmap[0]&(1<<9) != 0 {
		t.Fatalf("dirty pages %#x: page 9 was cleared", bitmap[0])
	}
	checkDirty(t, bitmap[0]|1<<9)
	m.expectOut(t, 0xe1, 0)
	must(t, m.vm.DirtyLog(0, bitmap))
	checkDirty(t, bitmap[0]) // page 9 was written again
}

// TestDirtyLogArguments has what would make the kernel write beyond a bitmap.
func TestDirtyLogArguments(t *testing.T) {
	vm := newMachine(t, nil).vm
	if err := vm.DirtyLog(0, nil); !errors.Is(err, ErrShortBuffer) {
		t.Errorf("no bitmap: %v", err)
	}
	if err := vm.ClearDirtyLog(0, 0, 65, make([]uint64, 1)); !errors.Is(err, ErrShortBuffer) {
		t.Errorf("65 pages of one word: %v", err)
	}
	if err := vm.DirtyLog(1, make([]uint64, 1)); !errors.Is(err, ErrNoSlot) {
		t.Errorf("an empty slot: %v", err)
	}
	must(t, vm.SetUserMemoryRegion(0, 0, 0, 0, 0))
	if err := vm.DirtyLog(0, make([]uint64, 1)); !errors.Is(err, ErrNoSlot) {
		t.Errorf("a slot whose region was removed: %v", err)
	}
}

func TestDirtyLogWords(t *testing.T) {
	for size, want := range map[uint64]int{pageSize: 1, 64 * pageSize: 1, 65 * pageSize: 2, 5 << 30: 20480} {
		if got := DirtyLogWords(size); got != want {
			t.Errorf("%#x bytes: %d words, want %d", size, got, want)
		}
	}
}

func TestReadonlyRegionExitsOnWrite(t *testing.T) {
	m := newMachine(t, []byte{
		0xb8, 0x00, 0xe0, // mov ax, 0xe000
		0x8e, 0xd8, // mov ds, ax
		0xa0, 0x05, 0x00, // mov al, [5]
		0xe6, 0xe1, // out 0xe1, al
		0xa2, 0x06, 0x00, // mov [6], al
	})
	if err := m.sys.Require(CapReadonlyMem); errors.Is(err, errors.ErrUnsupported) {
		t.Skip(err)
	}
	m.ram[0xe005] = 0x77 // the last page but one of RAM, seen again at 0xe0000
	must(t, m.vm.SetUserMemoryRegion(1, MemReadonly, 0xe0000, pageSize, uintptr(ramPointer(m, 0xe000))))
	m.expectOut(t, 0xe1, 0x77)
	mm := must1(m.run(t, ExitMMIO).MMIO())(t)
	if !mm.Write || mm.Addr != 0xe0006 || len(mm.Data) != 1 || mm.Data[0] != 0x77 {
		t.Errorf("store to read-only memory: %+v", mm)
	}
}

func TestOverlappingRegions(t *testing.T) {
	m := newMachine(t, nil)
	err := m.vm.SetUserMemoryRegion(1, 0, 0, pageSize, uintptr(ramPointer(m, 0)))
	var ke *Error
	if !errors.As(err, &ke) {
		t.Fatalf("got %v", err)
	}
	if err := m.vm.DirtyLog(1, make([]uint64, 1)); !errors.Is(err, ErrNoSlot) {
		t.Errorf("a region that the kernel refused counts as set: %v", err)
	}
}

// TestUnreadableMemory takes the memory away under a region. Kernels say so in
// different words: none of them may look like a port, a halt or a kick.
func TestUnreadableMemory(t *testing.T) {
	m := newMachine(t, []byte{0xa0, 0x00, 0x90}) // mov al, [0x9000]
	must(t, unix.Mprotect(m.ram[0x9000:0xa000], unix.PROT_NONE))
	var e Exit
	err := error(nil)
	for e.Reason = ExitIntr; e.Reason == ExitIntr && err == nil; {
		e, err = m.vcpu.Run()
	}
	var ke *Error
	switch {
	case errors.As(err, &ke):
		if ke.Op != "KVM_RUN" || !errors.Is(err, unix.EFAULT) {
			t.Errorf("got %v, want EFAULT of KVM_RUN", err)
		}
	case e.Reason == ExitMemoryFault:
		if f := e.MemoryFault(); f.GPA&^(pageSize-1) != 0x9000 {
			t.Errorf("fault at %#x, want page 0x9000", f.GPA)
		}
	default: // an interpreter finds no memory, so takes it for a device
		if mm := must1(e.MMIO())(t); e.Reason != ExitMMIO || mm.Write || mm.Addr != 0x9000 {
			t.Errorf("exit %v, %+v", e.Reason, mm)
		}
	}
}
