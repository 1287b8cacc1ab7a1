package vmm

import (
	"errors"
	"fmt"
)

// Errors that say why a host can't do what was asked. Each is found with
// errors.Is, and the error that wraps it says what to do.
var (
	// ErrNotSupported: this build has no KVM (it needs Linux on x86-64).
	ErrNotSupported = fmt.Errorf("vmm: needs Linux with KVM on x86-64: %w", errors.ErrUnsupported)
	// ErrNoKVM: the KVM device does not exist.
	ErrNoKVM = errors.New("vmm: no KVM on this host")
	// ErrPermission: the KVM device exists and may not be opened.
	ErrPermission = errors.New("vmm: no permission for KVM")
	// ErrCapability: KVM lacks something that a virtual machine here needs.
	ErrCapability = errors.New("vmm: KVM lacks a capability")
	// ErrInterpreted: this KVM has no hardware virtualization behind it and
	// interprets kernel-mode guest code; an operating system can't run on it.
	ErrInterpreted = errors.New("vmm: this KVM interprets kernel-mode guest code")
	// ErrNoUserfaultfd: guest memory can't be paged in lazily; an eager resume
	// still works.
	ErrNoUserfaultfd = errors.New("vmm: userfaultfd is not available")
	// ErrHostMemory: the guest's memory is larger than the host's.
	ErrHostMemory = errors.New("vmm: not enough host memory for the guest")
	// ErrCPU: the guest was given processor features that this host lacks.
	ErrCPU = errors.New("vmm: this host's CPU lacks what the guest uses")
	// ErrConfig: a Config that makes no machine.
	ErrConfig = errors.New("vmm: invalid configuration")
	// ErrState: a machine state that can't be decoded or does not fit.
	ErrState = errors.New("vmm: invalid machine state")
	// ErrStateVersion: a machine state written by a newer version.
	ErrStateVersion = errors.New("vmm: machine state of a newer version")
)

// Errors that say how a virtual machine ended, or that a call does not fit its
// present state.
var (
	// ErrPowerOff: the guest switched itself off.
	ErrPowerOff = errors.New("vmm: guest powered off")
	// ErrReset: the guest asked for a reset; a new VM has to be made for it.
	ErrReset = errors.New("vmm: guest asked for a reset")
	// ErrTripleFault: the guest's exception handling failed, a processor's
	// equivalent of a crash.
	ErrTripleFault = errors.New("vmm: guest triple fault")
	// ErrEmulation: KVM met an instruction that it can't emulate; see
	// EmulationError.
	ErrEmulation = errors.New("vmm: guest instruction can't be emulated")
	// ErrGuestMemory: guest memory could not be supplied (its snapshot can't be
	// read); the guest was stopped before it saw wrong data.
	ErrGuestMemory = errors.New("vmm: guest memory can't be supplied")
	// ErrRun: KVM_RUN failed, or ended for a reason that no guest should cause.
	ErrRun = errors.New("vmm: vCPU failed")
	// ErrClosed: the VM was closed.
	ErrClosed = errors.New("vmm: VM is closed")
	// ErrRunState: the call needs the VM to be in another state.
	ErrRunState = errors.New("vmm: VM is not in the right state")
)

// HostError says what a host lacks and what to do about it. It unwraps to one of
// the host errors above and, where there is one, to the cause.
type HostError struct {
	Kind  error  // ErrNoKVM, ErrPermission, ErrCapability, ...
	What  string // the device, capability or feature concerned
	Do    string // what the user can do
	Cause error  // may be nil
}

func (e *HostError) Error() string {
	s := e.Kind.Error()
	if e.What != "" {
		s += ": " + e.What
	}
	if e.Cause != nil {
		s += " (" + e.Cause.Error() + ")"
	}
	if e.Do != "" {
		s += "; " + e.Do
	}
	return s
}

func (e *HostError) Unwrap() []error { return withCause(e.Kind, e.Cause) }

// ExitError says how and where a guest ended. It unwraps to ErrPowerOff,
// ErrReset, ErrTripleFault, ErrGuestMemory or ErrRun, and to the cause.
type ExitError struct {
	Kind   error
	VCPU   int    // the vCPU that met it, -1 if none did
	RIP    uint64 // its instruction pointer, if known; AMD processors lose it in a triple fault
	Detail string // what KVM or the device said
	Cause  error  // may be nil
}

func (e *ExitError) Error() string {
	s := e.Kind.Error()
	if e.VCPU >= 0 {
		s += fmt.Sprintf(" (vCPU %d, RIP %#x)", e.VCPU, e.RIP)
	}
	if e.Detail != "" {
		s += ": " + e.Detail
	}
	if e.Cause != nil {
		s += ": " + e.Cause.Error()
	}
	return s
}

func (e *ExitError) Unwrap() []error { return withCause(e.Kind, e.Cause) }

// EmulationError is an ErrEmulation with the instruction that KVM could not
// emulate. Insn holds the bytes at RIP as far as KVM reports them; they are
// guest memory: keep them out of logs that others read.
type EmulationError struct {
	VCPU     int
	RIP      uint64
	Suberror uint32 // KVM_INTERNAL_ERROR_*
	Insn     []byte
}

func (e *EmulationError) Error() string {
	return fmt.Sprintf("%v (vCPU %d, RIP %#x, %d instruction bytes, suberror %d); this KVM may lack hardware virtualization",
		ErrEmulation, e.VCPU, e.RIP, len(e.Insn), e.Suberror)
}

func (e *EmulationError) Unwrap() error { return ErrEmulation }

// CPUError is an ErrCPU with the CPUID leaf that does not fit.
type CPUError struct {
	Leaf, Index uint32
	Register    string // "ebx", "vendor", "family", ...
	Guest, Host uint32 // what the guest was given, what this host offers
}

func (e *CPUError) Error() string {
	return fmt.Sprintf("%v: CPUID leaf %#x.%d %s: guest %#x, host %#x; resume on a host of the same CPU family with at least the same features",
		ErrCPU, e.Leaf, e.Index, e.Register, e.Guest, e.Host)
}

func (e *CPUError) Unwrap() error { return ErrCPU }

func withCause(kind, cause error) []error {
	if cause == nil {
		return []error{kind}
	}
	return []error{kind, cause}
}
