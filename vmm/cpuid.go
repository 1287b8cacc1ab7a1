package vmm

import "slices"

// CPUID leaves and bits used here (Intel SDM volume 2, CPUID; AMD APM volume 3,
// appendix E; Linux, Documentation/virt/kvm/x86/cpuid.rst).
const (
	leafVendor    = 0x0
	leafFeatures  = 0x1
	leafExtended  = 0x7
	leafPMU       = 0xa
	leafTopology  = 0xb
	leafXSave     = 0xd
	leafTopology2 = 0x1f
	leafTile      = 0x1d
	leafTMUL      = 0x1e
	leafKVM       = 0x40000001
	leafExtFeat   = 0x80000001
	leafAddress   = 0x80000008
	leafSVM       = 0x8000000a
	leafTopoExt   = 0x8000001e

	feat1ECXVMX         = 1 << 5
	feat7ECXShadowStack = 1 << 7
	featExtECXSVM       = 1 << 2
	feat1ECXTSCDeadline = 1 << 24
	feat1ECXHypervisor  = 1 << 31
	feat7EDXAMX         = 1<<22 | 1<<24 | 1<<25 // AMX-BF16, AMX-TILE, AMX-INT8
	xcr0AMX             = 1<<17 | 1<<18         // XTILECFG, XTILEDATA
	featKVMAsyncPF      = 1<<4 | 1<<10 | 1<<14  // host page faults told to the guest
)

// guestCPUID makes the CPUID of a new guest from what KVM offers: without the
// performance counters (their MSRs are many and differ by model), without AMX
// (its state needs a permission that this process may not have), without what
// has state that is not saved (nested virtualization, the shadow stack's
// pointer), and with the timer that KVM emulates whether or not it says so.
func guestCPUID(supported []CPUIDEntry, tscDeadline bool) []CPUIDEntry {
	out := make([]CPUIDEntry, 0, len(supported))
	for _, e := range supported {
		switch e.Function {
		case leafFeatures:
			e.ECX = e.ECX&^feat1ECXVMX | feat1ECXHypervisor
			if tscDeadline {
				e.ECX |= feat1ECXTSCDeadline
			}
		case leafExtended:
			if e.Index == 0 {
				e.ECX &^= feat7ECXShadowStack
				e.EDX &^= feat7EDXAMX
			}
		case leafPMU:
			e.EAX, e.EBX, e.ECX, e.EDX = 0, 0, 0, 0
		case leafXSave:
			if e.Index == 17 || e.Index == 18 {
				continue
			}
			if e.Index == 0 {
				e.EAX &^= xcr0AMX
			}
		case leafExtFeat:
			e.ECX &^= featExtECXSVM
		case leafTile, leafTMUL, leafSVM:
			continue
		case leafKVM:
			e.EAX &^= featKVMAsyncPF
		}
		out = append(out, e)
	}
	return out
}

// vcpuCPUID gives a vCPU its own APIC id, in every leaf that shows it.
func vcpuCPUID(common []CPUIDEntry, id int) []CPUIDEntry {
	out := slices.Clone(common)
	for i := range out {
		switch out[i].Function {
		case leafFeatures:
			out[i].EBX = out[i].EBX&0x00ffffff | uint32(id)<<24
		case leafTopology, leafTopology2:
			out[i].EDX = uint32(id)
		case leafTopoExt:
			out[i].EAX = uint32(id)
		}
	}
	return out
}

// cpuFeature is a register of a leaf in which every bit that the guest has must
// be a bit that the host has.
type cpuFeature struct {
	leaf, index uint32
	register    string
	ignore      uint32 // bits that say something else
}

var cpuFeatures = []cpuFeature{
	// OSXSAVE (bit 27) mirrors CR4; the others are KVM's own.
	{leafFeatures, 0, "ecx", 1<<27 | feat1ECXHypervisor | feat1ECXTSCDeadline},
	{leafFeatures, 0, "edx", 0},
	{leafExtended, 0, "ebx", 0},
	{leafExtended, 0, "ecx", 1 << 4}, // OSPKE mirrors CR4
	{leafExtended, 0, "edx", 0},
	{leafExtended, 1, "eax", 0},
	{leafXSave, 0, "eax", 0},
	{leafXSave, 0, "edx", 0},
	{leafXSave, 1, "eax", 0},
	{leafKVM, 0, "eax", 0},
	{leafExtFeat, 0, "ecx", 0},
	{leafExtFeat, 0, "edx", 0},
	{leafAddress, 0, "ebx", 0},
}

// checkCPU fails with a CPUError unless a processor that offers host can go on
// for one that was given guest.
func checkCPU(guest, host []CPUIDEntry) error {
	gv, hv := findLeaf(guest, leafVendor, 0), findLeaf(host, leafVendor, 0)
	for _, r := range []string{"ebx", "ecx", "edx"} { // twelve letters
		if g, h := gv.register(r), hv.register(r); g != h {
			return &CPUError{Leaf: leafVendor, Register: "vendor", Guest: g, Host: h}
		}
	}
	gf, hf := cpuFamily(findLeaf(guest, leafFeatures, 0).EAX), cpuFamily(findLeaf(host, leafFeatures, 0).EAX)
	if gf != hf {
		return &CPUError{Leaf: leafFeatures, Register: "family", Guest: gf, Host: hf}
	}
	for _, f := range cpuFeatures {
		g := findLeaf(guest, f.leaf, f.index).register(f.register) &^ f.ignore
		h := findLeaf(host, f.leaf, f.index).register(f.register)
		if g&^h != 0 {
			return &CPUError{Leaf: f.leaf, Index: f.index, Register: f.register, Guest: g, Host: h}
		}
	}
	ga, ha := findLeaf(guest, leafAddress, 0).EAX&0xff, findLeaf(host, leafAddress, 0).EAX&0xff
	if ga > ha {
		return &CPUError{Leaf: leafAddress, Register: "physical address bits", Guest: ga, Host: ha}
	}
	return nil
}

// cpuFamily is the display family of leaf 1's EAX (Intel SDM, volume 2, CPUID).
func cpuFamily(eax uint32) uint32 {
	family := eax >> 8 & 0xf
	if family == 0xf {
		family += eax >> 20 & 0xff
	}
	return family
}

func findLeaf(entries []CPUIDEntry, leaf, index uint32) CPUIDEntry {
	for _, e := range entries {
		if e.Function == leaf && e.Index == index {
			return e
		}
	}
	return CPUIDEntry{}
}

func (e CPUIDEntry) register(name string) uint32 {
	switch name {
	case "eax":
		return e.EAX
	case "ebx":
		return e.EBX
	case "ecx":
		return e.ECX
	default:
		return e.EDX
	}
}
