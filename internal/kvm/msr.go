//go:build linux && amd64

package kvm

import "unsafe"

// msrBatch is how many registers go into one request; KVM takes fewer than 256
// (MAX_IO_MSRS in arch/x86/kvm/x86.c).
const msrBatch = 128

// MSRs reads the registers of list, in its order. When KVM refuses one, the
// error is an *MSRError, and the values that were read before it are returned.
func (v *VCPU) MSRs(list []uint32) ([]MSREntry, error) {
	entries := make([]MSREntry, len(list))
	for i, index := range list {
		entries[i].Index = index
	}
	n, err := v.msrs("KVM_GET_MSRS", reqGetMSRs, entries)
	return entries[:n], err
}

// SetMSRs writes the registers in their order. When KVM refuses one, the error
// is an *MSRError; those before it have been written.
func (v *VCPU) SetMSRs(entries []MSREntry) error {
	_, err := v.msrs("KVM_SET_MSRS", reqSetMSRs, entries)
	return err
}

// msrs makes the request for all of entries, in batches, reading values back
// into them for KVM_GET_MSRS. It returns how many were done.
func (v *VCPU) msrs(op string, req uintptr, entries []MSREntry) (int, error) {
	for done := 0; done < len(entries); {
		batch := entries[done:min(done+msrBatch, len(entries))]
		// struct kvm_msrs in words: nmsrs, then an index and a value each.
		words := make([]uint64, 1+2*len(batch))
		words[0] = uint64(len(batch))
		for i, e := range batch {
			words[1+2*i], words[2+2*i] = uint64(e.Index), e.Data
		}
		n, err := ioctlPtr(&v.f, op, req, unsafe.SliceData(words))
		if err != nil {
			return done, err
		}
		if req == reqGetMSRs {
			for i := range batch[:n] {
				batch[i].Data = words[2+2*i]
			}
		}
		if done += n; n < len(batch) {
			return done, &MSRError{Op: op, Index: batch[n].Index, Position: done}
		}
	}
	return len(entries), nil
}
