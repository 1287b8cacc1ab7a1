//go:build linux && amd64

package kvm

import (
	"errors"
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// VM is a virtual machine. Its methods may be called by several goroutines,
// Close excepted.
type VM struct {
	f         file
	mmapSize  int
	xsaveSize int // of KVM_GET_XSAVE2 in bytes; 0: the kernel has only KVM_GET_XSAVE

	mu    sync.Mutex
	slots map[uint32]uint64 // size in bytes of the region in each slot
}

// Close releases the machine's descriptor. The kernel keeps the machine until
// its vCPUs are closed too.
func (vm *VM) Close() error { return vm.f.close("VM") }

// CheckExtension is System.CheckExtension for this machine, whose answer may
// be narrower.
func (vm *VM) CheckExtension(c Cap) (int, error) {
	return ioctlVal(&vm.f, "KVM_CHECK_EXTENSION "+c.String(), reqCheckExtension, uintptr(c))
}

// EnableCap enables a capability of the machine with up to four arguments.
func (vm *VM) EnableCap(c Cap, args ...uint64) error {
	op := "KVM_ENABLE_CAP " + c.String()
	e := enableCap{cap: uint32(c)}
	if len(args) > len(e.args) {
		return &Error{Op: op, Err: fmt.Errorf("%d arguments: %w", len(args), unix.EINVAL)}
	}
	copy(e.args[:], args)
	return put(&vm.f, op, reqEnableCap, e)
}

// XSaveSize returns the size in bytes of the area that VCPU.XSave returns and
// VCPU.SetXSave wants.
func (vm *VM) XSaveSize() int { return max(vm.xsaveSize, xsaveSize) }

// SetTSSAddr gives KVM three pages of guest physical addresses, below 4 GiB
// and outside RAM, for its own use on Intel processors.
func (vm *VM) SetTSSAddr(gpa uint32) error {
	_, err := ioctlVal(&vm.f, "KVM_SET_TSS_ADDR", reqSetTSSAddr, uintptr(gpa))
	return err
}

// SetIdentityMapAddr gives KVM one page of guest physical addresses, below
// 4 GiB and outside RAM, for its own use on Intel processors. It must come
// before the first vCPU.
func (vm *VM) SetIdentityMapAddr(gpa uint64) error {
	return put(&vm.f, "KVM_SET_IDENTITY_MAP_ADDR", reqSetIdentityMapAddr, gpa)
}

// SetBootCPUID says which vCPU is the bootstrap processor (0 unless set). It
// must come before the first vCPU.
func (vm *VM) SetBootCPUID(id int) error {
	_, err := ioctlVal(&vm.f, "KVM_SET_BOOT_CPU_ID", reqSetBootCPUID, uintptr(id))
	return err
}

// CreateVCPU adds the processor with the given id, which is its APIC id too,
// and maps its kvm_run page. The interrupt controllers must exist before it.
func (vm *VM) CreateVCPU(id int) (*VCPU, error) {
	op := fmt.Sprintf("KVM_CREATE_VCPU %d", id)
	fd, err := ioctlVal(&vm.f, op, reqCreateVCPU, uintptr(id))
	if err != nil {
		return nil, err
	}
	v := &VCPU{id: id, xsaveSize: vm.xsaveSize}
	v.f.set(fd)
	page, err := unix.Mmap(fd, 0, vm.mmapSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, errors.Join(&Error{Op: op + ": mmap kvm_run", Err: os.NewSyscallError("mmap", err)}, v.Close())
	}
	v.page = page
	// It has what the guest reads and writes by ports, which has no place in a core dump, as guest memory has none.
	if err := unix.Madvise(page, unix.MADV_DONTDUMP); err != nil {
		return nil, errors.Join(&Error{Op: op + ": madvise kvm_run", Err: os.NewSyscallError("madvise", err)}, v.Close())
	}
	return v, nil
}

// Flags of ClockData.
const (
	ClockTSCStable = 2      // every vCPU sees the same clock
	ClockRealtime  = 1 << 2 // Realtime is valid
	ClockHostTSC   = 1 << 3 // HostTSC is valid
)

// Clock returns kvmclock as the guest sees it.
func (vm *VM) Clock() (ClockData, error) {
	return get[ClockData](&vm.f, "KVM_GET_CLOCK", reqGetClock)
}

// SetClock sets kvmclock. With flags 0 the guest's clock goes on from c.Clock;
// with ClockRealtime KVM adds the wall time that has passed since c.Realtime.
// Flags that the kernel only reports are refused with EINVAL.
func (vm *VM) SetClock(c ClockData) error {
	return put(&vm.f, "KVM_SET_CLOCK", reqSetClock, c)
}
