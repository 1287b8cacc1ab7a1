//go:build linux && amd64

package vmm

import (
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cryovisor/cryovisor/internal/kvm"
	"github.com/cryovisor/cryovisor/internal/serial"
	"github.com/cryovisor/cryovisor/memory"
)

// Restore makes a paused VM of a state and of memory that holds (or will supply,
// when it is touched) what the guest's memory held at that moment. mem belongs
// to the VM from then on; if Restore fails it is closed.
//
// A host that can't run the guest is refused before anything is built: a CPU
// that lacks what the guest was given (CPUError), too little memory, a missing
// capability of KVM.
func Restore(state *State, mem *memory.Memory, hw Hardware) (*VM, error) {
	shell, err := NewShell()
	if err != nil {
		return nil, errors.Join(err, mem.Close())
	}
	return shell.Restore(state, mem, hw)
}

// CheckHost says whether this host can run the guest of a state, as Restore
// does, without building anything: before its memory is loaded, say. ErrConfig
// says that hw does not have the devices that the guest was booted with.
func CheckHost(state *State, hw Hardware) error {
	if err := checkMachine(state, hw); err != nil {
		return err
	}
	sys, err := openKVM(kvm.DevicePath)
	if err != nil {
		return err
	}
	defer sys.Close()
	supported, err := supportedCPUID(sys)
	if err != nil {
		return err
	}
	return checkCPUs(state, supported)
}

// checkMachine is the part of CheckHost that needs no KVM.
func checkMachine(state *State, hw Hardware) error {
	devices, err := rosterOf(state.Devices)
	if err != nil {
		return err
	}
	if err := hw.matches(devices); err != nil {
		return err
	}
	return checkHostMemory(state.Machine.MemoryBytes, hw.AllowOvercommit)
}

func checkCPUs(state *State, supported []CPUIDEntry) error {
	for i := range state.VCPUs {
		if err := checkCPU(state.VCPUs[i].CPUID, supported); err != nil {
			return err
		}
	}
	return nil
}

func (s *State) check(mem *memory.Memory) error {
	switch {
	case len(s.VCPUs) == 0 || len(s.VCPUs) > MaxVCPUs:
		return stateErrorf(sectionMachine, "%d vCPUs", len(s.VCPUs))
	case int(s.Machine.VCPUs) != len(s.VCPUs):
		return stateErrorf(sectionMachine, "%d vCPUs, but there is state of %d", s.Machine.VCPUs, len(s.VCPUs))
	case s.Machine.MemoryBytes != mem.Size():
		return stateErrorf(sectionMachine, "%d bytes of memory, but %d were given", s.Machine.MemoryBytes, mem.Size())
	}
	for i := range s.VCPUs {
		if s.VCPUs[i].ID != uint32(i) {
			return stateErrorf(fmt.Sprint(sectionVCPU, i), "it is of vCPU %d", s.VCPUs[i].ID)
		}
	}
	return nil
}

// restore sets everything, in the order that KVM needs: vCPUs, then the devices
// in the kernel, then our own.
func (vm *VM) restore(s *State) error {
	for i, c := range vm.vcpus {
		if err := c.do(func() error { return c.restore(&s.VCPUs[i]) }); err != nil {
			return vm.refused(fmt.Sprint(sectionVCPU, i), err)
		}
	}
	if err := vm.restoreKVM(&s.VM); err != nil {
		return vm.refused(sectionVM, err)
	}
	return vm.restoreDevices(s.Devices)
}

