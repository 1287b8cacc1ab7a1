//go:build linux && amd64

package kvm

import (
	"fmt"
	"runtime"
	"unsafe"

	gokvm "github.com/bobuhiro11/gokvm/kvm"
	"golang.org/x/sys/unix"
)

// Flags of a memory region.
const (
	MemLogDirtyPages uint32 = 1 << 0
	MemReadonly      uint32 = 1 << 1 // CapReadonlyMem
)

// Arguments of CapManualDirtyProtect2.
const (
	// DirtyLogManualProtect leaves the write protection of pages to ClearDirtyLog.
	DirtyLogManualProtect = 1 << 0
	// DirtyLogInitiallySet starts a log with every page dirty and none protected.
	DirtyLogInitiallySet = 1 << 1
)

// SetUserMemoryRegion maps size bytes of this process's memory at host to the
// guest physical address gpa, in a slot; all are multiples of the page size.
// The memory must stay mapped until the region is removed, which a size of 0
// does, or the machine is gone. The collector knows nothing of it: host must
// not point into the Go heap.
func (vm *VM) SetUserMemoryRegion(slot, flags uint32, gpa, size uint64, host uintptr) error {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	op := fmt.Sprintf("KVM_SET_USER_MEMORY_REGION slot %d, %#x bytes at %#x", slot, size, gpa)
	err := put(&vm.f, op, reqSetUserMemoryRegion, gokvm.UserspaceMemoryRegion{
		Slot: slot, Flags: flags, GuestPhysAddr: gpa, MemorySize: size, UserspaceAddr: uint64(host),
	})
	if err != nil {
		return err
	}
	if size == 0 {
		delete(vm.slots, slot)
	} else {
		vm.slots[slot] = size
	}
	return nil
}

// DirtyLogWords returns the length of the bitmap that DirtyLog wants for a
// region of size bytes.
func DirtyLogWords(size uint64) int { return int((size/pageSize + 63) / 64) }

// DirtyLog fills bitmap with the pages of the slot's region that the guest has
// written since the last call, the lowest page in bit 0 of word 0, and forgets
// them, unless DirtyLogManualProtect leaves that to ClearDirtyLog. A page that
// the guest only read may be among them when KVM has mapped it writable. Writes
// of this process are not. The region must have been set with
// MemLogDirtyPages: ENOENT otherwise.
func (vm *VM) DirtyLog(slot uint32, bitmap []uint64) error {
	op := fmt.Sprintf("KVM_GET_DIRTY_LOG slot %d", slot)
	vm.mu.Lock() // held during the call: the kernel writes as much as the region is long
	defer vm.mu.Unlock()
	if err := vm.checkLog(op, slot, DirtyLogWords(vm.slots[slot]), bitmap); err != nil {
		return err
	}
	log := dirtyLog{slot: slot, bitmap: unsafe.Pointer(unsafe.SliceData(bitmap))}
	_, err := ioctlPtr(&vm.f, op, reqGetDirtyLog, &log)
	runtime.KeepAlive(bitmap)
	return err
}

// ClearDirtyLog forgets and protects anew the pages whose bits are set in
// bitmap, whose bit 0 is page first of the slot's region; count pages are
// looked at. Both are multiples of 64, but for the end of the region.
func (vm *VM) ClearDirtyLog(slot uint32, first uint64, count uint32, bitmap []uint64) error {
	op := fmt.Sprintf("KVM_CLEAR_DIRTY_LOG slot %d, %d pages from %d", slot, count, first)
	vm.mu.Lock()
	defer vm.mu.Unlock()
	if err := vm.checkLog(op, slot, int((uint64(count)+63)/64), bitmap); err != nil {
		return err
	}
	log := clearDirtyLog{
		slot: slot, numPages: count, firstPage: first,
		bitmap: unsafe.Pointer(unsafe.SliceData(bitmap)),
	}
	_, err := ioctlPtr(&vm.f, op, reqClearDirtyLog, &log)
	runtime.KeepAlive(bitmap)
	return err
}

func (vm *VM) checkLog(op string, slot uint32, words int, bitmap []uint64) error {
	if vm.slots[slot] == 0 {
		return &Error{Op: op, Err: fmt.Errorf("%w: %w", ErrNoSlot, unix.ENOENT)}
	}
	if len(bitmap) < words {
		return &Error{Op: op, Err: fmt.Errorf("%w: a bitmap of %d words, want %d", ErrShortBuffer, len(bitmap), words)}
	}
	return nil
}
