//go:build linux && amd64

package vmm

import (
	"crypto/rand"
	"fmt"

	"github.com/cryovisor/cryovisor/internal/acpi"
	"github.com/cryovisor/cryovisor/internal/boot"
	"github.com/cryovisor/cryovisor/memory"
)

// The generation ID of a machine that boots Linux (Microsoft, "Virtual Machine
// Generation ID", 2012): 16 random bytes in a page that the guest leaves alone.
// Every Restore changes them and tells the guest, whose kernel then mixes
// them into its source of randomness: of two machines that are resumed from one
// State, neither can predict the other.
const (
	deviceGenID  = "genid"
	genIDVersion = 1
	genIDSize    = 16
	genIDAddr    = boot.ACPIEnd - memory.PageSize
	genIDGSI     = acpi.IOAPICPins - 1
)

// genID is where a machine's generation ID is, as the guest was told when it
// booted.
type genID struct {
	addr uint64
	gsi  uint32
}

const ( // of vmm/device/genid
	tagGenIDAddr = 1 + iota
	tagGenIDGSI
)

func (g *genID) parts() []part {
	return []part{fixed(tagGenIDAddr, &g.addr), fixed(tagGenIDGSI, &g.gsi)}
}

// newGenID gives a machine that boots its first generation ID.
func (vm *VM) newGenID() error {
	vm.genID = &genID{genIDAddr, genIDGSI}
	return vm.changeGeneration()
}

func (vm *VM) changeGeneration() error {
	id := make([]byte, genIDSize)
	rand.Read(id)
	if _, err := vm.mem.WriteAt(id, int64(vm.genID.addr)); err != nil {
		return fmt.Errorf("generation ID at %#x: %w", vm.genID.addr, err)
	}
	return nil
}

func (vm *VM) saveGenID() []DeviceState {
	if vm.genID == nil {
		return nil
	}
	return []DeviceState{{Name: deviceGenID, Version: genIDVersion, Data: encodeParts(vm.genID.parts())}}
}

// restoreGenID makes a restored machine another one. It comes after the interrupt
// controllers have their state.
func (vm *VM) restoreGenID(d DeviceState) error {
	section := sectionDevice + d.Name
	if d.Version == 0 || d.Version > genIDVersion {
		return newerError(section, d.Version, genIDVersion)
	}
	g := &genID{}
	if err := decodeParts(d.Data, g.parts()); err != nil {
		return sectionError(section, err)
	}
	if g.gsi >= acpi.IOAPICPins {
		return stateErrorf(section, "GSI %d", g.gsi)
	}
	vm.genID = g
	if err := vm.changeGeneration(); err != nil {
		return err
	}
	if err := vm.kvm.IRQLine(g.gsi, true); err != nil {
		return err
	}
	return vm.kvm.IRQLine(g.gsi, false)
}