// refused gives an error of KVM's the kind that says what is to blame: guest
// memory that KVM needed and could not get, a register that this host's KVM does
// not have, or values that no processor can have.
func (vm *VM) refused(section string, err error) error {
	var msr *kvm.MSRError
	var host *HostError
	switch cause := vm.mem.Err(); {
	case cause != nil:
		return &ExitError{Kind: ErrGuestMemory, VCPU: -1, Detail: "while the state was restored", Cause: cause}
	case errors.As(err, &msr):
		return &HostError{
			Kind: ErrCapability, What: "model specific register", Cause: err,
			Do: "resume on a host with the same or a newer kernel, and the same kind of processor",
		}
	case errors.As(err, &host):
		return err // another host may take the state
	case errors.Is(err, unix.EINVAL):
		return fmt.Errorf("%w: %w", stateErrorf(section, "KVM refuses it"), err)
	}
	return err
}

// restoreKVM sets the devices in the kernel. The PIT comes last because setting it starts it: an interrupt that it raises
// before the PICs have their state would be overwritten there, and never acknowledged; and KVM raises no second
// one before that (its "reinject" mode).
func (vm *VM) restoreKVM(s *VMState) error {
	err := setABI("clock", s.Clock, func(c kvm.ClockData) error {
		// No flags: the guest's clock goes on from where it stopped, or from where
		// it would be now. What the kernel reported with it is not taken back.
		return vm.kvm.SetClock(kvm.ClockData{Clock: c.Clock + vm.advance(c)})
	})
	if err != nil {
		return err
	}
	for _, chip := range []struct {
		name string
		id   uint32
		data []byte
	}{
		{"PIC master", kvm.PICMaster, s.PICMaster},
		{"PIC slave", kvm.PICSlave, s.PICSlave},
		{"IOAPIC", kvm.IOAPIC, s.IOAPIC},
	} {
		err := setABI(chip.name, chip.data, func(c kvm.IRQChipState) error {
			if c.ChipID != chip.id {
				return stateErrorf(chip.name, "state of chip %d, want %d", c.ChipID, chip.id)
			}
			return vm.kvm.SetIRQChip(c)
		})
		if err != nil {
			return err
		}
	}
	return setABI("PIT", s.PIT, vm.kvm.SetPIT2)
}

// advance is by how many nanoseconds the guest's clock is to move on: not at all,
// or by the time since it was saved. A host whose clock is behind that of the one
// that saved it lets it stand.
func (vm *VM) advance(saved kvm.ClockData) uint64 {
	if !vm.hw.AdvanceClock || saved.Flags&kvm.ClockRealtime == 0 {
		return 0
	}
	return uint64(max(0, time.Now().UnixNano()-int64(saved.Realtime)))
}

func (vm *VM) restoreDevices(devices []DeviceState) error {
	hasSerial := false
	for _, d := range devices {
		restore := vm.restoreVirtio
		switch d.Name {
		case deviceSerial:
			restore, hasSerial = vm.restoreSerial, true
		case deviceGenID:
			restore = vm.restoreGenID
		}
		if err := restore(d); err != nil {
			return err
		}
	}
	if !hasSerial {
		return stateErrorf(sectionDevice+deviceSerial, "section is missing")
	}
	return nil
}

func (vm *VM) restoreSerial(d DeviceState) error {
	section := sectionDevice + d.Name
	if d.Version > serialVersion {
		return newerError(section, d.Version, serialVersion)
	}
	var s serial.State
	if err := s.UnmarshalBinary(d.Data); err != nil {
		if newer, ok := errors.AsType[*serial.StateVersionError](err); ok {
			return newerError(section, uint32(newer.Version), uint32(newer.Newest))
		}
		return stateErrorf(section, "%v", err)
	}
	return vm.serial.Restore(s)
}

// tscTolerance is how far, in parts per million, a host's TSC may be from the
// guest's before it has to be scaled; half of it is what NTP corrects at most.
const tscTolerance = 250

