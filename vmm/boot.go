//go:build linux && amd64

package vmm

import (
	"encoding/binary"
	"fmt"

	"github.com/cryovisor/cryovisor/internal/boot"
	"github.com/cryovisor/cryovisor/internal/kvm"
)

// boot loads what the machine is to run and sets its vCPUs to where it begins.
func (vm *VM) boot(b Boot) error {
	cpuid, err := vm.newCPUID()
	if err != nil {
		return err
	}
	for i, c := range vm.vcpus {
		if err := c.do(func() error { return c.setCPUID(vcpuCPUID(cpuid, i)) }); err != nil {
			return err
		}
	}
	switch b := b.(type) {
	case Linux:
		return vm.bootLinux(b)
	case Flat:
		return vm.bootFlat(b)
	case Program:
		return vm.bootProgram(b)
	default:
		return fmt.Errorf("%w: Boot is a %T; want Linux, Flat or Program", ErrConfig, b)
	}
}

func (vm *VM) bootLinux(l Linux) error {
	if err := checkInterpreted(vm.sys); err != nil {
		return err
	}
	if err := vm.newGenID(); err != nil {
		return err
	}
	rsdp, err := vm.describe()
	if err != nil {
		return err
	}
	loaded, err := boot.Load(vm.mem, boot.Config{
		Kernel:  boot.Image{ReaderAt: l.Kernel.ReaderAt, Size: l.Kernel.Size},
		Initrd:  boot.Image{ReaderAt: l.Initrd.ReaderAt, Size: l.Initrd.Size},
		Cmdline: l.Cmdline,
		MemSize: vm.mem.Size(),
		RSDP:    rsdp,
		Reset:   &resetByPort,
	})
	if err != nil {
		return fmt.Errorf("%w: %w", ErrConfig, err)
	}
	for _, c := range vm.vcpus {
		if err := c.do(c.firmware); err != nil {
			return err
		}
	}
	first := vm.vcpus[0]
	return first.do(func() error { return first.start(fromBootCPU(loaded.CPU)) })
}

func (vm *VM) bootFlat(f Flat) error {
	cpu, err := boot.LoadFlat(vm.mem, boot.Flat{
		Image: boot.Image{ReaderAt: f.Image.ReaderAt, Size: f.Image.Size},
		Base:  f.Base, Entry: f.Entry, MemSize: vm.mem.Size(),
	})
	if err != nil {
		return fmt.Errorf("%w: %w", ErrConfig, err)
	}
	first := vm.vcpus[0]
	return first.do(func() error { return first.start(fromBootCPU(cpu)) })
}

func (vm *VM) bootProgram(p Program) error {
	if p.Start == nil {
		return fmt.Errorf("%w: Program.Start is nil", ErrConfig)
	}
	for _, s := range p.Load {
		if _, err := vm.mem.WriteAt(s.Data, int64(s.GPA)); err != nil {
			return fmt.Errorf("%w: segment of %d bytes: %w", ErrConfig, len(s.Data), err)
		}
	}
	for i, c := range vm.vcpus {
		err := c.do(func() error {
			// Every vCPU begins on its own; none waits for a start-up interrupt.
			if err := c.cpu.SetMPState(kvm.MPRunnable); err != nil {
				return err
			}
			return c.start(p.Start(i))
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// Registers of the local APIC and what they are set to (Intel SDM, volume 3,
// 11.5.1).
const (
	apicLVT0   = 0x350
	apicLVT1   = 0x360
	apicMasked = 1 << 16
	apicNMI    = 4 << 8
)

// firmware leaves a vCPU as a PC's firmware leaves it to an operating system:
// NMIs connected to the local APIC, fast string operations on, memory write-back
// by default. The PIC is kept off it: hardware-reduced ACPI tells Linux that there
// is none, so that it would never program the vectors of a PIC that it left
// connected.
func (c *vcpu) firmware() error {
	lapic, err := c.cpu.LAPIC()
	if err != nil {
		return err
	}
	binary.LittleEndian.PutUint32(lapic.Regs[apicLVT0:], apicMasked)
	binary.LittleEndian.PutUint32(lapic.Regs[apicLVT1:], apicNMI)
	if err := c.cpu.SetLAPIC(lapic); err != nil {
		return err
	}
	const fastStrings, mtrrEnable, writeBack = 1, 1 << 11, 6
	return c.cpu.SetMSRs([]kvm.MSREntry{
		{Index: msrMiscEnable, Data: fastStrings},
		{Index: msrMTRRDefType, Data: mtrrEnable | writeBack},
	})
}

// start sets the registers with which a vCPU begins, on its thread.
func (c *vcpu) start(s CPUStart) error {
	if err := c.cpu.SetRegs(kvm.Regs(s.Regs)); err != nil {
		return err
	}
	sregs := toKVMSregs(s.Sregs)
	if sregs.ApicBase == 0 {
		now, err := c.cpu.Sregs()
		if err != nil {
			return err
		}
		sregs.ApicBase = now.ApicBase
	}
	if err := c.cpu.SetSregs(sregs); err != nil {
		return err
	}
	if s.XCR0 == 0 {
		return nil
	}
	xcrs, err := c.cpu.XCRS()
	if err != nil {
		return err
	}
	xcrs.NrXRCS = 1
	xcrs.Registers[0].XRC, xcrs.Registers[0].Value = 0, s.XCR0
	return c.cpu.SetXCRS(xcrs)
}

// newCPUID is what the vCPUs of a new guest get, before each gets its own id.
func (vm *VM) newCPUID() ([]CPUIDEntry, error) {
	supported, err := supportedCPUID(vm.sys)
	if err != nil {
		return nil, err
	}
	deadline, err := vm.sys.CheckExtension(kvm.CapTSCDeadlineTimer)
	if err != nil {
		return nil, err
	}
	return guestCPUID(supported, deadline != 0), nil
}

// supportedCPUID is what this host can give to a guest.
func supportedCPUID(sys *kvm.System) ([]CPUIDEntry, error) {
	entries, err := sys.SupportedCPUID()
	if err != nil {
		return nil, err
	}
	return fromKVMCPUID(entries), nil
}

func (c *vcpu) setCPUID(entries []CPUIDEntry) error {
	c.cpuid = entries
	return c.cpu.SetCPUID2(toKVMCPUID(entries))
}
