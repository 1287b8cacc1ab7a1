//go:build linux && amd64

package kvm

import (
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Interrupt controllers that IRQChip knows (KVM_IRQCHIP_*).
const (
	PICMaster uint32 = 0
	PICSlave  uint32 = 1
	IOAPIC    uint32 = 2
)

// IOAPICPins is the number of input pins of the IOAPIC.
const IOAPICPins = 24

// PITSpeakerDummy makes the timer answer for port 0x61 too.
const PITSpeakerDummy uint32 = 1

// CreateIRQChip creates both PICs and the IOAPIC, and gives every vCPU that is
// created later a local APIC. GSIs 0-15 go to PIC and IOAPIC, 16-23 to the
// IOAPIC, until SetGSIRouting says otherwise.
func (vm *VM) CreateIRQChip() error {
	_, err := ioctlVal(&vm.f, "KVM_CREATE_IRQCHIP", reqCreateIRQChip, 0)
	return err
}

// CreatePIT2 creates the i8254 timer; the interrupt controllers must exist.
func (vm *VM) CreatePIT2(flags uint32) error {
	return put(&vm.f, "KVM_CREATE_PIT2", reqCreatePIT2, pitConfig{flags: flags})
}

// PIT2 returns the state of the timer.
func (vm *VM) PIT2() (PITState, error) {
	return get[PITState](&vm.f, "KVM_GET_PIT2", reqGetPIT2)
}

// SetPIT2 sets the state of the timer.
func (vm *VM) SetPIT2(s PITState) error { return put(&vm.f, "KVM_SET_PIT2", reqSetPIT2, s) }

// IRQChip returns the state of an interrupt controller: PICMaster, PICSlave or
// IOAPIC.
func (vm *VM) IRQChip(id uint32) (IRQChipState, error) {
	s := IRQChipState{ChipID: id}
	_, err := ioctlPtr(&vm.f, fmt.Sprintf("KVM_GET_IRQCHIP %d", id), reqGetIRQChip, &s)
	return s, err
}

// SetIRQChip sets the state of the interrupt controller that s.ChipID names.
func (vm *VM) SetIRQChip(s IRQChipState) error {
	return put(&vm.f, fmt.Sprintf("KVM_SET_IRQCHIP %d", s.ChipID), reqSetIRQChip, s)
}

// IRQLine sets the level of a GSI's input: an edge is a call with true, then
// one with false.
func (vm *VM) IRQLine(gsi uint32, level bool) error {
	l := irqLevel{irq: gsi}
	if level {
		l.level = 1
	}
	return put(&vm.f, fmt.Sprintf("KVM_IRQ_LINE %d", gsi), reqIRQLine, l)
}

// MSI is a message signalled interrupt: a write of Data to Addr, encoded as in
// the Intel SDM, volume 3, "Message Signalled Interrupts".
type MSI struct {
	Addr uint64
	Data uint32
}

// SignalMSI sends a message signalled interrupt. It reports whether a vCPU
// took it; the guest may have blocked it.
func (vm *VM) SignalMSI(m MSI) (delivered bool, err error) {
	arg := msi{addressLo: uint32(m.Addr), addressHi: uint32(m.Addr >> 32), data: m.Data}
	n, err := ioctlPtr(&vm.f, "KVM_SIGNAL_MSI", reqSignalMSI, &arg)
	return n > 0, err
}

// GSIRoute says where a GSI goes. Make one with ChipRoute or MSIRoute.
type GSIRoute struct{ entry irqRoutingEntry }

// ChipRoute sends a GSI to a pin of an interrupt controller. A GSI may have
// such a route to a PIC and another to the IOAPIC.
func ChipRoute(gsi, chip, pin uint32) GSIRoute {
	return GSIRoute{irqRoutingEntry{gsi: gsi, kind: routeIRQChip, u: [8]uint32{chip, pin}}}
}

// MSIRoute makes a GSI send a message.
func MSIRoute(gsi uint32, m MSI) GSIRoute {
	return GSIRoute{irqRoutingEntry{
		gsi: gsi, kind: routeMSI,
		u: [8]uint32{uint32(m.Addr), uint32(m.Addr >> 32), m.Data},
	}}
}

// Kinds of routing entries (KVM_IRQ_ROUTING_*).
const (
	routeIRQChip = 1
	routeMSI     = 2
)

// SetGSIRouting replaces all routes of the machine, the default ones included.
func (vm *VM) SetGSIRouting(routes []GSIRoute) error {
	const wordsPerRoute = int(unsafe.Sizeof(irqRoutingEntry{}) / 8)
	// struct kvm_irq_routing in words: nr and flags, then the entries.
	words := make([]uint64, 1+len(routes)*wordsPerRoute)
	words[0] = uint64(len(routes))
	for i, r := range routes {
		*(*irqRoutingEntry)(unsafe.Pointer(&words[1+i*wordsPerRoute])) = r.entry
	}
	_, err := ioctlPtr(&vm.f, "KVM_SET_GSI_ROUTING", reqSetGSIRouting, unsafe.SliceData(words))
	return err
}

// irqfdDeassign is KVM_IRQFD_FLAG_DEASSIGN.
const irqfdDeassign = 1 << 0

// IRQFD makes a write to the eventfd raise an edge on the GSI, without this
// process taking part. KVM keeps a reference to the eventfd.
func (vm *VM) IRQFD(fd int, gsi uint32) error {
	return put(&vm.f, fmt.Sprintf("KVM_IRQFD gsi %d", gsi), reqIRQFD, irqfd{fd: uint32(fd), gsi: gsi})
}

// RemoveIRQFD undoes IRQFD with the same arguments.
func (vm *VM) RemoveIRQFD(fd int, gsi uint32) error {
	return put(&vm.f, fmt.Sprintf("KVM_IRQFD remove, gsi %d", gsi), reqIRQFD,
		irqfd{fd: uint32(fd), gsi: gsi, flags: irqfdDeassign})
}

// IOEvent is a guest write that signals an eventfd in place of an exit.
type IOEvent struct {
	FD   int
	Addr uint64 // guest physical address, or port with PIO
	Len  uint32 // length of the write: 1, 2, 4 or 8 bytes
	PIO  bool
	// Match restricts the event to writes of the value Data.
	Match bool
	Data  uint64
}

// Flags of struct kvm_ioeventfd.
const (
	ioeventDatamatch = 1 << 0
	ioeventPIO       = 1 << 1
	ioeventDeassign  = 1 << 2
)

// IOEventFD registers e. KVM keeps a reference to the eventfd.
func (vm *VM) IOEventFD(e IOEvent) error { return vm.ioeventfd(e, 0) }

// RemoveIOEventFD undoes IOEventFD with the same argument.
func (vm *VM) RemoveIOEventFD(e IOEvent) error { return vm.ioeventfd(e, ioeventDeassign) }

func (vm *VM) ioeventfd(e IOEvent, flags uint32) error {
	op := fmt.Sprintf("KVM_IOEVENTFD %#x", e.Addr)
	if e.FD < 0 {
		return &Error{Op: op, Err: unix.EBADF}
	}
	arg := ioeventfd{addr: e.Addr, length: e.Len, fd: int32(e.FD), flags: flags}
	if e.PIO {
		arg.flags |= ioeventPIO
	}
	if e.Match {
		arg.flags |= ioeventDatamatch
		arg.datamatch = e.Data
	}
	return put(&vm.f, op, reqIOEventFD, arg)
}
