package vmm

import (
	"errors"
	"fmt"
	"math/bits"
	"slices"
	"testing"
)

// richHost offers all bits of all leaves that this package knows.
func richHost() []CPUIDEntry {
	const all = 0xffffffff
	full := func(leaf, index uint32) CPUIDEntry {
		return CPUIDEntry{Function: leaf, Index: index, EAX: all, EBX: all, ECX: all, EDX: all}
	}
	return []CPUIDEntry{
		{Function: leafVendor, EAX: 0x1f, EBX: 0x756e6547, EDX: 0x49656e69, ECX: 0x6c65746e},
		{Function: leafFeatures, EAX: 0x000806f8, EBX: all, ECX: all, EDX: all},
		full(leafExtended, 0), full(leafExtended, 1), full(leafPMU, 0), full(leafTopology, 0), full(leafTopology, 1),
		full(leafXSave, 0), full(leafXSave, 1), full(leafXSave, 2), full(leafXSave, 17), full(leafXSave, 18),
		full(leafTile, 0), full(leafTile, 1), full(leafTMUL, 0), full(leafTopology2, 0), full(leafKVM, 0),
		full(leafExtFeat, 0),
		{Function: leafAddress, EAX: 0x302e, EBX: all},
		full(leafSVM, 0), full(leafTopoExt, 0),
	}
}

func TestGuestCPUIDLeavesOutWhatCannotBeSaved(t *testing.T) {
	host := richHost()
	before := slices.Clone(host)
	guest := guestCPUID(host, true)
	if !slices.Equal(host, before) {
		t.Error("the host's list was changed")
	}
	for _, tc := range []struct {
		what        string
		leaf, index uint32
		register    string
		gone        uint32
	}{
		{"VMX", leafFeatures, 0, "ecx", 1 << 5},
		{"SVM", leafExtFeat, 0, "ecx", 1 << 2},
		{"the SVM leaf", leafSVM, 0, "edx", 0xffffffff},
		{"shadow stacks", leafExtended, 0, "ecx", 1 << 7},
		{"AMX", leafExtended, 0, "edx", 1<<22 | 1<<24 | 1<<25},
		{"tile state", leafXSave, 0, "eax", 1<<17 | 1<<18},
		{"tile configuration's area", leafXSave, 17, "eax", 0xffffffff},
		{"tile data's area", leafXSave, 18, "eax", 0xffffffff},
		{"tiles", leafTile, 1, "eax", 0xffffffff},
		{"TMUL", leafTMUL, 0, "ebx", 0xffffffff},
		{"performance counters", leafPMU, 0, "eax", 0xffffffff},
		{"performance events", leafPMU, 0, "edx", 0xffffffff},
		{"asynchronous page faults", leafKVM, 0, "eax", 1<<4 | 1<<10 | 1<<14},
	} {
		got := findLeaf(guest, tc.leaf, tc.index).register(tc.register)
		if got&tc.gone != 0 {
			t.Errorf("%s: leaf %#x.%d %s is %#x", tc.what, tc.leaf, tc.index, tc.register, got)
		}
		present := slices.ContainsFunc(guest, func(e CPUIDEntry) bool { return e.Function == tc.leaf && e.Index == tc.index })
		if present && tc.gone != 0xffffffff && got != ^tc.gone {
			t.Errorf("%s: leaf %#x.%d %s is %#x, want only %#x to be gone", tc.what, tc.leaf, tc.index, tc.register, got, tc.gone)
		}
	}
}

func TestGuestCPUIDTimerAndHypervisor(t *testing.T) {
	for _, deadline := range []bool{false, true} {
		guest := guestCPUID([]CPUIDEntry{{Function: leafFeatures}}, deadline)
		want := uint32(1) << 31
		if deadline {
			want |= 1 << 24
		}
		if guest[0].ECX != want {
			t.Errorf("deadline timer %v: ECX is %#x, want %#x", deadline, guest[0].ECX, want)
		}
	}
}

func TestVCPUCPUIDGivesEachItsID(t *testing.T) {
	common := guestCPUID(richHost(), true)
	for _, id := range []int{0, 1, 7, MaxVCPUs - 1} {
		c := vcpuCPUID(common, id)
		for _, tc := range []struct {
			what string
			got  uint32
		}{
			{"leaf 1", findLeaf(c, leafFeatures, 0).EBX >> 24},
			{"leaf 0xb.0", findLeaf(c, leafTopology, 0).EDX},
			{"leaf 0xb.1", findLeaf(c, leafTopology, 1).EDX},
			{"leaf 0x1f", findLeaf(c, leafTopology2, 0).EDX},
			{"leaf 0x8000001e", findLeaf(c, leafTopoExt, 0).EAX},
		} {
			if tc.got != uint32(id) {
				t.Errorf("vCPU %d: %s has id %d", id, tc.what, tc.got)
			}
		}
		if got, want := findLeaf(c, leafFeatures, 0).EBX&0xffffff, findLeaf(common, leafFeatures, 0).EBX&0xffffff; got != want {
			t.Errorf("vCPU %d: the rest of EBX is %#x, want %#x", id, got, want)
		}
	}
	if findLeaf(common, leafTopology, 0).EDX != 0xffffffff {
		t.Error("the common list was changed")
	}
}