// restore sets the state of a vCPU, on its thread. REGS clears pending
// exceptions and so comes before the events; SREGS sets the APIC's base and so
// comes before the APIC; setting MSRs may use the APIC.
func (c *vcpu) restore(s *VCPUState) error {
	if err := c.restoreTSCFrequency(s.TSCKHz); err != nil {
		return err
	}
	if err := c.setCPUID(s.CPUID); err != nil {
		return err
	}
	if err := c.cpu.SetMPState(kvm.MPState(s.MPState)); err != nil {
		return err
	}
	if err := c.cpu.SetRegs(kvm.Regs(s.Regs)); err != nil {
		return err
	}
	if err := c.cpu.SetSregs(toKVMSregs(s.Sregs)); err != nil {
		return err
	}
	if err := c.restoreXSave(s.XSave); err != nil {
		return err
	}
	if err := setABI("XCRs", s.XCRs, c.cpu.SetXCRS); err != nil {
		return err
	}
	if err := setABI("debug registers", s.DebugRegs, c.cpu.SetDebugRegs); err != nil {
		return err
	}
	if err := setABI("LAPIC", s.LAPIC, c.cpu.SetLAPIC); err != nil {
		return err
	}
	if err := c.restoreMSRs(s); err != nil {
		return err
	}
	if err := setABI("events", s.Events, c.cpu.SetVCPUEvents); err != nil {
		return err
	}
	return c.tellStopped()
}

func (c *vcpu) restoreTSCFrequency(khz uint32) error {
	host, err := c.cpu.TSCKHz()
	if err != nil || khz == 0 {
		return err
	}
	diff := int64(host) - int64(khz)
	if max(diff, -diff)*1_000_000 <= int64(khz)*tscTolerance {
		return nil
	}
	if err := c.cpu.SetTSCKHz(khz); err != nil {
		return &HostError{
			Kind: ErrCPU, What: "the guest's time stamp counter runs at another frequency and this host can't scale it",
			Do: "resume on a host with TSC scaling or of the same frequency", Cause: err,
		}
	}
	return nil
}

// xstateBV is the offset of XSTATE_BV in the XSAVE header, which lists the
// state components that are not in their initial state (Intel SDM, volume 1,
// 13.4.2).
const xstateBV = 512

// restoreXSave fits an area of another host's size to this one's. What would be
// cut off must be unused.
func (c *vcpu) restoreXSave(area []byte) error {
	want := c.vm.kvm.XSaveSize()
	if len(area) < xstateBV+8 {
		return stateErrorf("XSAVE", "%d bytes", len(area))
	}
	if len(area) > want {
		used := binary.LittleEndian.Uint64(area[xstateBV:])
		for _, b := range area[want:] {
			if b != 0 {
				return &HostError{
					Kind: ErrCPU, What: "the guest has extended processor state that this host has no room for",
					Do:    "resume on a host with at least the same vector extensions",
					Cause: stateErrorf("XSAVE", "%d bytes, components %#x; this host has %d bytes", len(area), used, want),
				}
			}
		}
	}
	fitted := make([]byte, want)
	copy(fitted, area)
	return c.cpu.SetXSave(fitted)
}

// tscFar is a distance of TSC values that KVM does not take for clock skew.
const tscFar = 1 << 62

// restoreMSRs sets the registers, the TSC among them. KVM takes a TSC within a
// second of what another write makes it expect for an attempt to synchronize
// vCPUs, and keeps to the older write. That is right from the second vCPU on, and
// wrong for the first: before Linux 6.7, KVM counts its own write of 0 at the
// vCPU's creation, and the TSC of a guest that is younger than a second would go
// back. A value far from both comes between.
func (c *vcpu) restoreMSRs(s *VCPUState) error {
	if c.id == 0 {
		if err := c.cpu.SetMSRs([]kvm.MSREntry{{Index: msrTSC, Data: tscOf(s.MSRs) ^ tscFar}}); err != nil {
			return err
		}
	}
	if err := c.cpu.SetMSRs(toKVMMSRs(s.MSRs)); err != nil {
		return err
	}
	if s.TSCDeadline == 0 {
		return nil
	}
	return c.cpu.SetMSRs([]kvm.MSREntry{{Index: msrTSCDeadline, Data: s.TSCDeadline}})
}
