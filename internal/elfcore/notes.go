package elfcore

import (
	"bytes"
	"encoding/binary"
)

// CPU is the registers of a processor.
type CPU struct {
	ID int // from 0
	Regs
	CS, DS, ES, FS, GS, SS, LDT, TR SegmentReg
	GDT, IDT                        SegmentReg // base and limit only
	CR0, CR2, CR3, CR4              uint64
	KernelGSBase                    uint64
	// FX is the x87 and SSE state, in the 512 bytes of FXSAVE in 64-bit mode; nil if it is not known.
	FX []byte
}

// FXSize is the length of CPU.FX.
const FXSize = 512

// Regs are the general purpose registers, in the order of QEMU's note.
type Regs struct {
	RAX, RBX, RCX, RDX, RSI, RDI, RSP, RBP uint64
	R8, R9, R10, R11, R12, R13, R14, R15   uint64
	RIP, RFLAGS                            uint64
}

// SegmentReg is a segment register. Attributes has the bits of the second word of its descriptor (Intel SDM, volume 3A, 3.4.5) that are
// neither base nor limit, in their places.
type SegmentReg struct {
	Selector, Limit, Attributes uint32
	_                           uint32
	Base                        uint64
}

// Types of notes.
const (
	ntPRStatus = 1 // NT_PRSTATUS of CORE: a thread, and its general purpose registers
	ntFPRegSet = 2 // NT_FPREGSET (or NT_PRFPREG) of CORE: the x87 and SSE state of that thread
	ntQEMU     = 0 // of QEMU: a processor
)

// prStatus is struct elf_prstatus of x86-64. A processor is a thread in it.
type prStatus struct {
	Signal, Code, Errno          int32
	Current                      int16
	_                            [2]byte
	Pending, Held                uint64
	PID, Parent, Group, SID      int32
	User, System, CUser, CSystem [2]uint64 // seconds and microseconds
	Regs                         userRegs
	FPValid                      int32 // whether a note with floating point registers belongs to it
	_                            [4]byte
}

// userRegs is struct user_regs_struct.
type userRegs struct {
	R15, R14, R13, R12, RBP, RBX, R11, R10, R9, R8   uint64
	RAX, RCX, RDX, RSI, RDI, OrigRAX                 uint64
	RIP, CS, RFLAGS, RSP, SS, FSBase, GSBase, DS, ES uint64
	FS, GS                                           uint64
}

// qemuCPU is struct QEMUCPUState. KernelGSBase was added to it later; its size tells.
type qemuCPU struct {
	Version, Size uint32
	Regs
	CS, DS, ES, FS, GS, SS, LDT, TR, GDT, IDT SegmentReg
	CR                                        [5]uint64
	KernelGSBase                              uint64
}

const qemuVersion = 1 // QEMUCPUSTATE_VERSION

// notes are those of all processors: as threads first, as crash expects it, and then as processors.
func notes(cpus []CPU) []byte {
	var b bytes.Buffer
	for i := range cpus {
		c := &cpus[i]
		note(&b, "CORE", ntPRStatus, c.prStatus())
		if c.FX != nil {
			note(&b, "CORE", ntFPRegSet, c.FX)
		}
	}
	for i := range cpus {
		note(&b, "QEMU", ntQEMU, cpus[i].qemu())
	}
	return b.Bytes()
}

// note appends a note. Names of 4 letters and contents are padded to 4 bytes each; contents are multiples of that.
func note(b *bytes.Buffer, name string, kind uint32, v any) {
	put := func(v any) { _ = binary.Write(b, binary.LittleEndian, v) } // of fixed size: neither it nor the buffer fails
	put([]uint32{uint32(len(name) + 1), uint32(binary.Size(v)), kind})
	put(append([]byte(name), 0, 0, 0, 0))
	put(v)
}

func (c *CPU) prStatus() prStatus {
	s := prStatus{
		PID: int32(c.ID) + 1, // 0 is no thread
		Regs: userRegs{
			R15: c.R15, R14: c.R14, R13: c.R13, R12: c.R12, RBP: c.RBP, RBX: c.RBX, R11: c.R11, R10: c.R10, R9: c.R9, R8: c.R8,
			RAX: c.RAX, RCX: c.RCX, RDX: c.RDX, RSI: c.RSI, RDI: c.RDI,
			RIP: c.RIP, CS: uint64(c.CS.Selector), RFLAGS: c.RFLAGS, RSP: c.RSP, SS: uint64(c.SS.Selector),
			FSBase: c.FS.Base, GSBase: c.GS.Base, DS: uint64(c.DS.Selector), ES: uint64(c.ES.Selector),
			FS: uint64(c.FS.Selector), GS: uint64(c.GS.Selector),
		},
	}
	if c.FX != nil {
		s.FPValid = 1
	}
	return s
}

func (c *CPU) qemu() qemuCPU {
	q := qemuCPU{
		Version: qemuVersion, Regs: c.Regs,
		CS: c.CS, DS: c.DS, ES: c.ES, FS: c.FS, GS: c.GS, SS: c.SS, LDT: c.LDT, TR: c.TR, GDT: c.GDT, IDT: c.IDT,
		CR: [5]uint64{c.CR0, 0, c.CR2, c.CR3, c.CR4}, KernelGSBase: c.KernelGSBase,
	}
	q.Size = uint32(binary.Size(q))
	return q
}
