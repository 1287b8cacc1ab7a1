package testvm

import (
	"bytes"
	_ "embed"
	"encoding/binary"
)

//go:embed testdata/guests/beacon.bin
var beaconCode []byte

// BeaconConfig describes a beacon guest.
type BeaconConfig struct {
	// Memory is the guest's RAM in bytes.
	Memory uint64
	// Period is the time from one tick to the next in ns (KVM's APIC bus runs at 1 GHz). Ticks that come faster than the guest can take them are merged.
	Period uint32
	// Every is the number of ticks from one line to the next.
	Every uint64
}

// Beacon returns a guest that sleeps nearly always: it runs in kernel mode, counts the ticks of its local APIC timer, writes "ready" to COM1
// when it begins, and then how many "ticks" there have been. It has one vCPU, needs KVM's interrupt controllers, and no device of the host's. The
// error is a *ConfigError.
func Beacon(cfg BeaconConfig) (Image, error) {
	if err := checkMachine(cfg.Memory, 1, defaultPorts); err != nil {
		return Image{}, err
	}
	if cfg.Period == 0 || cfg.Every == 0 {
		return Image{}, &ConfigError{"Period", "and Every must not be 0"}
	}
	// In step with testdata/guests/beacon.S.
	block := make([]byte, pageSize)
	for i, q := range []uint64{uint64(cfg.Period), cfg.Every, 0, cfg.Every} {
		binary.LittleEndian.PutUint64(block[i*8:], q)
	}
	cpu := CPU{
		Sregs: longMode(0, false, false),
		Regs:  Regs{RIP: codeAddr, RSP: stackTop(0), R13: blockOf(0), RFLAGS: rflagsFixed},
	}
	cpu.Sregs.IDT = TableReg{} // the guest makes its own
	return Image{
		Load: []Segment{
			{GPA: gdtAddr, Data: gdt()},
			{GPA: tssAddr, Data: taskStates(1)},
			{GPA: codeAddr, Data: bytes.Clone(beaconCode)},
			{GPA: blockAddr, Data: block},
			{GPA: tablesAddr, Data: identityTables(endOfRAM(cfg.Memory), false)},
		},
		VCPUs: []CPU{cpu},
	}, nil
}
