//go:build linux && amd64

package vmm

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/cryovisor/cryovisor/internal/kvm"
	"github.com/cryovisor/cryovisor/internal/serial"
	"github.com/cryovisor/cryovisor/internal/virtio/balloon"
	"github.com/cryovisor/cryovisor/memory"
)

// The serial port in a State. The version is of the section; the encoding in it
// has one of its own.
const (
	deviceSerial  = "serial0"
	serialVersion = 1
)

// consoleGrace is how long Close waits for the console's writer to take what the
// guest has written.
const consoleGrace = time.Second

// Guest physical addresses for KVM's own use on Intel processors, in the 32-bit
// hole, where RAM and devices never are.
const (
	identityMapGPA = 0xfffbc000
	tssGPA         = 0xfffbd000
)

// VM is a virtual machine. New and Restore make it; Close gives it back.
type VM struct {
	sys    *kvm.System
	kvm    *kvm.VM
	mem    *memory.Memory
	vcpus  []*vcpu
	pio    bus
	mmio   bus
	serial *serial.UART
	virtio []*virtioDevice
	genID  *genID // nil in a machine that did not boot Linux
	hw     Hardware

	balloon *balloon.Device // one of virtio, or nil
	track   tracking

	mu       sync.Mutex // held by the calls that change phase, and while they take
	phase    phase
	released bool // Close has been called
	launches uint64
	stopped  <-chan struct{} // closed when no vCPU runs the guest any more

	ended   chan struct{} // closed when the guest has ended
	endOnce sync.Once
	exit    error // why; set before ended is closed

	life      context.Context // ends when Close begins
	quit      context.CancelFunc
	stopInput func() // returns when the console's input is no longer read; nil if it is not
}

// New makes a machine and loads what it is to boot. It does not run before
// Start.
func New(cfg Config) (*VM, error) {
	if err := cfg.check(); err != nil {
		return nil, err
	}
	_, isLinux := cfg.Boot.(Linux)
	devices, err := cfg.roster(isLinux)
	if err != nil {
		return nil, err
	}
	if err := checkHostMemory(cfg.MemoryBytes, cfg.AllowOvercommit); err != nil {
		return nil, err
	}
	shell, err := NewShell()
	if err != nil {
		return nil, err
	}
	mem, err := memory.New(cfg.MemoryBytes, memory.Options{})
	if err != nil {
		return nil, errors.Join(err, shell.Close())
	}
	vm, err := newVM(shell, mem, cfg.VCPUs, cfg.Hardware, devices)
	if err != nil {
		return nil, errors.Join(err, mem.Close())
	}
	if err := vm.boot(cfg.Boot); err != nil {
		return nil, errors.Join(err, vm.release(), mem.Close())
	}
	vm.begin()
	return vm, nil
}

// newVM makes a machine without state. It takes the shell, and mem only if it succeeds.
func newVM(shell *Shell, mem *memory.Memory, vcpus int, hw Hardware, devices []place) (*VM, error) {
	vm := &VM{sys: shell.sys, kvm: shell.kvm, mem: mem, hw: hw, ended: make(chan struct{})}
	shell.sys, shell.kvm = nil, nil
	vm.life, vm.quit = context.WithCancel(context.Background())
	// Memory comes before what registers I/O ports with KVM: after that, Linux 6.18 and later make a change of slots wait for
	// two ticks of the host's clock, 8 ms at 250 Hz.
	var err error
	if shell.place == nil {
		err = vm.setSlots(0)
	}
	if err == nil {
		err = vm.build(vcpus, devices)
	}
	if err != nil {
		return nil, errors.Join(err, vm.release())
	}
	return vm, nil
}

func (vm *VM) build(vcpus int, devices []place) error {
	if err := vm.createKernelDevices(); err != nil {
		return err
	}
	if err := vm.createDevices(); err != nil {
		return err
	}
	if err := vm.createVirtio(devices); err != nil {
		return err
	}
	for id := range vcpus {
		c, err := vm.newVCPU(id)
		if err != nil {
			return err
		}
		vm.vcpus = append(vm.vcpus, c)
	}
	return nil
}

// setSlots gives KVM the RAM, each range in the slot of its index, or changes the
// flags of all slots.
func (vm *VM) setSlots(flags uint32) error {
	return setSlots(vm.kvm, vm.mem.Ranges(), flags, vm.mem.HostAddr)
}

func setSlots(vm *kvm.VM, ranges []memory.Range, flags uint32, host func(gpa uint64) uintptr) error {
	for slot, r := range ranges {
		if err := vm.SetUserMemoryRegion(uint32(slot), flags, r.GPA, r.Len, host(r.GPA)); err != nil {
			return err
		}
	}
	return nil
}

