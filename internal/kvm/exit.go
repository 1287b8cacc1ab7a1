//go:build linux && amd64

package kvm

import (
	"fmt"
	"strconv"
	"unsafe"

	gokvm "github.com/bobuhiro11/gokvm/kvm"
)

// ExitReason says why Run returned (KVM_EXIT_*).
type ExitReason uint32

// Exit reasons.
const (
	ExitUnknown       = ExitReason(gokvm.EXITUNKNOWN)
	ExitException     = ExitReason(gokvm.EXITEXCEPTION)
	ExitIO            = ExitReason(gokvm.EXITIO)
	ExitHypercall     = ExitReason(gokvm.EXITHYPERCALL)
	ExitDebug         = ExitReason(gokvm.EXITDEBUG)
	ExitHLT           = ExitReason(gokvm.EXITHLT)
	ExitMMIO          = ExitReason(gokvm.EXITMMIO)
	ExitIRQWindowOpen = ExitReason(gokvm.EXITIRQWINDOWOPEN)
	ExitShutdown      = ExitReason(gokvm.EXITSHUTDOWN) // triple fault
	ExitFailEntry     = ExitReason(gokvm.EXITFAILENTRY)
	ExitIntr          = ExitReason(gokvm.EXITINTR) // signal or immediate exit
	ExitInternalError = ExitReason(gokvm.EXITINTERNALERROR)
	ExitSystemEvent   = ExitReason(24)
	ExitMemoryFault   = ExitReason(39)
)

// exitNames are the names of the kernel's documentation.
var exitNames = map[ExitReason]string{
	ExitUnknown: "UNKNOWN", ExitException: "EXCEPTION", ExitIO: "IO",
	ExitHypercall: "HYPERCALL", ExitDebug: "DEBUG", ExitHLT: "HLT", ExitMMIO: "MMIO",
	ExitIRQWindowOpen: "IRQ_WINDOW_OPEN", ExitShutdown: "SHUTDOWN", ExitFailEntry: "FAIL_ENTRY",
	ExitIntr: "INTR", ExitInternalError: "INTERNAL_ERROR", ExitSystemEvent: "SYSTEM_EVENT",
	ExitMemoryFault: "MEMORY_FAULT",
}

// String returns the kernel's name of the reason.
func (r ExitReason) String() string {
	if name, ok := exitNames[r]; ok {
		return "KVM_EXIT_" + name
	}
	return "KVM_EXIT_" + strconv.Itoa(int(r))
}

// Exit is what ended a Run: a view of the kvm_run page, valid until the next
// Run or Close. A method other than those of its Reason returns what the page
// holds, which means nothing.
type Exit struct {
	Reason ExitReason
	page   []byte
}

// run returns the page as gokvm lays it out: the header and, in Data, the union
// of which each reason has its own member.
func (e Exit) run() *gokvm.RunData {
	return (*gokvm.RunData)(unsafe.Pointer(unsafe.SliceData(e.page)))
}

// unionOffset is the offset in bytes of kvm_run's union.
const unionOffset = unsafe.Offsetof(gokvm.RunData{}.Data)

// IO is an access to a port (ExitIO).
type IO struct {
	// Out is true for OUT: Data holds what the guest wrote. For IN the device
	// fills Data, which the next Run gives to the guest.
	Out   bool
	Port  uint16
	Size  int    // bytes of one access: 1, 2 or 4
	Count int    // accesses: more than 1 for a repeated string instruction
	Data  []byte // Size*Count bytes of the kvm_run mapping
}

// IO returns the port access of an ExitIO.
func (e Exit) IO() (IO, error) {
	dir, size, port, count, offset := e.run().IO()
	mapped := uint64(len(e.page))
	// size and count have 8 and 32 bits, so their product does not overflow.
	if n := size * count; n == 0 || offset < runSize || offset > mapped || n > mapped-offset ||
		(size != 1 && size != 2 && size != 4) {
		return IO{}, &Error{
			Op:  "KVM_EXIT_IO",
			Err: fmt.Errorf("%w: %d times %d bytes at %#x of %#x", ErrBadExit, count, size, offset, mapped),
		}
	}
	end := offset + size*count
	return IO{
		Out: dir == gokvm.EXITIOOUT, Port: uint16(port), Size: int(size), Count: int(count),
		Data: e.page[offset:end:end],
	}, nil
}

