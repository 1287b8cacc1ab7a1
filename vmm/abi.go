//go:build linux && amd64

package vmm

import (
	"encoding/binary"

	"github.com/cryovisor/cryovisor/internal/boot"
	"github.com/cryovisor/cryovisor/internal/kvm"
)

// Conversions between the portable types of arch.go and the structs of the KVM
// ABI.

func toKVMSegment(s SegmentReg) kvm.Segment {
	return kvm.Segment{
		Base: s.Base, Limit: s.Limit, Selector: s.Selector, Typ: s.Type, Present: s.Present,
		DPL: s.DPL, DB: s.DB, S: s.S, L: s.L, G: s.G, AVL: s.AVL, Unusable: s.Unusable,
	}
}

func fromKVMSegment(s kvm.Segment) SegmentReg {
	return SegmentReg{
		Base: s.Base, Limit: s.Limit, Selector: s.Selector, Type: s.Typ, Present: s.Present,
		DPL: s.DPL, DB: s.DB, S: s.S, L: s.L, G: s.G, AVL: s.AVL, Unusable: s.Unusable,
	}
}

func toKVMSregs(s Sregs) kvm.Sregs {
	return kvm.Sregs{
		CS: toKVMSegment(s.CS), DS: toKVMSegment(s.DS), ES: toKVMSegment(s.ES), FS: toKVMSegment(s.FS),
		GS: toKVMSegment(s.GS), SS: toKVMSegment(s.SS), TR: toKVMSegment(s.TR), LDT: toKVMSegment(s.LDT),
		GDT: kvm.Descriptor{Base: s.GDT.Base, Limit: s.GDT.Limit},
		IDT: kvm.Descriptor{Base: s.IDT.Base, Limit: s.IDT.Limit},
		CR0: s.CR0, CR2: s.CR2, CR3: s.CR3, CR4: s.CR4, CR8: s.CR8, EFER: s.EFER,
		ApicBase: s.APICBase, InterruptBitmap: s.InterruptBitmap,
	}
}

func fromKVMSregs(s kvm.Sregs) Sregs {
	return Sregs{
		CS: fromKVMSegment(s.CS), DS: fromKVMSegment(s.DS), ES: fromKVMSegment(s.ES), FS: fromKVMSegment(s.FS),
		GS: fromKVMSegment(s.GS), SS: fromKVMSegment(s.SS), TR: fromKVMSegment(s.TR), LDT: fromKVMSegment(s.LDT),
		GDT: TableReg{Base: s.GDT.Base, Limit: s.GDT.Limit},
		IDT: TableReg{Base: s.IDT.Base, Limit: s.IDT.Limit},
		CR0: s.CR0, CR2: s.CR2, CR3: s.CR3, CR4: s.CR4, CR8: s.CR8, EFER: s.EFER,
		APICBase: s.ApicBase, InterruptBitmap: s.InterruptBitmap,
	}
}

// fromBootCPU is the state in which a boot loader leaves the first vCPU.
func fromBootCPU(b boot.CPU) CPUStart {
	return CPUStart{
		Regs: Regs{RIP: b.RIP, RSP: b.RSP, RSI: b.RSI, RFLAGS: b.RFLAGS},
		Sregs: Sregs{
			CS: fromBootSegment(b.CS), DS: fromBootSegment(b.DS), ES: fromBootSegment(b.ES),
			FS: fromBootSegment(b.FS), GS: fromBootSegment(b.GS), SS: fromBootSegment(b.SS),
			TR: fromBootSegment(b.TR), LDT: fromBootSegment(b.LDT),
			GDT: TableReg(b.GDT), IDT: TableReg(b.IDT),
			CR0: b.CR0, CR3: b.CR3, CR4: b.CR4, EFER: b.EFER,
		},
	}
}

func fromBootSegment(s boot.Segment) SegmentReg {
	bit := func(b bool) uint8 {
		if b {
			return 1
		}
		return 0
	}
	return SegmentReg{
		Base: s.Base, Limit: s.Limit, Selector: s.Selector, Type: s.Type, Present: bit(s.Present),
		DPL: s.DPL, DB: bit(s.DB), S: bit(s.S), L: bit(s.L), G: bit(s.G), AVL: bit(s.AVL), Unusable: bit(s.Unusable),
	}
}

func toKVMCPUID(entries []CPUIDEntry) []kvm.CPUIDEntry {
	out := make([]kvm.CPUIDEntry, len(entries))
	for i, e := range entries {
		out[i] = kvm.CPUIDEntry{
			Function: e.Function, Index: e.Index, Flags: e.Flags,
			Eax: e.EAX, Ebx: e.EBX, Ecx: e.ECX, Edx: e.EDX,
		}
	}
	return out
}

func fromKVMCPUID(entries []kvm.CPUIDEntry) []CPUIDEntry {
	out := make([]CPUIDEntry, len(entries))
	for i, e := range entries {
		out[i] = CPUIDEntry{
			Function: e.Function, Index: e.Index, Flags: e.Flags,
			EAX: e.Eax, EBX: e.Ebx, ECX: e.Ecx, EDX: e.Edx,
		}
	}
	return out
}

func toKVMMSRs(msrs []MSR) []kvm.MSREntry {
	out := make([]kvm.MSREntry, len(msrs))
	for i, m := range msrs {
		out[i] = kvm.MSREntry{Index: m.Index, Data: m.Value}
	}
	return out
}

func fromKVMMSRs(msrs []kvm.MSREntry) []MSR {
	out := make([]MSR, len(msrs))
	for i, m := range msrs {
		out[i] = MSR{Index: m.Index, Value: m.Data}
	}
	return out
}

// getABI calls get and encodes the struct that it returns as the kernel lays it
// out, which is little-endian and without hidden padding.
func getABI[T any](get func() (T, error)) ([]byte, error) {
	v, err := get()
	if err != nil {
		return nil, err
	}
	return binary.Append(nil, binary.LittleEndian, v)
}

// setABI decodes a struct that getABI encoded and calls set with it. It fails
// with ErrState when the size is not the struct's.
func setABI[T any](what string, b []byte, set func(T) error) error {
	var v T
	if len(b) != binary.Size(v) {
		return stateErrorf(what, "%d bytes, want %d", len(b), binary.Size(v))
	}
	if _, err := binary.Decode(b, binary.LittleEndian, &v); err != nil {
		return stateErrorf(what, "%v", err)
	}
	return set(v)
}