// createKernelDevices creates what KVM emulates in the kernel. The interrupt
// controllers must be there before the timer and the vCPUs.
func (vm *VM) createKernelDevices() error {
	if err := vm.kvm.SetIdentityMapAddr(identityMapGPA); err != nil {
		return err
	}
	if err := vm.kvm.SetTSSAddr(tssGPA); err != nil {
		return err
	}
	if err := vm.kvm.CreateIRQChip(); err != nil {
		return err
	}
	return vm.kvm.CreatePIT2(kvm.PITSpeakerDummy)
}

func (vm *VM) createDevices() error {
	vm.serial = serial.New(serial.Config{
		Out: vm.hw.Console.Out,
		IRQ: func(level bool) error { return vm.kvm.IRQLine(serial.COM1IRQ, level) },
	})
	for _, d := range []struct {
		name        string
		first, last uint64
		dev         ioDevice
	}{
		{"serial port", serial.COM1, serial.COM1 + serial.Ports - 1, serialPorts{vm.serial}},
		{"keyboard controller", portKeyboard, portKeyboard + 4, keyboard{}},
		{"power registers", portSleep, portReset, power{}},
		{"reset register", portResetCtl, portResetCtl, resetControl{}},
	} {
		if err := vm.pio.add(d.name, d.first, d.last, d.dev); err != nil {
			return err
		}
	}
	for _, p := range vm.hw.Ports {
		if p.Device == nil {
			return fmt.Errorf("%w: ports %#x-%#x have no device", ErrConfig, p.First, p.Last)
		}
		if err := vm.pio.add("embedder's ports", uint64(p.First), uint64(p.Last), embedderPorts{p.First, p.Device}); err != nil {
			return err
		}
	}
	return nil
}

// begin connects a complete machine to its surroundings.
func (vm *VM) begin() {
	// Called before a vCPU that waits for the page is let go, so that no
	// instruction runs on after the one that needs it.
	vm.mem.OnFail(func(err error) {
		vm.end(&ExitError{Kind: ErrGuestMemory, VCPU: -1, Cause: err})
	})
	vm.startBlockingInput()
}

// Memory returns the guest's memory. It belongs to the VM and is valid until
// Close.
func (vm *VM) Memory() *memory.Memory { return vm.mem }

// VCPUs returns how many vCPUs the VM has.
func (vm *VM) VCPUs() int { return len(vm.vcpus) }

// Close ends the VM if it runs and gives everything back: when it returns, no
// goroutine (but one in a Read or Write of the console that can't be interrupted),
// file descriptor or mapping of the VM is left. A Pause under way returns. Close
// may be called more than once.
func (vm *VM) Close() error {
	err := vm.Disconnect()
	vm.mu.Lock()
	defer vm.mu.Unlock()
	if vm.released {
		return err
	}
	vm.released = true
	return errors.Join(err, vm.releaseKVM(), vm.mem.Close())
}

// Disconnect is the first part of Close, which must follow: it ends the VM and gives
// back what another may be waiting for, its sockets, taps, disks and consoles. What is left
// is memory, and KVM's own, which takes KVM some 20 ms to destroy.
func (vm *VM) Disconnect() error {
	// Before the lock, which a Pause holds while it waits for a page that a vCPU
	// needs, or for the console.
	vm.end(ErrClosed)
	vm.quit()
	vm.mem.Fail(ErrClosed)
	vm.mu.Lock()
	defer vm.mu.Unlock()
	if vm.phase == phaseClosed {
		return nil
	}
	if vm.stopped != nil {
		<-vm.stopped
	}
	vm.phase = phaseClosed
	vm.endInput()
	return vm.releaseHardware()
}

// release gives back everything but the memory. No vCPU runs.
func (vm *VM) release() error { return errors.Join(vm.releaseHardware(), vm.releaseKVM()) }

func (vm *VM) releaseHardware() error {
	for _, c := range vm.vcpus {
		close(c.cmds)
		<-c.dead
	}
	vm.quit()
	err := vm.closeVirtio()
	if vm.serial != nil {
		ctx, cancel := context.WithTimeout(context.Background(), consoleGrace)
		// An error is about the console, whose output nobody may be reading.
		_ = vm.serial.Close(ctx)
		cancel()
	}
	vm.track.close()
	return err
}

func (vm *VM) releaseKVM() error { return errors.Join(vm.kvm.Close(), vm.sys.Close()) }
