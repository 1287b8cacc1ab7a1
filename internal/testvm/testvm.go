// Package testvm has the project's own test guests: small programs for x86-64
// long mode that need no operating system, the tables and start states to run
// them, and models in Go that predict what they do, byte for byte.
//
// Worker runs in user mode at native speed and proves that memory, registers and
// port I/O survive; Timer runs in kernel mode with interrupts; Crash ends in the
// ways in which a guest can end; Beacon sleeps, and counts. Their sources are in testdata/guests.
//
// The package makes plain data, in the types of package vmm, and runs nothing.
package testvm

import (
	_ "embed"
	"fmt"

	"github.com/cryovisor/cryovisor/vmm"
)

//go:generate sh testdata/guests/build.sh

//go:embed testdata/guests/worker.bin
var workerCode []byte

const pageSize = 4096

// The 32-bit hole: RAM leaves it out and goes on above it.
const (
	holeStart = 3 << 30
	holeEnd   = 4 << 30
)

// Guest physical addresses that all guests have in common.
const (
	gdtAddr    = 0x1000
	idtAddr    = 0x2000
	tssAddr    = 0x3000 // tssSize bytes for each vCPU
	ioMapAddr  = 0x5000
	ioMapSize  = 65536/8 + 1
	codeAddr   = 0x10000
	blockAddr  = 0x20000 // a page for each vCPU
	stackAddr  = 0x60000 // stackSize bytes for each vCPU
	tablesAddr = 0x100000
	tssSize    = 128
	stackSize  = 1024
)

// MaxVCPUs is how many vCPUs a test guest can have.
const MaxVCPUs = 64

// Segment is bytes to be loaded at a guest physical address.
type Segment = vmm.Segment

// Image is a guest that is ready to run: what to load, in ascending order of
// addresses and not overlapping, and the state in which each vCPU begins. All
// other memory is zero.
type Image struct {
	Load  []Segment
	VCPUs []CPU
}

// ConfigError says which field of a guest's configuration can't be met.
type ConfigError struct {
	Field  string
	Reason string
}

func (e *ConfigError) Error() string {
	return fmt.Sprintf("test guest: %s %s", e.Field, e.Reason)
}

func checkMachine(memory uint64, vcpus int, ports uint16) error {
	switch {
	case memory%pageSize != 0 || memory < minMemory || memory > maxMemory:
		return &ConfigError{"Memory", fmt.Sprintf("is %d bytes; it must be a multiple of 4096 from 4 MiB to 511 GiB", memory)}
	case vcpus < 1 || vcpus > MaxVCPUs:
		return &ConfigError{"VCPUs", fmt.Sprintf("is %d; it must be from 1 to %d", vcpus, MaxVCPUs)}
	case int(ports)+vcpus*portsPerVCPU > 1<<16:
		return &ConfigError{"Ports", fmt.Sprintf("from %#x on are too few for %d vCPUs", ports, vcpus)}
	}
	return nil
}
