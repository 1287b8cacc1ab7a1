//go:build linux && amd64

package vmm

import (
	"errors"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cryovisor/cryovisor/internal/kvm"
)

// State reads the state of a paused VM. The VM stays paused and is not changed
// by it, so that it can run on, or be read again.
func (vm *VM) State() (*State, error) {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	if err := vm.require(phasePaused); err != nil {
		return nil, err
	}
	s := &State{
		Machine: MachineState{MemoryBytes: vm.mem.Size(), VCPUs: uint32(len(vm.vcpus))},
		VCPUs:   make([]VCPUState, len(vm.vcpus)),
	}
	// Devices first: what they do while they settle may raise interrupts, which
	// must be in the state of the interrupt controllers.
	var err error
	if s.Devices, err = vm.saveDevices(); err != nil {
		return nil, err
	}
	for i, c := range vm.vcpus {
		if err := c.do(func() error { return c.save(&s.VCPUs[i]) }); err != nil {
			return nil, err
		}
	}
	return s, vm.saveKVM(&s.VM)
}

func (vm *VM) saveDevices() ([]DeviceState, error) {
	state := vm.serial.Save()
	data, err := state.MarshalBinary()
	if err != nil {
		return nil, err
	}
	devices := []DeviceState{{Name: deviceSerial, Version: serialVersion, Data: data}}
	devices = append(devices, vm.saveGenID()...)
	more, err := vm.saveVirtio()
	return append(devices, more...), err
}

func (vm *VM) saveKVM(s *VMState) error {
	var errs [5]error
	s.PIT, errs[0] = getABI(vm.kvm.PIT2)
	s.Clock, errs[1] = getABI(vm.clock)
	s.PICMaster, errs[2] = getABI(vm.irqChip(kvm.PICMaster))
	s.PICSlave, errs[3] = getABI(vm.irqChip(kvm.PICSlave))
	s.IOAPIC, errs[4] = getABI(vm.irqChip(kvm.IOAPIC))
	return errors.Join(errs[:]...)
}

// clock is KVM's clock of the guest and the wall clock of the same moment, which
// KVM reports only where it derives both from the TSC.
func (vm *VM) clock() (kvm.ClockData, error) {
	c, err := vm.kvm.Clock()
	if err == nil && c.Flags&kvm.ClockRealtime == 0 {
		c.Flags, c.Realtime = c.Flags|kvm.ClockRealtime, uint64(time.Now().UnixNano())
	}
	return c, err
}

func (vm *VM) irqChip(id uint32) func() (kvm.IRQChipState, error) {
	return func() (kvm.IRQChipState, error) { return vm.kvm.IRQChip(id) }
}

// save reads the state of a vCPU, on its thread. The order matters: reading
// MP_STATE settles pending events of the APIC, and the events are read last,
// when nothing can change them any more.
func (c *vcpu) save(s *VCPUState) error {
	s.ID = uint32(c.id)
	mp, err := c.cpu.MPState()
	if err != nil {
		return err
	}
	s.MPState = uint32(mp)
	regs, err := c.cpu.Regs()
	if err != nil {
		return err
	}
	s.Regs = Regs(regs)
	sregs, err := c.cpu.Sregs()
	if err != nil {
		return err
	}
	s.Sregs = fromKVMSregs(sregs)
	if s.XSave, err = c.cpu.XSave(); err != nil {
		return err
	}
	if s.XCRs, err = getABI(c.cpu.XCRS); err != nil {
		return err
	}
	if s.DebugRegs, err = getABI(c.cpu.DebugRegs); err != nil {
		return err
	}
	if s.LAPIC, err = getABI(c.cpu.LAPIC); err != nil {
		return err
	}
	if s.TSCKHz, err = c.cpu.TSCKHz(); err != nil {
		return err
	}
	s.CPUID = c.cpuid
	if err := c.saveMSRs(s); err != nil {
		return err
	}
	s.Events, err = getABI(c.cpu.VCPUEvents)
	return err
}

// Model specific registers that need care (Intel SDM, volume 4).
const (
	msrTSC         = 0x10
	msrMiscEnable  = 0x1a0
	msrMTRRDefType = 0x2ff
	msrTSCDeadline = 0x6e0
)

// msrExtra are registers that CPUID implies and that KVM's own list leaves out
// on some kernels: the MTRRs (Intel SDM, volume 3, 12.11).
var msrExtra = func() []uint32 {
	list := []uint32{0x250, 0x258, 0x259, msrMTRRDefType}
	for i := uint32(0x200); i < 0x210; i++ {
		list = append(list, i)
	}
	for i := uint32(0x268); i < 0x270; i++ {
		list = append(list, i)
	}
	return list
}()

// savedMSRs returns the registers to save: KVM's list and msrExtra, less those
// that this vCPU does not have.
func (c *vcpu) savedMSRs() ([]uint32, error) {
	candidates, err := c.vm.sys.MSRIndexList()
	if err != nil {
		return nil, err
	}
	candidates = append(candidates, msrExtra...)
	slices.Sort(candidates)
	candidates = slices.Compact(candidates)
	candidates = slices.DeleteFunc(candidates, func(i uint32) bool { return i == msrTSCDeadline })
	for at := 0; ; {
		_, err := c.cpu.MSRs(candidates[at:])
		var refused *kvm.MSRError
		if !errors.As(err, &refused) {
			return candidates, err
		}
		at += refused.Position
		candidates = slices.Delete(candidates, at, at+1)
	}
}

func (c *vcpu) saveMSRs(s *VCPUState) error {
	if c.msrs == nil {
		list, err := c.savedMSRs()
		if err != nil {
			return err
		}
		c.msrs = list
	}
	entries, err := c.cpu.MSRs(c.msrs)
	if err != nil {
		return err
	}
	s.MSRs = fromKVMMSRs(entries)
	deadline, err := c.cpu.MSRs([]uint32{msrTSCDeadline})
	var refused *kvm.MSRError
	switch {
	case errors.As(err, &refused):
		return nil // a processor without that timer
	case err != nil:
		return err
	}
	s.TSCDeadline = deadline[0].Data
	if s.TSCDeadline == 0 {
		// The timer is off, or has just fired and its interrupt is not yet in the
		// APIC's registers, where it would be lost: a deadline in the past fires at
		// once if the guest uses the timer, and does nothing otherwise.
		s.TSCDeadline = tscOf(s.MSRs)
	}
	return nil
}

func tscOf(msrs []MSR) uint64 {
	for _, m := range msrs {
		if m.Index == msrTSC {
			return m.Value
		}
	}
	return 0
}

// tellStopped tells a guest that uses kvmclock that it was stopped, so that its
// watchdogs don't take the time for a lock-up. EINVAL says that it does not.
func (c *vcpu) tellStopped() error {
	err := c.cpu.KVMClockCtrl()
	if errors.Is(err, unix.EINVAL) {
		return nil
	}
	return err
}