func TestCheckCPUAcceptsItself(t *testing.T) {
	host := richHost()
	for id := range 3 {
		if err := checkCPU(vcpuCPUID(guestCPUID(host, true), id), host); err != nil {
			t.Error(err)
		}
	}
}

// TestCheckCPUEveryFeatureBit takes away from the host, one by one, every bit of
// every register that is compared.
func TestCheckCPUEveryFeatureBit(t *testing.T) {
	guest := richHost()
	for _, f := range cpuFeatures {
		for bit := range 32 {
			host := richHost()
			i := slices.IndexFunc(host, func(e CPUIDEntry) bool { return e.Function == f.leaf && e.Index == f.index })
			clearBit(&host[i], f.register, bit)
			err := checkCPU(guest, host)
			if f.ignore>>bit&1 == 1 {
				if err != nil {
					t.Errorf("leaf %#x.%d %s bit %d is to be ignored: %v", f.leaf, f.index, f.register, bit, err)
				}
				continue
			}
			var cpu *CPUError
			if !errors.As(err, &cpu) || !errors.Is(err, ErrCPU) {
				t.Fatalf("leaf %#x.%d %s bit %d: %v", f.leaf, f.index, f.register, bit, err)
			}
			if cpu.Leaf != f.leaf || cpu.Index != f.index || cpu.Register != f.register ||
				bits.OnesCount32(cpu.Guest&^cpu.Host) != 1 || cpu.Guest&^cpu.Host != 1<<bit {
				t.Errorf("leaf %#x.%d %s bit %d: %+v", f.leaf, f.index, f.register, bit, cpu)
			}
			// The other way round, the host has more than the guest knows of.
			if err := checkCPU(host, guest); err != nil {
				t.Errorf("a host that has more than the guest: %v", err)
			}
		}
	}
}

func clearBit(e *CPUIDEntry, register string, bit int) {
	r := map[string]*uint32{"eax": &e.EAX, "ebx": &e.EBX, "ecx": &e.ECX, "edx": &e.EDX}[register]
	*r &^= 1 << bit
}

func TestCheckCPUIdentity(t *testing.T) {
	change := func(leaf uint32, f func(*CPUIDEntry)) []CPUIDEntry {
		host := richHost()
		f(&host[slices.IndexFunc(host, func(e CPUIDEntry) bool { return e.Function == leaf })])
		return host
	}
	for _, tc := range []struct {
		register string
		leaf     uint32
		host     []CPUIDEntry
	}{
		{"vendor", leafVendor, change(leafVendor, func(e *CPUIDEntry) { e.EBX++ })},
		{"vendor", leafVendor, change(leafVendor, func(e *CPUIDEntry) { e.ECX++ })},
		{"vendor", leafVendor, change(leafVendor, func(e *CPUIDEntry) { e.EDX++ })},
		{"vendor", leafVendor, nil},
		{"family", leafFeatures, change(leafFeatures, func(e *CPUIDEntry) { e.EAX = 0x000805f8 })},
		{"family", leafFeatures, change(leafFeatures, func(e *CPUIDEntry) { e.EAX = 0x00800f12 })},
		{"physical address bits", leafAddress, change(leafAddress, func(e *CPUIDEntry) { e.EAX-- })},
	} {
		err := checkCPU(richHost(), tc.host)
		var cpu *CPUError
		if !errors.As(err, &cpu) || cpu.Register != tc.register || cpu.Leaf != tc.leaf || cpu.Guest == cpu.Host {
			t.Errorf("%s: %v", tc.register, err)
		}
	}
	// Model and stepping may differ, the maximal leaf too.
	other := change(leafFeatures, func(e *CPUIDEntry) { e.EAX = 0x000506e3 })
	other[0].EAX = 0x20
	if err := checkCPU(richHost(), other); err != nil {
		t.Error(err)
	}
}

func TestCPUFamily(t *testing.T) {
	for eax, want := range map[uint32]uint32{
		0x000806f8: 6,    // Sapphire Rapids
		0x00800f12: 0x17, // Zen
		0x00a20f12: 0x19, // Zen 3
		0x00000633: 6,
	} {
		if got := cpuFamily(eax); got != want {
			t.Errorf("%#x: family %#x, want %#x", eax, got, want)
		}
	}
}

func ExampleCPUError() {
	err := error(&CPUError{Leaf: 7, Register: "ebx", Guest: 0x10020, Host: 0x20})
	fmt.Println(errors.Is(err, ErrCPU))
	fmt.Println(err)
	// Output:
	// true
	// vmm: this host's CPU lacks what the guest uses: CPUID leaf 0x7.0 ebx: guest 0x10020, host 0x20; resume on a host of the same CPU family with at least the same features
}
