package testvm

import "github.com/cryovisor/cryovisor/vmm"

// Short names for the processor state of package vmm.
type (
	CPU        = vmm.CPUStart
	Regs       = vmm.Regs
	Sregs      = vmm.Sregs
	SegmentReg = vmm.SegmentReg
	TableReg   = vmm.TableReg
)

// Bits of control registers (Intel SDM, volume 3, 2.5 and 2.2.1; AMD64 APM,
// volume 2, 3.1).
const (
	cr0PE, cr0MP, cr0ET, cr0NE   = 1 << 0, 1 << 1, 1 << 4, 1 << 5
	cr0WP, cr0PG                 = 1 << 16, 1 << 31
	cr4PAE, cr4OSFXSR            = 1 << 5, 1 << 9
	cr4OSXMMEXCPT, cr4OSXSAVE    = 1 << 10, 1 << 18
	eferLME, eferLMA             = 1 << 8, 1 << 10
	rflagsFixed, rflagsIF        = 1 << 1, 1 << 9
	rflagsIOPL3                  = 3 << 12
	apicBase, apicEnable, apicBP = 0xfee00000, 1 << 11, 1 << 8
	xcr0AVX                      = 7 // x87, SSE, AVX
)

// Selectors of the GDT that gdt makes; user selectors with RPL 3.
const (
	selKernelCode = 0x08
	selKernelData = 0x10
	selUserData   = 0x2b
	selUserCode   = 0x33
	selTSS        = 0x40
)

// longMode is the state of a vCPU in 64-bit mode, paging on, at CPL 3 or 0.
func longMode(vcpu int, user, avx bool) Sregs {
	cs := SegmentReg{Limit: 0xffffffff, Selector: selKernelCode, Type: 11, Present: 1, S: 1, L: 1, G: 1}
	ds := SegmentReg{Limit: 0xffffffff, Selector: selKernelData, Type: 3, Present: 1, S: 1, DB: 1, G: 1}
	if user {
		cs.Selector, cs.DPL = selUserCode, 3
		ds.Selector, ds.DPL = selUserData, 3
	}
	s := Sregs{
		CS: cs, DS: ds, ES: ds, FS: ds, GS: ds, SS: ds,
		TR: SegmentReg{
			Base: tssOf(vcpu), Limit: tssLimit(vcpu),
			Selector: selTSS, Type: 11, Present: 1,
		},
		LDT:      SegmentReg{Type: 2, Unusable: 1},
		GDT:      TableReg{Base: gdtAddr, Limit: gdtSize - 1},
		IDT:      TableReg{Base: idtAddr, Limit: 256*16 - 1},
		CR0:      cr0PE | cr0MP | cr0ET | cr0NE | cr0WP | cr0PG,
		CR3:      tablesAddr,
		CR4:      cr4PAE | cr4OSFXSR | cr4OSXMMEXCPT,
		EFER:     eferLME | eferLMA,
		APICBase: apicBase | apicEnable,
	}
	if avx {
		s.CR4 |= cr4OSXSAVE
	}
	if vcpu == 0 {
		s.APICBase |= apicBP
	}
	return s
}
