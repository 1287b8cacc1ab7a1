package lifecycle

import (
	"github.com/cryovisor/cryovisor/internal/elfcore"
	"github.com/cryovisor/cryovisor/internal/pagetable"
	"github.com/cryovisor/cryovisor/memory"
	"github.com/cryovisor/cryovisor/vmm"
)

// msrKernelGSBase is IA32_KERNEL_GS_BASE (Intel SDM, volume 4, table 2-2), which SWAPGS exchanges with the base of GS.
const msrKernelGSBase = 0xc0000102

// coreCPUs are the processors of a state as a core has them.
func coreCPUs(vcpus []vmm.VCPUState) []elfcore.CPU {
	var out []elfcore.CPU
	for i := range vcpus {
		v := &vcpus[i]
		s := &v.Sregs
		c := elfcore.CPU{
			ID: i, Regs: elfcore.Regs(v.Regs),
			CS: coreSegment(s.CS), DS: coreSegment(s.DS), ES: coreSegment(s.ES), FS: coreSegment(s.FS), GS: coreSegment(s.GS),
			SS: coreSegment(s.SS), LDT: coreSegment(s.LDT), TR: coreSegment(s.TR),
			GDT: coreTable(s.GDT), IDT: coreTable(s.IDT),
			CR0: s.CR0, CR2: s.CR2, CR3: s.CR3, CR4: s.CR4,
		}
		for _, m := range v.MSRs {
			if m.Index == msrKernelGSBase {
				c.KernelGSBase = m.Value
			}
		}
		// An XSAVE area begins with that of FXSAVE (Intel SDM, volume 1, 13.4.1), and KVM fills in what was not in use.
		if len(v.XSave) >= elfcore.FXSize {
			c.FX = v.XSave[:elfcore.FXSize]
		}
		out = append(out, c)
	}
	return out
}

func coreSegment(s vmm.SegmentReg) elfcore.SegmentReg {
	return elfcore.SegmentReg{
		Selector: uint32(s.Selector), Limit: s.Limit, Base: s.Base,
		Attributes: uint32(s.Type&15)<<8 | uint32(s.S&1)<<12 | uint32(s.DPL&3)<<13 | uint32(s.Present&1)<<15 |
			uint32(s.AVL&1)<<20 | uint32(s.L&1)<<21 | uint32(s.DB&1)<<22 | uint32(s.G&1)<<23,
	}
}

func coreTable(t vmm.TableReg) elfcore.SegmentReg {
	return elfcore.SegmentReg{Limit: uint32(t.Limit), Base: t.Base}
}

// coreRoots are the address spaces of the vCPUs that have one.
func coreRoots(vcpus []vmm.VCPUState) []pagetable.Root {
	var out []pagetable.Root
	for i := range vcpus {
		s := &vcpus[i].Sregs
		if r := (pagetable.Root{CR0: s.CR0, CR3: s.CR3, CR4: s.CR4, EFER: s.EFER}); r.Pages() {
			out = append(out, r)
		}
	}
	return out
}

func coreRanges(in []memory.Range) (out []elfcore.Range) {
	for _, r := range in {
		out = append(out, elfcore.Range(r))
	}
	return out
}

func tableRanges(in []memory.Range) (out []pagetable.Range) {
	for _, r := range in {
		out = append(out, pagetable.Range(r))
	}
	return out
}
