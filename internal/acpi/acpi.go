// Package acpi builds the ACPI tables of a guest: a hardware-reduced platform (ACPI 6.5, section 4.1) without firmware,
// of processors, one I/O APIC, serial ports, virtio-mmio devices and a VM generation ID.
//
// A guest takes these tables to mean that there is no 8259. Linux then leaves one that is there as it finds it, and keeps
// LINT0 open on the first processor if it finds it so: its first interrupt arrives by the 8259's reset vectors, as an
// exception (a divide error for IRQ 0). So LINT0 has to be masked on every processor when the guest starts.
//
// The tables are a function of a Config alone, byte for byte, so that they belong to a guest's configuration.
package acpi

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// Trigger is how a device raises its interrupt. Every interrupt here is active high.
type Trigger uint8

// Edge suits an irqfd, which pulses its line; Level a line that stays up until the guest has acknowledged.
const (
	Edge Trigger = iota
	Level
)

// SerialPort is a 16550-compatible UART. Its interrupt is edge-triggered, as on every PC.
type SerialPort struct {
	Port uint16 // first of 8 I/O ports
	GSI  uint32
}

// VirtioMMIO is a virtio device with the MMIO transport (HID LNRO0005, which Linux binds to).
type VirtioMMIO struct {
	Base, Size uint32 // register window: guest physical address and length in bytes
	GSI        uint32
	Trigger    Trigger
}

// VMGenID is a VM generation ID (Microsoft, "Virtual Machine Generation ID", 2012). Raising GSI tells the guest, through
// a Generic Event Device, that the ID has changed.
type VMGenID struct {
	Addr uint64 // of the 16-byte ID: 8-byte aligned, and in memory that the guest is told to leave alone
	GSI  uint32 // edge-triggered
}

// Power names the I/O ports by which the guest turns itself off and resets itself. Each is one byte wide.
type Power struct {
	SleepControl uint16 // see IsPowerOff
	SleepStatus  uint16 // reads as 0; writes are ignored
	Reset        uint16 // a write of ResetValue resets the guest
}

// ResetValue is what a guest writes to Power.Reset.
const ResetValue = 1

// sleepTypeS5 is the SLP_TYP of soft-off, and sleepEnable the SLP_EN bit (ACPI 6.5, table 4.19).
const (
	sleepTypeS5    = 5
	sleepTypeShift = 2
	sleepTypeMask  = 7
	sleepEnable    = 1 << 5
)

// IsPowerOff reports whether v, written to Power.SleepControl, turns the guest off.
func IsPowerOff(v byte) bool {
	return v&sleepEnable != 0 && v>>sleepTypeShift&sleepTypeMask == sleepTypeS5
}

// IOAPICPins is the number of interrupts of the I/O APIC, GSI 0 on: KVM's has 24.
const IOAPICPins = 24

// Addresses of KVM's interrupt controllers, which are those of a PC.
const (
	ioapicBase = 0xfec00000
	lapicBase  = 0xfee00000
	apicWindow = 0x1000
)

// maxCPUs bounds the processors: their device names have three hexadecimal digits.
const maxCPUs = 1 << 12

// maxVirtio bounds the virtio devices, whose names have two digits. Interrupts run out before.
const maxVirtio = 1 << 8

// Config describes the guest.
type Config struct {
	// CPUs is the number of processors, with APIC IDs 0 to CPUs-1, all enabled.
	CPUs    int
	Power   Power
	Serial  []SerialPort
	Virtio  []VirtioMMIO
	VMGenID *VMGenID // nil: none
}

// ErrConfig is wrapped by every error about a Config that contradicts itself.
var ErrConfig = errors.New("acpi: invalid configuration")

// TooLargeError says that the tables do not fit; sizes are in bytes.
type TooLargeError struct{ Need, Have uint64 }

func (e *TooLargeError) Error() string {
	return fmt.Sprintf("acpi: the tables need %d bytes, and there is room for %d", e.Need, e.Have)
}

// Tables is what goes into guest memory: Data, at guest physical address Base. The root pointer, RSDP, is at Base too.
type Tables struct {
	Base uint64
	Data []byte
}

// RSDP is the address to pass to the guest's kernel.
func (t *Tables) RSDP() uint64 { return t.Base }

// tableAlign is the alignment of each table. The RSDP has to be on a 16-byte boundary, the others need none.
const tableAlign = 64

