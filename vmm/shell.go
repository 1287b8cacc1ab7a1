//go:build linux && amd64

package vmm

import (
	"errors"
	"fmt"

	"github.com/cryovisor/cryovisor/internal/kvm"
	"github.com/cryovisor/cryovisor/memory"
)

// Shell is a machine as far as it can be made without knowing what it is to run: a VM of KVM's, empty. Whoever is going to
// call Restore can make one while the snapshot is read. Its methods must not be called at the same time.
type Shell struct {
	sys       *kvm.System
	kvm       *kvm.VM
	supported []CPUIDEntry // what this host's KVM can show to a guest

	place *memory.Reservation // of the RAM, which KVM knows already; nil if it does not
	at    uintptr             // where that is
}

// NewShell makes a Shell. It fails as Probe does.
func NewShell() (*Shell, error) {
	sys, err := openKVM(kvm.DevicePath)
	if err != nil {
		return nil, err
	}
	s := &Shell{sys: sys}
	if err := s.build(); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

func (s *Shell) build() error {
	var err error
	if s.supported, err = supportedCPUID(s.sys); err != nil {
		return err
	}
	s.kvm, err = s.sys.CreateVM()
	return err
}

// Reserve says that the machine is to have so many bytes of RAM, and has KVM make its tables for that, which takes 0.4 ms or so for each GiB
// where KVM shadows page tables, and little where the processor nests them. The memory given to Restore must then be
// mapped at Reservation.
func (s *Shell) Reserve(memoryBytes uint64) error {
	if s.kvm == nil || s.place != nil {
		return fmt.Errorf("%w: the shell", ErrClosed)
	}
	place, err := memory.Reserve(memoryBytes)
	if err != nil {
		return err
	}
	s.place, s.at = place, place.HostAddr(0)
	return setSlots(s.kvm, memory.Layout(memoryBytes), 0, place.HostAddr)
}

// Reservation is where the machine's memory must be mapped: for memory.MapOptions. It is nil unless Reserve was called.
func (s *Shell) Reservation() *memory.Reservation { return s.place }

// CheckHost is CheckHost, without another look at the host's KVM.
func (s *Shell) CheckHost(state *State, hw Hardware) error {
	if err := checkMachine(state, hw); err != nil {
		return err
	}
	return checkCPUs(state, s.supported)
}

// Restore is Restore, on this Shell, which is used up, also if Restore fails.
func (s *Shell) Restore(state *State, mem *memory.Memory, hw Hardware) (*VM, error) {
	vm, err := s.restore(state, mem, hw)
	if err != nil {
		return nil, errors.Join(err, s.Close(), mem.Close())
	}
	return vm, nil
}

func (s *Shell) restore(state *State, mem *memory.Memory, hw Hardware) (*VM, error) {
	if s.kvm == nil {
		return nil, fmt.Errorf("%w: the shell", ErrClosed)
	}
	if err := state.check(mem); err != nil {
		return nil, err
	}
	if s.place != nil && s.at != mem.HostAddr(0) {
		return nil, fmt.Errorf("%w: the memory is not where the shell has reserved a place for it", ErrConfig)
	}
	if err := s.CheckHost(state, hw); err != nil {
		return nil, err
	}
	devices, err := rosterOf(state.Devices)
	if err != nil {
		return nil, err
	}
	vm, err := newVM(s, mem, len(state.VCPUs), hw, devices)
	if err != nil {
		return nil, err
	}
	if err := vm.restore(state); err != nil {
		return nil, errors.Join(err, vm.release())
	}
	vm.phase = phasePaused
	vm.begin()
	return vm, nil
}

// Close gives back what no Restore has used. It may be called more than once.
func (s *Shell) Close() error {
	var errs []error
	if s.kvm != nil {
		errs = append(errs, s.kvm.Close())
	}
	if s.sys != nil {
		errs = append(errs, s.sys.Close())
	}
	s.kvm, s.sys = nil, nil
	return errors.Join(append(errs, s.place.Close())...) // last: KVM knows its address
}
