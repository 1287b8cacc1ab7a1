//go:build linux && amd64

package vmm

import (
	"fmt"
	"sync"

	"github.com/cryovisor/cryovisor/internal/kvm"
	"github.com/cryovisor/cryovisor/memory"
)

// tracking is what TrackDirty has begun. Its lock is not the VM's, which a Pause
// holds while it waits for the vCPUs: pages are taken while it waits, too.
type tracking struct {
	mu     sync.Mutex
	closed bool     // KVM's VM is closed, or is about to be
	log    []uint64 // for KVM's answers, as long as the longest; nil: nothing is tracked
}

// close waits for calls under way and fails later ones.
func (t *tracking) close() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.closed, t.log = true, nil
}

// TrackDirty has the VM note, from now on and until TrackDirty(false), which pages
// of its memory are written: by the guest, by KVM on its behalf, by devices, and
// through Memory. The VM may run or be paused. To call it again with the same
// value does nothing. While a vCPU waits for a page of a snapshot, it waits too.
// Until TrackDirty(false), Memory's TrackWrites and TakeWrites are the VM's.
//
// Each first write to a page costs the guest an exit, anew after every TakeDirty,
// and KVM maps its memory by small pages.
func (vm *VM) TrackDirty(on bool) error {
	t := &vm.track
	t.mu.Lock()
	defer t.mu.Unlock()
	switch {
	case t.closed:
		return ErrClosed
	case on == (t.log != nil):
		return nil
	case on:
		return vm.beginTracking()
	}
	// After an error it is still on, for another try.
	if err := vm.setSlots(0); err != nil {
		return err
	}
	vm.mem.TrackWrites(false)
	t.log = nil
	return nil
}

func (vm *VM) beginTracking() error {
	vm.mem.TrackWrites(true)
	if err := vm.setSlots(kvm.MemLogDirtyPages); err != nil {
		vm.mem.TrackWrites(false)
		_ = vm.setSlots(0) // a log that nobody reads harms nobody
		return err
	}
	longest := uint64(0)
	for _, r := range vm.mem.Ranges() {
		longest = max(longest, r.Len)
	}
	vm.track.log = make([]uint64, kvm.DirtyLogWords(longest))
	return nil
}

// TakeDirty returns the pages written since TrackDirty(true) or the last
// TakeDirty, in ascending order and merged, and forgets them. A page that was only
// read may be among them, the first time. While the VM is paused, no page that was
// written is missing; while it runs, one that is written during the call is in this
// answer or in the next. So read pages after the call that returns them. After an
// error nothing is forgotten. ErrRunState: nothing is tracked.
func (vm *VM) TakeDirty() ([]memory.Range, error) {
	t := &vm.track
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return nil, ErrClosed
	}
	if t.log == nil {
		return nil, fmt.Errorf("%w: its writes are not tracked; call TrackDirty first", ErrRunState)
	}
	// Memory gathers what all have written: what KVM has told and forgotten is
	// there, whatever becomes of the next slot.
	for slot, r := range vm.mem.Ranges() {
		log := t.log[:kvm.DirtyLogWords(r.Len)]
		if err := vm.kvm.DirtyLog(uint32(slot), log); err != nil {
			return nil, err
		}
		if err := vm.mem.NoteWrites(r, log); err != nil {
			return nil, err
		}
	}
	return vm.mem.TakeWrites(), nil
}
