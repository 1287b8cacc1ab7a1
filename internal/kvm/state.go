//go:build linux && amd64

package kvm

import (
	"encoding/binary"
	"errors"
	"fmt"
	"unsafe"

	gokvm "github.com/bobuhiro11/gokvm/kvm"
	"golang.org/x/sys/unix"
)

// Regs returns the general purpose registers.
func (v *VCPU) Regs() (Regs, error) { return get[Regs](&v.f, "KVM_GET_REGS", reqGetRegs) }

// SetRegs sets the general purpose registers and drops a pending exception.
func (v *VCPU) SetRegs(r Regs) error { return put(&v.f, "KVM_SET_REGS", reqSetRegs, r) }

// Sregs returns segment, control and table registers.
func (v *VCPU) Sregs() (Sregs, error) { return get[Sregs](&v.f, "KVM_GET_SREGS", reqGetSregs) }

// SetSregs sets segment, control and table registers, and the APIC base.
func (v *VCPU) SetSregs(s Sregs) error { return put(&v.f, "KVM_SET_SREGS", reqSetSregs, s) }

// Sregs2PDPtrsValid is the flag of Sregs2 that says that PDptrs is valid.
const Sregs2PDPtrsValid = 1

// Sregs2 is Sregs with the PAE page directory pointers (CapSregs2).
func (v *VCPU) Sregs2() (Sregs2, error) { return get[Sregs2](&v.f, "KVM_GET_SREGS2", reqGetSregs2) }

// SetSregs2 is SetSregs with the PAE page directory pointers (CapSregs2).
func (v *VCPU) SetSregs2(s Sregs2) error { return put(&v.f, "KVM_SET_SREGS2", reqSetSregs2, s) }

// DebugRegs returns the debug registers.
func (v *VCPU) DebugRegs() (DebugRegs, error) {
	return get[DebugRegs](&v.f, "KVM_GET_DEBUGREGS", reqGetDebugRegs)
}

// SetDebugRegs sets the debug registers.
func (v *VCPU) SetDebugRegs(d DebugRegs) error {
	return put(&v.f, "KVM_SET_DEBUGREGS", reqSetDebugRegs, d)
}

// XCRS returns the extended control registers.
func (v *VCPU) XCRS() (XCRS, error) { return get[XCRS](&v.f, "KVM_GET_XCRS", reqGetXCRS) }

// SetXCRS sets the extended control registers.
func (v *VCPU) SetXCRS(x XCRS) error { return put(&v.f, "KVM_SET_XCRS", reqSetXCRS, x) }

// LAPIC returns the registers of the local APIC.
func (v *VCPU) LAPIC() (LAPICState, error) {
	return get[LAPICState](&v.f, "KVM_GET_LAPIC", reqGetLAPIC)
}

// SetLAPIC sets the registers of the local APIC. Its base address is in Sregs.
func (v *VCPU) SetLAPIC(l LAPICState) error { return put(&v.f, "KVM_SET_LAPIC", reqSetLAPIC, l) }

// VCPUEvents returns pending and injected exceptions, interrupts and NMIs.
func (v *VCPU) VCPUEvents() (VCPUEvents, error) {
	return get[VCPUEvents](&v.f, "KVM_GET_VCPU_EVENTS", reqGetVCPUEvents)
}

// SetVCPUEvents sets pending and injected events; its Flags say which of the
// optional fields count.
func (v *VCPU) SetVCPUEvents(e VCPUEvents) error {
	return put(&v.f, "KVM_SET_VCPU_EVENTS", reqSetVCPUEvents, e)
}

// MPState is what a vCPU of a multiprocessor is doing.
type MPState uint32

// States of a vCPU (KVM_MP_STATE_*).
const (
	MPRunnable      = MPState(gokvm.MPStateRunnable)
	MPUninitialized = MPState(gokvm.MPStateUninitialized) // an application processor before INIT
	MPInitReceived  = MPState(gokvm.MPStateInitReceived)
	MPHalted        = MPState(gokvm.MPStateHalted)
	MPSipiReceived  = MPState(gokvm.MPStateSipiReceived)
)

// MPState returns the multiprocessing state. Reading it may settle pending INIT
// and SIPI events and so change other state: read it first.
func (v *VCPU) MPState() (MPState, error) {
	s, err := get[mpState](&v.f, "KVM_GET_MP_STATE", reqGetMPState)
	return MPState(s.state), err
}

