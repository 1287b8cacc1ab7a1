//go:build linux && amd64

package vmm

import (
	"github.com/cryovisor/cryovisor/internal/acpi"
	"github.com/cryovisor/cryovisor/internal/serial"
)

// The machine's own I/O ports, besides the serial port's.
const (
	portKeyboard    = 0x60  // i8042: data at 0x60, command and status at 0x64
	portSleep       = 0x600 // ACPI sleep control register (ACPI 6.5, 4.8.3.7)
	portSleepStatus = 0x601 // and its status
	portReset       = 0x602 // ACPI reset register (ACPI 6.5, 4.8.3.6)
	portResetCtl    = 0xcf9 // reset control register of PC chipsets
	i8042Pulse      = 0xfe  // command: pulse the processor's reset line
	resetCtlReset   = 1 << 2
)

// keyboard is as much of an i8042 as a guest needs to reset the machine: it is
// always ready and has no keyboard.
type keyboard struct{}

func (keyboard) read(_ uint64, data []byte) { clear(data) }

func (keyboard) write(off uint64, data []byte) error {
	if off == 4 && data[0] == i8042Pulse {
		return &ExitError{Kind: ErrReset, Detail: "keyboard controller"}
	}
	return nil
}

// resetControl is the reset control register.
type resetControl struct{}

func (resetControl) read(_ uint64, data []byte) { clear(data) }

func (resetControl) write(_ uint64, data []byte) error {
	if data[0]&resetCtlReset != 0 {
		return &ExitError{Kind: ErrReset, Detail: "reset control register"}
	}
	return nil
}

// power is the ACPI registers from portSleep on, by which the guest switches
// itself off and resets itself. Of the sleep states only S5, soft off, is offered.
type power struct{}

func (power) read(_ uint64, data []byte) { clear(data) }

func (power) write(off uint64, data []byte) error {
	switch {
	case off == 0 && acpi.IsPowerOff(data[0]):
		return &ExitError{Kind: ErrPowerOff, Detail: "ACPI S5"}
	case off == portReset-portSleep && data[0] == acpi.ResetValue:
		return &ExitError{Kind: ErrReset, Detail: "ACPI reset register"}
	}
	return nil
}

// embedderPorts is a PortDevice of the embedder's on the bus.
type embedderPorts struct {
	first uint16
	dev   PortDevice
}

func (p embedderPorts) read(off uint64, data []byte) { p.dev.In(p.first+uint16(off), data) }

func (p embedderPorts) write(off uint64, data []byte) error {
	p.dev.Out(p.first+uint16(off), data)
	return nil
}

// serialPorts is the UART on the bus. Wide accesses are a byte each, as on the
// ISA bus.
type serialPorts struct{ uart *serial.UART }

func (p serialPorts) read(off uint64, data []byte) {
	for i := range data {
		// An error is the interrupt line's, kept for UART.Err; the value is good.
		data[i], _ = p.uart.Read(uint16(off) + uint16(i))
	}
}

func (p serialPorts) write(off uint64, data []byte) error {
	for i, v := range data {
		if err := p.uart.Write(uint16(off)+uint16(i), v); err != nil {
			return err
		}
	}
	return nil
}
