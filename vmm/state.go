package vmm

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
)

// State is everything of a paused VM but its memory and disks: plain data that
// shares nothing with the VM that it was taken from.
type State struct {
	Machine MachineState
	VM      VMState
	VCPUs   []VCPUState
	Devices []DeviceState
}

// MachineState is what a VM was built with.
type MachineState struct {
	MemoryBytes uint64
	VCPUs       uint32
}

// VMState is the state of KVM's in-kernel devices, as struct kvm_pit_state2,
// kvm_clock_data and kvm_irqchip (Linux, include/uapi/linux/kvm.h), padding
// included.
type VMState struct {
	PIT                         []byte
	Clock                       []byte
	PICMaster, PICSlave, IOAPIC []byte
}

// VCPUState is the state of one vCPU. Byte slices are KVM ABI structs as the
// kernel fills them: XSave (kvm_xsave, as long as the host's XSAVE area), XCRs
// (kvm_xcrs), DebugRegs (kvm_debugregs), LAPIC (the APIC's register page) and
// Events (kvm_vcpu_events).
type VCPUState struct {
	ID      uint32
	MPState uint32 // KVM_MP_STATE_*
	TSCKHz  uint32
	Regs    Regs
	Sregs   Sregs
	CPUID   []CPUIDEntry
	MSRs    []MSR
	// TSCDeadline is kept apart from MSRs because it is restored after them.
	TSCDeadline                           uint64
	XSave, XCRs, DebugRegs, LAPIC, Events []byte
}

// DeviceState is the state of one device of the VMM in its own, versioned
// encoding.
type DeviceState struct {
	Name    string // as in Section names, without the prefix
	Version uint32
	Data    []byte
}

// Section is a named, versioned part of an encoded State. A snapshot stores
// sections without knowing what is in them.
type Section struct {
	Name    string
	Version uint32
	Data    []byte
}

// Section names. Their version is that of the encoding in codec.go, a device's is
// its own.
const (
	sectionPrefix  = "vmm/"
	sectionMachine = "vmm/machine"
	sectionVM      = "vmm/kvm"
	sectionVCPU    = "vmm/vcpu/"   // + index
	sectionDevice  = "vmm/device/" // + name

	stateVersion = 1
)

// Sections encodes the state, in a canonical order.
func (s *State) Sections() []Section {
	out := []Section{
		{sectionMachine, stateVersion, s.Machine.encode()},
		{sectionVM, stateVersion, s.VM.encode()},
	}
	for i := range s.VCPUs {
		out = append(out, Section{fmt.Sprintf("%s%d", sectionVCPU, i), stateVersion, s.VCPUs[i].encode()})
	}
	for _, d := range s.Devices {
		out = append(out, Section{sectionDevice + d.Name, d.Version, d.Data})
	}
	return out
}

// ParseState decodes what Sections returned. Sections whose names do not begin
// with "vmm/" belong to others and are ignored; one that does and is not known is
// a newer program's, and refused, because what it says would be lost. ParseState fails with ErrState or
// ErrStateVersion. It does not look into the devices' own encodings: Restore does.
func ParseState(sections []Section) (*State, error) {
	s := &State{}
	byName := make(map[string]Section, len(sections))
	for _, sec := range sections {
		if _, dup := byName[sec.Name]; dup {
			return nil, stateErrorf(sec.Name, "section occurs twice")
		}
		byName[sec.Name] = sec
	}
	if err := takeSection(byName, sectionMachine, s.Machine.decode); err != nil {
		return nil, err
	}
	if err := takeSection(byName, sectionVM, s.VM.decode); err != nil {
		return nil, err
	}
	if n := s.Machine.VCPUs; n == 0 || n > MaxVCPUs {
		return nil, stateErrorf(sectionMachine, "%d vCPUs", n)
	}
	s.VCPUs = make([]VCPUState, s.Machine.VCPUs)
	for i := range s.VCPUs {
		name := fmt.Sprintf("%s%d", sectionVCPU, i)
		if err := takeSection(byName, name, s.VCPUs[i].decode); err != nil {
			return nil, err
		}
	}
	for _, sec := range sections {
		if device, ok := strings.CutPrefix(sec.Name, sectionDevice); ok && device != "" {
			s.Devices = append(s.Devices, DeviceState{device, sec.Version, bytes.Clone(sec.Data)})
			continue
		}
		if _, left := byName[sec.Name]; left && strings.HasPrefix(sec.Name, sectionPrefix) {
			return nil, unknownError(sec.Name, len(s.VCPUs))
		}
	}
	return s, nil
}

// takeSection decodes a section and removes it from byName.
func takeSection(byName map[string]Section, name string, decode func([]byte) error) error {
	sec, ok := byName[name]
	delete(byName, name)
	switch {
	case !ok:
		return stateErrorf(name, "section is missing")
	case sec.Version == 0:
		return stateErrorf(name, "version 0")
	case sec.Version > stateVersion:
		return newerError(name, sec.Version, stateVersion)
	}
	return sectionError(name, decode(sec.Data))
}

// sectionError is what is wrong with the parts of a section: a newer program wrote them, or nobody did.
func sectionError(section string, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, ErrStateVersion):
		return fmt.Errorf("section %s: %w", section, err)
	}
	return stateErrorf(section, "%v", err)
}

// unknownError is why a section of this package's is refused. There are no vCPUs but those of the machine, nor devices without
// a name, in any version.
func unknownError(section string, vcpus int) error {
	if strings.HasPrefix(section, sectionVCPU) || section == sectionDevice {
		return stateErrorf(section, "it belongs to none of the %d vCPUs or devices", vcpus)
	}
	return fmt.Errorf("%w: section %s is not known to this program; update it", ErrStateVersion, section)
}

func newerError(section string, version, known uint32) error {
	return fmt.Errorf("%w: section %s has version %d, this program knows %d; update it",
		ErrStateVersion, section, version, known)
}

func stateErrorf(section, format string, args ...any) error {
	return fmt.Errorf("%w: section %s: %s", ErrState, section, fmt.Sprintf(format, args...))
}