// SetMPState sets the multiprocessing state.
func (v *VCPU) SetMPState(s MPState) error {
	return put(&v.f, "KVM_SET_MP_STATE", reqSetMPState, mpState{uint32(s)})
}

// TSCKHz returns the frequency of the guest's time stamp counter.
func (v *VCPU) TSCKHz() (uint32, error) {
	n, err := ioctlVal(&v.f, "KVM_GET_TSC_KHZ", reqGetTSCKHz, 0)
	return uint32(n), err
}

// SetTSCKHz sets the frequency of the guest's time stamp counter. A frequency
// that the host cannot give is refused with EINVAL.
func (v *VCPU) SetTSCKHz(khz uint32) error {
	_, err := ioctlVal(&v.f, fmt.Sprintf("KVM_SET_TSC_KHZ %d", khz), reqSetTSCKHz, uintptr(khz))
	return err
}

// KVMClockCtrl tells the guest through its kvmclock page that it was stopped,
// so that its soft lockup watchdog stays quiet. EINVAL says that the guest has
// no kvmclock page.
func (v *VCPU) KVMClockCtrl() error {
	_, err := ioctlVal(&v.f, "KVM_KVMCLOCK_CTRL", reqKVMClockCtrl, 0)
	return err
}

// XSave returns the floating point, vector and other extended state in the
// layout of the XSAVE instruction, of VM.XSaveSize bytes.
func (v *VCPU) XSave() ([]byte, error) {
	if v.xsaveSize == 0 {
		area := make([]byte, xsaveSize)
		_, err := ioctlPtr(&v.f, "KVM_GET_XSAVE", reqGetXSave, unsafe.SliceData(area))
		return area, err
	}
	area := make([]byte, v.xsaveSize)
	_, err := ioctlPtr(&v.f, "KVM_GET_XSAVE2", reqGetXSave2, unsafe.SliceData(area))
	return area, err
}

// SetXSave sets what XSave returned. The kernel reads VM.XSaveSize bytes, so a
// shorter area is refused; bytes beyond that are ignored.
func (v *VCPU) SetXSave(area []byte) error {
	const op = "KVM_SET_XSAVE"
	if want := max(v.xsaveSize, xsaveSize); len(area) < want {
		return &Error{Op: op, Err: fmt.Errorf("%w: %d bytes, want %d", ErrShortBuffer, len(area), want)}
	}
	_, err := ioctlPtr(&v.f, op, reqSetXSave, unsafe.SliceData(area))
	return err
}

// nestedSizeOffset is the offset of kvm_nested_state.size.
const nestedSizeOffset = 4

// NestedState returns the state of a hypervisor in the guest, as struct
// kvm_nested_state with its data (CapNestedState).
func (v *VCPU) NestedState() ([]byte, error) {
	const op = "KVM_GET_NESTED_STATE"
	for n := nestedHdrSize + 2*pageSize; ; {
		buf := make([]byte, n)
		binary.LittleEndian.PutUint32(buf[nestedSizeOffset:], uint32(n))
		_, err := ioctlPtr(&v.f, op, reqGetNestedState, unsafe.SliceData(buf))
		size := int(binary.LittleEndian.Uint32(buf[nestedSizeOffset:]))
		switch {
		case errors.Is(err, unix.E2BIG) && size > n && size <= maxNested:
			n = size // the kernel's wish
		case err != nil:
			return nil, err
		case size < nestedHdrSize || size > n:
			return nil, &Error{Op: op, Err: fmt.Errorf("a state of %d bytes in %d: %w", size, n, ErrShortBuffer)}
		default:
			return buf[:size], nil
		}
	}
}

// maxNested bounds what the kernel may ask for; it has 128 bytes and two pages.
const maxNested = 1 << 20

// SetNestedState sets what NestedState returned (CapNestedState). The kernel
// reads as much as the state says that it is long, so it must be all there.
func (v *VCPU) SetNestedState(state []byte) error {
	const op = "KVM_SET_NESTED_STATE"
	if len(state) < nestedHdrSize {
		return &Error{Op: op, Err: fmt.Errorf("%w: %d bytes, want %d", ErrShortBuffer, len(state), nestedHdrSize)}
	}
	if size := binary.LittleEndian.Uint32(state[nestedSizeOffset:]); uint64(size) > uint64(len(state)) {
		return &Error{Op: op, Err: fmt.Errorf("%w: %d bytes, want %d", ErrShortBuffer, len(state), size)}
	}
	_, err := ioctlPtr(&v.f, op, reqSetNestedState, unsafe.SliceData(state))
	return err
}
