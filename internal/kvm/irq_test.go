//go:build linux && amd64

package kvm

import (
	"encoding/binary"
	"errors"
	"testing"

	"golang.org/x/sys/unix"
)

// waitForInterrupt enables interrupts and sleeps; handlers are at handlerGPA.
var waitForInterrupt = []byte{
	0xfb,       // sti
	0xf4,       // hlt
	0xeb, 0xfd, // jmp to hlt
}

const handlerGPA = 0x1100

// newInterruptMachine makes a machine whose guest waits for interrupts, with a
// handler for the vector that writes the vector to port 0xe1.
func newInterruptMachine(t *testing.T, vector byte) *machine {
	t.Helper()
	m := newMachine(t, waitForInterrupt)
	m.setVector(vector, handlerGPA)
	copy(m.ram[handlerGPA:], []byte{0xb0, vector, 0xe6, 0xe1, 0xf4}) // mov al, vector; out 0xe1, al; hlt
	return m
}

// usePIC makes the master PIC deliver its inputs from vector 0x20 on, as a
// BIOS would program it.
func (m *machine) usePIC(t *testing.T) {
	t.Helper()
	s := must1(m.vm.IRQChip(PICMaster))(t)
	s.Chip[2], s.Chip[5] = 0, 0x20 // imr, irq_base
	must(t, m.vm.SetIRQChip(s))
}

// useLAPIC enables the local APIC, which then takes messages.
func (m *machine) useLAPIC(t *testing.T) {
	t.Helper()
	l := must1(m.vcpu.LAPIC())(t)
	binary.LittleEndian.PutUint32(l.Regs[0xf0:], 0x1ff) // spurious vector, enabled
	must(t, m.vcpu.SetLAPIC(l))
}

// message is an MSI to the first vCPU.
func message(vector byte) MSI { return MSI{Addr: 0xfee00000, Data: uint32(vector)} }

func eventfd(t *testing.T) int {
	t.Helper()
	fd := must1(unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK))(t)
	t.Cleanup(func() { must(t, unix.Close(fd)) })
	return fd
}

func signal(t *testing.T, fd int) {
	t.Helper()
	_ = must1(unix.Write(fd, []byte{1, 0, 0, 0, 0, 0, 0, 0}))(t)
}

// signalled returns how often an eventfd was signalled since the last call.
func signalled(t *testing.T, fd int) uint64 {
	t.Helper()
	var b [8]byte
	if _, err := unix.Read(fd, b[:]); errors.Is(err, unix.EAGAIN) {
		return 0
	} else {
		must(t, err)
	}
	return binary.LittleEndian.Uint64(b[:])
}

func TestIRQLine(t *testing.T) {
	m := newInterruptMachine(t, 0x25)
	m.usePIC(t)
	must(t, m.vm.IRQLine(5, true))
	must(t, m.vm.IRQLine(5, false))
	m.expectOut(t, 0xe1, 0x25)
}

func TestSignalMSI(t *testing.T) {
	m := newInterruptMachine(t, 0x41)
	if delivered := must1(m.vm.SignalMSI(message(0x41)))(t); delivered {
		t.Error("a disabled local APIC took a message")
	}
	m.useLAPIC(t)
	if delivered := must1(m.vm.SignalMSI(message(0x41)))(t); !delivered {
		t.Error("the local APIC took no message")
	}
	m.expectOut(t, 0xe1, 0x41)
}

func TestIRQFD(t *testing.T) {
	m := newInterruptMachine(t, 0x26)
	m.usePIC(t)
	fd := eventfd(t)
	must(t, m.vm.IRQFD(fd, 6))
	signal(t, fd)
	m.expectOut(t, 0xe1, 0x26)
	must(t, m.vm.RemoveIRQFD(fd, 6))
	signal(t, fd)
	if n := signalled(t, fd); n != 1 {
		t.Errorf("KVM still reads the eventfd: it holds %d", n)
	}
	var ke *Error
	if err := m.vm.IRQFD(-1, 6); !errors.As(err, &ke) || !errors.Is(err, unix.EBADF) {
		t.Errorf("no descriptor: %v", err)
	}
}

func TestRoutingToMessage(t *testing.T) {
	m := newInterruptMachine(t, 0x52)
	m.useLAPIC(t)
	const gsi = 40
	must(t, m.vm.SetGSIRouting([]GSIRoute{
		ChipRoute(5, PICMaster, 5), ChipRoute(5, IOAPIC, 5), MSIRoute(gsi, message(0x52)),
	}))
	fd := eventfd(t)
	must(t, m.vm.IRQFD(fd, gsi))
	signal(t, fd)
	m.expectOut(t, 0xe1, 0x52)
	must(t, m.vm.SetGSIRouting(nil))
	bad := ChipRoute(5, 9, 5)
	if err := m.vm.SetGSIRouting([]GSIRoute{bad}); !errors.Is(err, unix.EINVAL) {
		t.Errorf("a route to nowhere: %v", err)
	}
}

func TestRoutingToIOAPIC(t *testing.T) {
	m := newInterruptMachine(t, 0x63)
	m.useLAPIC(t)
	must(t, m.vm.SetGSIRouting([]GSIRoute{ChipRoute(33, IOAPIC, 7)}))
	s := must1(m.vm.IRQChip(IOAPIC))(t)
	binary.LittleEndian.PutUint64(s.Chip[24+8*7:], 0x63) // pin 7: fixed, edge, vector 0x63 to APIC 0
	must(t, m.vm.SetIRQChip(s))
	must(t, m.vm.IRQLine(33, true))
	must(t, m.vm.IRQLine(33, false))
	m.expectOut(t, 0xe1, 0x63)
}

func TestIOEventFD(t *testing.T) {
	m := newMachine(t, []byte{
		0xb0, 0x07, // mov al, 7
		0xe6, 0xe5, // out 0xe5, al: an event
		0xe6, 0xe6, // out 0xe6, al: matches 7, an event
		0xb8, 0x00, 0xf0, // mov ax, 0xf000
		0x8e, 0xd8, // mov ds, ax
		0xa3, 0x40, 0x00, // mov [0x40], ax: an event
		0xb0, 0x08, // mov al, 8
		0xe6, 0xe6, // out 0xe6, al: does not match
		0xe6, 0xe5, // out 0xe5, al: by then no event
	})
	port, match, memory := eventfd(t), eventfd(t), eventfd(t)
	atPort := IOEvent{FD: port, Addr: 0xe5, Len: 1, PIO: true}
	events := []IOEvent{
		atPort,
		{FD: match, Addr: 0xe6, Len: 1, PIO: true, Match: true, Data: 7},
		{FD: memory, Addr: 0xf0040, Len: 2},
	}
	for _, e := range events {
		must(t, m.vm.IOEventFD(e))
	}
	if err := m.vm.IOEventFD(atPort); !errors.Is(err, unix.EEXIST) {
		t.Errorf("twice the same: %v", err)
	}
	m.expectOut(t, 0xe6, 8)
	for i, e := range events {
		if n := signalled(t, e.FD); n != 1 {
			t.Errorf("event %d was signalled %d times", i, n)
		}
		must(t, m.vm.RemoveIOEventFD(e))
	}
	m.expectOut(t, 0xe5, 8)
	if err := m.vm.IOEventFD(IOEvent{FD: -1, Addr: 0xe5, Len: 1, PIO: true}); !errors.Is(err, unix.EBADF) {
		t.Errorf("no descriptor: %v", err)
	}
}
