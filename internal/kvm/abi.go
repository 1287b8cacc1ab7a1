//go:build linux && amd64

package kvm

import (
	"unsafe"

	gokvm "github.com/bobuhiro11/gokvm/kvm"
)

// ABI structs whose layout in gokvm is that of the kernel. Names of fields are
// gokvm's.
type (
	// Regs are the general purpose registers (struct kvm_regs).
	Regs = gokvm.Regs
	// Sregs are segment, control and table registers (struct kvm_sregs).
	Sregs = gokvm.Sregs
	// Sregs2 are Sregs with the page directory pointers of PAE paging in
	// place of the interrupt bitmap (struct kvm_sregs2, CapSregs2).
	Sregs2 = gokvm.SRegs2
	// Segment is a segment register with its hidden part (struct kvm_segment).
	Segment = gokvm.Segment
	// Descriptor is GDTR or IDTR (struct kvm_dtable).
	Descriptor = gokvm.Descriptor
	// DebugRegs are DR0-DR3, DR6 and DR7 (struct kvm_debugregs).
	DebugRegs = gokvm.DebugRegs
	// XCRS are the extended control registers (struct kvm_xcrs).
	XCRS = gokvm.XCRS
	// LAPICState is the register page of a local APIC (struct kvm_lapic_state).
	LAPICState = gokvm.LAPICState
	// VCPUEvents are pending and injected events (struct kvm_vcpu_events).
	VCPUEvents = gokvm.VCPUEvents
	// CPUIDEntry is one CPUID leaf (struct kvm_cpuid_entry2).
	CPUIDEntry = gokvm.CPUIDEntry2
	// MSREntry is a model specific register with its value (struct kvm_msr_entry).
	MSREntry = gokvm.MSREntry
	// PITState is the i8254 timer (struct kvm_pit_state2).
	PITState = gokvm.PITState2
	// IRQChipState is one interrupt controller, named by its ChipID: the state
	// of a PIC or of the IOAPIC (struct kvm_irqchip).
	IRQChipState = gokvm.IRQChip
	// ClockData is kvmclock: Clock and Realtime in nanoseconds (struct kvm_clock_data).
	ClockData = gokvm.ClockData
)

// Sizes in bytes.
const (
	pageSize       = 4096
	runSize        = 2352 // sizeof(struct kvm_run)
	xsaveSize      = 4096 // the region of struct kvm_xsave, without its extra bytes
	nestedHdrSize  = 128  // struct kvm_nested_state without data
	cpuidEntrySize = unsafe.Sizeof(CPUIDEntry{})
)

// irqLevel is struct kvm_irq_level.
type irqLevel struct {
	irq   uint32
	level uint32
}

// pitConfig is struct kvm_pit_config.
type pitConfig struct {
	flags uint32
	_     [15]uint32
}

// irqRoutingEntry is struct kvm_irq_routing_entry; u is its union, of which
// irqchip takes two words and msi four.
type irqRoutingEntry struct {
	gsi   uint32
	kind  uint32
	flags uint32
	_     uint32
	u     [8]uint32
}

// irqfd is struct kvm_irqfd.
type irqfd struct {
	fd    uint32
	gsi   uint32
	flags uint32
	_     uint32 // resamplefd
	_     [16]uint8
}

// ioeventfd is struct kvm_ioeventfd.
type ioeventfd struct {
	datamatch uint64
	addr      uint64
	length    uint32
	fd        int32
	flags     uint32
	_         [36]uint8
}

// msi is struct kvm_msi.
type msi struct {
	addressLo uint32
	addressHi uint32
	data      uint32
	_         uint32 // flags
	_         uint32 // devid
	_         [12]uint8
}

// dirtyLog is struct kvm_dirty_log. The bitmap is a pointer, so that the
// collector follows it.
type dirtyLog struct {
	slot   uint32
	_      uint32
	bitmap unsafe.Pointer
}

// clearDirtyLog is struct kvm_clear_dirty_log.
type clearDirtyLog struct {
	slot      uint32
	numPages  uint32
	firstPage uint64
	bitmap    unsafe.Pointer
}

// enableCap is struct kvm_enable_cap.
type enableCap struct {
	cap  uint32
	_    uint32 // flags
	args [4]uint64
	_    [64]uint8
}

// mpState is struct kvm_mp_state.
type mpState struct {
	state uint32
}
