//go:build linux && amd64

package vmm

import (
	"fmt"

	"github.com/cryovisor/cryovisor/internal/acpi"
	"github.com/cryovisor/cryovisor/internal/boot"
	"github.com/cryovisor/cryovisor/internal/serial"
)

// describe writes the ACPI tables of the machine into guest memory, where the
// memory map has no RAM, and returns the address of their root.
func (vm *VM) describe() (rsdp uint64, err error) {
	tables, err := acpi.Build(acpi.Config{
		CPUs:    len(vm.vcpus),
		Power:   acpi.Power{SleepControl: portSleep, SleepStatus: portSleepStatus, Reset: portReset},
		Serial:  []acpi.SerialPort{{Port: serial.COM1, GSI: serial.COM1IRQ}},
		Virtio:  vm.acpiVirtio(),
		VMGenID: &acpi.VMGenID{Addr: vm.genID.addr, GSI: vm.genID.gsi},
	}, boot.ACPIBase, genIDAddr-boot.ACPIBase)
	if err != nil {
		return 0, fmt.Errorf("%w: %w", ErrConfig, err)
	}
	if _, err := vm.mem.WriteAt(tables.Data, int64(tables.Base)); err != nil {
		return 0, fmt.Errorf("%w: ACPI tables: %w", ErrConfig, err)
	}
	return tables.RSDP(), nil
}

// resetByPort is how a kernel that trusts nothing else resets the machine.
var resetByPort = boot.Reset{Port: portReset, Value: acpi.ResetValue}