// Build lays the tables out for [base, base+room). base must be a multiple of 64 below 4 GiB. Errors: ErrConfig, and
// *TooLargeError.
func Build(cfg Config, base, room uint64) (*Tables, error) {
	if err := cfg.check(); err != nil {
		return nil, err
	}
	if base%tableAlign != 0 || base >= 1<<32 || base == 0 {
		return nil, fmt.Errorf("%w: tables at %#x", ErrConfig, base)
	}
	t := &Tables{Base: base, Data: make([]byte, align(rsdpSize))}
	dsdt := t.add(dsdt(&cfg))
	fadt := t.add(fadt(&cfg, dsdt))
	madt := t.add(madt(&cfg))
	xsdt := t.add(xsdt(fadt, madt))
	copy(t.Data, rsdp(xsdt))
	if n := uint64(len(t.Data)); n > room {
		return nil, &TooLargeError{Need: n, Have: room}
	}
	return t, nil
}

func align(n int) int { return (n + tableAlign - 1) &^ (tableAlign - 1) }

// add appends a table and returns its address.
func (t *Tables) add(table []byte) uint64 {
	addr := t.Base + uint64(len(t.Data))
	t.Data = append(t.Data, table...)
	t.Data = append(t.Data, make([]byte, align(len(table))-len(table))...)
	return addr
}

func (c *Config) check() error {
	if c.CPUs < 1 || c.CPUs > maxCPUs {
		return fmt.Errorf("%w: %d processors, of 1 to %d", ErrConfig, c.CPUs, maxCPUs)
	}
	if len(c.Virtio) > maxVirtio {
		return fmt.Errorf("%w: %d virtio devices, more than %d", ErrConfig, len(c.Virtio), maxVirtio)
	}
	for _, check := range []func() error{c.checkInterrupts, c.checkPorts, c.checkWindows} {
		if err := check(); err != nil {
			return err
		}
	}
	if g := c.VMGenID; g != nil && (g.Addr == 0 || g.Addr%8 != 0) {
		return fmt.Errorf("%w: VM generation ID at %#x", ErrConfig, g.Addr)
	}
	return nil
}

// checkInterrupts checks that every device has an interrupt of its own.
func (c *Config) checkInterrupts() error {
	var owner [IOAPICPins]string
	claim := func(gsi uint32, who string) error {
		if gsi >= IOAPICPins {
			return fmt.Errorf("%w: %s has GSI %d, of 0 to %d", ErrConfig, who, gsi, IOAPICPins-1)
		}
		if owner[gsi] != "" {
			return fmt.Errorf("%w: %s and %s share GSI %d", ErrConfig, owner[gsi], who, gsi)
		}
		owner[gsi] = who
		return nil
	}
	for i, s := range c.Serial {
		if err := claim(s.GSI, fmt.Sprintf("serial port %d", i)); err != nil {
			return err
		}
	}
	for i, v := range c.Virtio {
		if v.Trigger > Level {
			return fmt.Errorf("%w: virtio device %d has trigger %d", ErrConfig, i, v.Trigger)
		}
		if err := claim(v.GSI, fmt.Sprintf("virtio device %d", i)); err != nil {
			return err
		}
	}
	if c.VMGenID == nil {
		return nil
	}
	return claim(c.VMGenID.GSI, "the VM generation ID")
}

// span is a range of ports or addresses and who has it.
type span struct {
	who        string
	start, end uint64
}

// disjoint checks that no two spans overlap and none is empty or ends beyond limit.
func disjoint(spans []span, limit uint64) error {
	for i, s := range spans {
		if s.start == 0 || s.end <= s.start || s.end > limit {
			return fmt.Errorf("%w: %s at [%#x, %#x)", ErrConfig, s.who, s.start, s.end)
		}
		for _, o := range spans[:i] {
			if s.start < o.end && o.start < s.end {
				return fmt.Errorf("%w: %s at [%#x, %#x) overlaps %s at [%#x, %#x)",
					ErrConfig, s.who, s.start, s.end, o.who, o.start, o.end)
			}
		}
	}
	return nil
}

func (c *Config) checkPorts() error {
	one := func(who string, port uint16) span { return span{who, uint64(port), uint64(port) + 1} }
	spans := []span{
		one("sleep control", c.Power.SleepControl), one("sleep status", c.Power.SleepStatus), one("reset", c.Power.Reset),
	}
	for i, s := range c.Serial {
		spans = append(spans, span{fmt.Sprintf("serial port %d", i), uint64(s.Port), uint64(s.Port) + serialPorts})
	}
	return disjoint(spans, 1<<16)
}

func (c *Config) checkWindows() error {
	spans := []span{
		{"the I/O APIC", ioapicBase, ioapicBase + apicWindow}, {"the local APIC", lapicBase, lapicBase + apicWindow},
	}
	for i, v := range c.Virtio {
		spans = append(spans, span{fmt.Sprintf("virtio device %d", i), uint64(v.Base), uint64(v.Base) + uint64(v.Size)})
	}
	return disjoint(spans, 1<<32)
}

var le = binary.LittleEndian
