package testvm

import (
	"bytes"
	_ "embed"
	"fmt"
)

//go:embed testdata/guests/crash.bin
var crashCode []byte

// CrashKind is a way in which a guest ends, or does not.
type CrashKind int

// Kinds of crash guests; the entries of testdata/guests/crash.S.
const (
	// CrashTripleFault takes a page fault that it can't handle.
	CrashTripleFault CrashKind = iota
	// CrashUnemulatable executes popcnt in kernel mode, which an interpreting KVM
	// reports as an internal error. A processor goes on to Write.
	CrashUnemulatable
	// CrashWrite makes Write and then spins: reset and power-off.
	CrashWrite
	// CrashHalt halts with interrupts off. It never leaves KVM_RUN by itself.
	CrashHalt
	// CrashSpin runs for ever without an exit.
	CrashSpin
	crashKinds
)

const crashEntry = 64 // bytes from one entry to the next

// CrashConfig describes a crash guest. All its vCPUs do the same.
type CrashConfig struct {
	Memory uint64
	VCPUs  int // 0 means 1
	Kind   CrashKind
	// User runs it at CPL 3, at native speed on every KVM. Not for CrashUnemulatable
	// and CrashHalt.
	User bool
	// Write is the write of CrashWrite and CrashUnemulatable.
	Write PortWrite
}

// Crash returns a crash guest. The error is a *ConfigError.
func Crash(cfg CrashConfig) (Image, error) {
	cfg.VCPUs = max(cfg.VCPUs, 1)
	if err := checkMachine(cfg.Memory, cfg.VCPUs, 0); err != nil {
		return Image{}, err
	}
	switch {
	case cfg.Kind < 0 || cfg.Kind >= crashKinds:
		return Image{}, &ConfigError{"Kind", fmt.Sprintf("%d is unknown", cfg.Kind)}
	case cfg.User && (cfg.Kind == CrashUnemulatable || cfg.Kind == CrashHalt):
		return Image{}, &ConfigError{"User", "is for guests that do without kernel mode"}
	}
	im := Image{Load: []Segment{
		{GPA: gdtAddr, Data: gdt()},
		{GPA: tssAddr, Data: taskStates(cfg.VCPUs)},
		{GPA: codeAddr, Data: bytes.Clone(crashCode)},
		{GPA: tablesAddr, Data: identityTables(endOfRAM(cfg.Memory), cfg.User)},
	}}
	for v := range cfg.VCPUs {
		cpu := CPU{
			Sregs: longMode(v, cfg.User, false),
			Regs: Regs{
				RIP: codeAddr + uint64(cfg.Kind)*crashEntry, RSP: stackTop(v), RFLAGS: rflagsFixed,
				RDX: uint64(cfg.Write.Port), RAX: uint64(cfg.Write.Value), RCX: uint64(cfg.Write.Width),
			},
		}
		if cfg.User {
			cpu.Regs.RFLAGS |= rflagsIF | rflagsIOPL3
		}
		cpu.Sregs.IDT = TableReg{}
		im.VCPUs = append(im.VCPUs, cpu)
	}
	return im, nil
}