// MMIO is an access to a guest physical address without memory (ExitMMIO).
type MMIO struct {
	Addr uint64
	// Write is true for a store: Data holds what the guest wrote. For a load the
	// device fills Data, which the next Run gives to the guest.
	Write bool
	Data  []byte // 1 to 8 bytes of the kvm_run mapping
}

// mmioDataOffset is where mmio.data is in kvm_run.
const mmioDataOffset = unionOffset + 8

// MMIO returns the memory access of an ExitMMIO.
func (e Exit) MMIO() (MMIO, error) {
	d := &e.run().Data
	n := uint64(uint32(d[2]))
	if n == 0 || n > 8 {
		return MMIO{}, &Error{Op: "KVM_EXIT_MMIO", Err: fmt.Errorf("%w: %d bytes at %#x", ErrBadExit, n, d[0])}
	}
	end := mmioDataOffset + uintptr(n)
	return MMIO{Addr: d[0], Write: uint8(d[2]>>32) != 0, Data: e.page[mmioDataOffset:end:end]}, nil
}

// Suberrors of an InternalError (KVM_INTERNAL_ERROR_*).
const (
	InternalEmulation      = 1 // KVM cannot emulate an instruction
	InternalSimulEx        = 2
	InternalDeliveryEv     = 3
	InternalUnexpectedExit = 4
)

// InternalError is KVM's failure to go on (ExitInternalError).
type InternalError struct {
	Suberror uint32
	Data     []uint64 // up to 16 words, whose meaning depends on Suberror; a copy
	// Insn holds the bytes at RIP that KVM could not emulate, for
	// InternalEmulation and if KVM gives them; nil otherwise.
	Insn []byte
}

// insnBytesValid is KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES.
const insnBytesValid = 1 << 0

// insnSizeOffset is where emulation_failure.insn_size is in kvm_run; insn_bytes
// is the next 15 bytes.
const (
	insnSizeOffset = unionOffset + 16
	insnMax        = 15
)

// InternalError returns the details of an ExitInternalError.
func (e Exit) InternalError() InternalError {
	d := &e.run().Data
	ie := InternalError{Suberror: uint32(d[0])}
	ndata := min(d[0]>>32, 16)
	ie.Data = append(ie.Data, d[1:1+ndata]...)
	// flags, insn_size and insn_bytes take three of the data words.
	if ie.Suberror == InternalEmulation && ndata >= 3 && d[1]&insnBytesValid != 0 {
		n := min(uintptr(e.page[insnSizeOffset]), insnMax)
		ie.Insn = append(ie.Insn, e.page[insnSizeOffset+1:insnSizeOffset+1+n]...)
	}
	return ie
}

// FailEntry is the processor's refusal to enter the guest (ExitFailEntry).
type FailEntry struct {
	Reason uint64 // hardware's number
	CPU    uint32 // host processor
}

// FailEntry returns the details of an ExitFailEntry.
func (e Exit) FailEntry() FailEntry {
	d := &e.run().Data
	return FailEntry{Reason: d[0], CPU: uint32(d[1])}
}

// HardwareReason returns the processor's exit number of an ExitUnknown.
func (e Exit) HardwareReason() uint64 { return e.run().Data[0] }

// Types of a SystemEvent (KVM_SYSTEM_EVENT_*).
const (
	EventShutdown = 1
	EventReset    = 2
	EventCrash    = 3
)

// SystemEvent is an event of the whole machine (ExitSystemEvent).
type SystemEvent struct {
	Type uint32
	Data []uint64 // up to 16 words; a copy
}

// SystemEvent returns the details of an ExitSystemEvent.
func (e Exit) SystemEvent() SystemEvent {
	d := &e.run().Data
	return SystemEvent{Type: uint32(d[0]), Data: append([]uint64(nil), d[1:1+min(d[0]>>32, 16)]...)}
}

// MemoryFault is an access to guest memory that KVM could not resolve
// (ExitMemoryFault, from Linux 6.8 on).
type MemoryFault struct {
	Flags uint64
	GPA   uint64
	Size  uint64 // bytes
}

// MemoryFault returns the details of an ExitMemoryFault.
func (e Exit) MemoryFault() MemoryFault {
	d := &e.run().Data
	return MemoryFault{Flags: d[0], GPA: d[1], Size: d[2]}
}
