package vmm

import (
	"fmt"
	"io"

	"github.com/cryovisor/cryovisor/memory"
)

// Limits of a machine.
const (
	// MaxVCPUs is how many vCPUs a machine may have: APIC ids are 8 bits wide,
	// and 255 is the broadcast.
	MaxVCPUs = 254
	// MinMemory is the least guest memory, in bytes.
	MinMemory = 1 << 20
	// MaxMemory is the most guest memory, in bytes (1 TiB).
	MaxMemory = 1 << 40
)

// Config describes a machine to be made by New.
type Config struct {
	// MemoryBytes is the guest's RAM, a multiple of 4096. RAM begins at guest
	// physical address 0 and leaves out the range from 3 to 4 GiB; what does not
	// fit below continues at 4 GiB.
	MemoryBytes uint64
	// VCPUs is the number of virtual processors; 0 means 1.
	VCPUs int
	// Boot is what runs first: Linux, Flat or Program.
	Boot Boot
	Hardware
}

// Hardware is the part of a machine that connects it to this process. It is not
// saved with a State and is given anew at Restore.
type Hardware struct {
	Console Console
	// Disks, NICs and Vsock are the devices that a guest with virtio drivers
	// finds. A guest that is resumed must be given those that it was booted with, by
	// name; the order does not matter then.
	Disks []Disk
	NICs  []NIC
	Vsock *Vsock
	// AdvanceClock lets the guest's clocks move on at Restore by the time that has
	// passed since the state was taken, so that its wall clock is right: all of
	// them, the monotonic one too, as if it had been suspended. Without it, that
	// time does not exist for the guest. It acts on KVM's clock (kvm-clock in
	// Linux), not on the TSC.
	AdvanceClock bool
	// Ports are the embedder's own I/O port devices. They must not overlap each
	// other or the machine's own ports (see ARCHITECTURE.md).
	Ports []Ports
	// AllowOvercommit lets a guest have more memory than the host has in all.
	AllowOvercommit bool
}

// Console connects the serial port COM1. Either side may be nil: no input, or
// output that is dropped.
type Console struct {
	// In is read while the VM lives, until it ends or fails. What was read and
	// not yet taken by the guest is saved with the serial port. Close interrupts a
	// Read if In has a SetReadDeadline that works, as pipes and connections have;
	// otherwise it leaves the blocked Read behind.
	In io.Reader
	// Out receives what the guest writes, from one goroutine. A slow Out slows
	// the guest's output down; one that fails is not used again, and the guest
	// runs on without it. Pause waits until Out has taken what the guest wrote.
	Out io.Writer
}

// Ports is a range of I/O ports, First to Last, that Device serves.
type Ports struct {
	First, Last uint16
	Device      PortDevice
}

// PortDevice is an I/O port device. Its methods are called on vCPU threads, by
// several vCPUs at once, and hold the vCPU until they return. data has 1, 2 or 4
// bytes and is valid during the call only. String instructions make one call for
// each element.
type PortDevice interface {
	In(port uint16, data []byte)
	Out(port uint16, data []byte)
}

// Boot is how a machine starts: Linux, Flat or Program.
type Boot interface{ isBoot() }

// File is a file of Size bytes. It is read while New runs.
type File struct {
	io.ReaderAt
	Size int64
}

// Linux boots a Linux kernel, a bzImage or an ELF vmlinux, by the 64-bit boot
// protocol (Linux, Documentation/arch/x86/boot.rst). It needs a KVM with hardware
// virtualization: New fails with ErrInterpreted without.
type Linux struct {
	Kernel  File
	Initrd  File // none if its Size is 0
	Cmdline string
}

// Flat starts an image without headers on vCPU 0, in 64-bit mode at CPL 0 with
// all of RAM mapped at its physical address, interrupts off and no IDT. Other
// vCPUs wait for INIT and SIPI.
type Flat struct {
	Image File
	Base  uint64 // guest physical address to load it at, 1 MiB or above
	Entry uint64 // address of its first instruction
}

// Program starts every vCPU in a state of the caller's making, for unikernels
// and tests.
type Program struct {
	Load []Segment
	// Start returns the state in which a vCPU begins.
	Start func(vcpu int) CPUStart
}

// Segment is bytes to be loaded at a guest physical address.
type Segment struct {
	GPA  uint64
	Data []byte
}

// CPUStart is the state in which a vCPU begins. XCR0 0 leaves XCR0 at its reset
// value (x87 only).
type CPUStart struct {
	Regs  Regs
	Sregs Sregs
	XCR0  uint64
}

func (Linux) isBoot()   {}
func (Flat) isBoot()    {}
func (Program) isBoot() {}

func (c *Config) check() error {
	if c.VCPUs == 0 {
		c.VCPUs = 1
	}
	switch {
	case c.MemoryBytes < MinMemory || c.MemoryBytes > MaxMemory || c.MemoryBytes%memory.PageSize != 0:
		return fmt.Errorf("%w: %d bytes of memory; want a multiple of %d from %d to %d",
			ErrConfig, c.MemoryBytes, memory.PageSize, uint64(MinMemory), uint64(MaxMemory))
	case c.VCPUs < 0 || c.VCPUs > MaxVCPUs:
		return fmt.Errorf("%w: %d vCPUs; want 1 to %d", ErrConfig, c.VCPUs, MaxVCPUs)
	case c.Boot == nil:
		return fmt.Errorf("%w: Boot is nil; want Linux, Flat or Program", ErrConfig)
	}
	return nil
}
