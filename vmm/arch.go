package vmm

// The types of this file describe x86-64 processor state in plain, portable
// structs: the same on every system, so that a snapshot can be inspected
// anywhere. Names and widths follow the KVM ABI (struct kvm_regs, kvm_sregs;
// Linux, Documentation/virt/kvm/api.rst), without its padding.

// Regs are a vCPU's general purpose registers.
type Regs struct {
	RAX, RBX, RCX, RDX, RSI, RDI, RSP, RBP uint64
	R8, R9, R10, R11, R12, R13, R14, R15   uint64
	RIP, RFLAGS                            uint64
}

// SegmentReg is a segment register with its hidden descriptor. Limit is in
// bytes, whatever the granularity bit G says.
type SegmentReg struct {
	Base     uint64
	Limit    uint32
	Selector uint16
	Type     uint8
	Present  uint8
	DPL      uint8
	DB       uint8
	S        uint8
	L        uint8
	G        uint8
	AVL      uint8
	Unusable uint8
}

// TableReg is a descriptor table register (GDTR or IDTR): a guest linear
// address and the table's size in bytes, less one.
type TableReg struct {
	Base  uint64
	Limit uint16
}

// Sregs are a vCPU's segment, table and control registers. InterruptBitmap has
// at most one bit set: the external interrupt that is being delivered.
type Sregs struct {
	CS, DS, ES, FS, GS, SS, TR, LDT SegmentReg
	GDT, IDT                        TableReg
	CR0, CR2, CR3, CR4, CR8, EFER   uint64
	APICBase                        uint64
	InterruptBitmap                 [4]uint64
}

// CPUIDEntry is one leaf of the CPUID that a vCPU sees (Intel SDM, volume 2,
// CPUID; struct kvm_cpuid_entry2).
type CPUIDEntry struct {
	Function, Index, Flags uint32
	EAX, EBX, ECX, EDX     uint32
}

// MSR is a model specific register and its value.
type MSR struct {
	Index uint32
	Value uint64
}
