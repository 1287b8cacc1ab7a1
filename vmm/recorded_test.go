package vmm_test

import (
	"encoding/binary"
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/cryovisor/cryovisor/vmm"
)

// States of one moment of a worker guest with a vCPU, as three versions of the program would have written them. They were
// recorded by TestRecordDevices and are never written again.
const (
	// recorded has every device that needs no tap.
	recorded = "state-v1-devices.bin"
	// recordedOlder is what may be absent: the devices, the frequency of the TSC, all of the XSAVE area but its beginning.
	recordedOlder = "state-v1-older.bin"
	// recordedNewer has parts, in every section, that may be skipped.
	recordedNewer = "state-v1-newer.bin"
	// recordedCritical has one that may not.
	recordedCritical = "state-v1-critical.bin"
	// recordedDevice is the test guest's own device at that moment.
	recordedDevice = "state-v1-device.json"
)

func readRecorded(t testing.TB, name string) []vmm.Section {
	t.Helper()
	return unpackSections(readTestdata(t, name))
}

// skippable is a part that a later version might add to any section.
const skippable = 0x8000 | 40

// older takes from a state what a version might not have written.
func older(s *vmm.State) []vmm.Section {
	s.Devices = slices.DeleteFunc(s.Devices, func(d vmm.DeviceState) bool { return d.Name != "serial0" })
	for i := range s.VCPUs {
		v := &s.VCPUs[i]
		v.TSCKHz = 0
		v.XSave = v.XSave[:512+64] // x87 and SSE, and the header, which says that there is no more
		bv := binary.LittleEndian.Uint64(v.XSave[512:])
		binary.LittleEndian.PutUint64(v.XSave[512:], bv&3)
	}
	return s.Sections()
}

// newer adds to every section but the serial port's, which has no parts, one that may be skipped.
func newer(sections []vmm.Section) []vmm.Section {
	for i := range sections {
		if s := &sections[i]; s.Name != "vmm/device/serial0" {
			s.Data = slices.Clone(s.Data)
			addPart(skippable, "of a later version")(s)
		}
	}
	return sections
}

// critical adds a part that may not be skipped.
func critical(sections []vmm.Section, name string) []vmm.Section {
	for i := range sections {
		if s := &sections[i]; s.Name == name {
			s.Data = slices.Clone(s.Data)
			addPart(40, "of a later version")(s)
		}
	}
	return sections
}

// TestRecordedStatesParse: what older programs wrote, and newer ones as far as they allow, means the same for ever.
func TestRecordedStatesParse(t *testing.T) {
	want, err := vmm.ParseState(readRecorded(t, recorded))
	must(t, err)
	checkCanonical(t, want, readRecorded(t, recorded))
	var names []string
	for _, d := range want.Devices {
		names = append(names, d.Name)
	}
	if got := strings.Join(names, " "); got != "serial0 genid disk/data vsock rng balloon" {
		t.Errorf("devices %s", got)
	}
	for _, name := range []string{recordedOlder, recordedNewer} {
		s, err := vmm.ParseState(readRecorded(t, name))
		must(t, err)
		if s.VCPUs[0].Regs != want.VCPUs[0].Regs || s.VCPUs[0].Sregs != want.VCPUs[0].Sregs || s.Machine != want.Machine {
			t.Errorf("%s: another machine", name)
		}
	}
}

// TestRecordedCriticalRefused: what can't be skipped is refused as newer, wherever it is.
func TestRecordedCriticalRefused(t *testing.T) {
	check := func(name string, sections []vmm.Section) {
		t.Helper()
		s, err := vmm.ParseState(sections)
		if err == nil { // devices are looked into when they are restored
			err = vmm.CheckHost(s, vmm.Hardware{})
		}
		if !errors.Is(err, vmm.ErrStateVersion) {
			t.Errorf("%s: %v, want %v", name, err, vmm.ErrStateVersion)
		}
	}
	check(recordedCritical, readRecorded(t, recordedCritical))
	for _, name := range []string{"vmm/machine", "vmm/kvm", "vmm/vcpu/0", "vmm/device/disk/data", "vmm/device/rng"} {
		check("a part of "+name, critical(readRecorded(t, recorded), name))
	}
	check("a section", append(readRecorded(t, recorded), vmm.Section{Name: "vmm/nested", Version: 1}))
	for i, s := range readRecorded(t, recorded) {
		if s.Name == "vmm/device/serial0" || s.Name == "vmm/device/genid" {
			continue // versions of these are looked at by Restore alone, see TestRestoreRefuses
		}
		sections := readRecorded(t, recorded)
		sections[i].Version++
		check("version of "+s.Name, sections)
	}
}
