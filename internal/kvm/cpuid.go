//go:build linux && amd64

package kvm

import (
	"errors"
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// maxList bounds the lists that the kernel asks us to enlarge with E2BIG. It
// has at most 256 CPUID leaves and some hundreds of registers.
const maxList = 1 << 14

// Flags of a CPUIDEntry.
const (
	// CPUIDIndexed says that Index is part of the leaf's name.
	CPUIDIndexed = 1 << 0
)

// cpuidList is struct kvm_cpuid2 with its entries, in words: one of header,
// then wordsPerLeaf for each leaf.
type cpuidList []uint64

const wordsPerLeaf = int(cpuidEntrySize / 8)

func newCPUIDList(n int) cpuidList {
	l := make(cpuidList, 1+n*wordsPerLeaf)
	l[0] = uint64(n) // nent; the padding above it is zero
	return l
}

func (l cpuidList) entries() []CPUIDEntry {
	n := (len(l) - 1) / wordsPerLeaf
	if n == 0 {
		return nil
	}
	return unsafe.Slice((*CPUIDEntry)(unsafe.Pointer(&l[1])), n)
}

// leaves returns a copy of the leaves that the header counts. KVM_GET_CPUID2 of
// some kernels does not correct the count, so what it left empty is dropped. A
// leaf of zeroes that has a number is kept: it is an answer.
func (l cpuidList) leaves() []CPUIDEntry {
	var leaves []CPUIDEntry
	for _, e := range l.entries()[:uint32(l[0])] {
		if e != (CPUIDEntry{}) {
			leaves = append(leaves, e)
		}
	}
	return leaves
}

// getCPUID reads a list of unknown length.
func getCPUID(f *file, op string, req uintptr) ([]CPUIDEntry, error) {
	for n := 256; ; n *= 2 {
		l := newCPUIDList(n)
		_, err := ioctlPtr(f, op, req, unsafe.SliceData(l))
		if errors.Is(err, unix.E2BIG) && n < maxList {
			continue
		}
		if err != nil {
			return nil, err
		}
		if nent := int(uint32(l[0])); nent > n {
			return nil, &Error{Op: op, Err: fmt.Errorf("%d leaves in a list of %d: %w", nent, n, ErrShortBuffer)}
		}
		return l.leaves(), nil
	}
}

// CPUID2 returns the CPUID leaves that were set for the vCPU.
func (v *VCPU) CPUID2() ([]CPUIDEntry, error) {
	return getCPUID(&v.f, "KVM_GET_CPUID2", reqGetCPUID2)
}

// SetCPUID2 sets the CPUID leaves that the guest sees. KVM takes it before the
// first Run only, or again with the same content.
func (v *VCPU) SetCPUID2(leaves []CPUIDEntry) error {
	l := newCPUIDList(len(leaves))
	copy(l.entries(), leaves)
	_, err := ioctlPtr(&v.f, "KVM_SET_CPUID2", reqSetCPUID2, unsafe.SliceData(l))
	return err
}
