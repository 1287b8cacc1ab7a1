package vmm_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"reflect"
	"strings"
	"testing"

	"github.com/cryovisor/cryovisor/vmm"
)

// someState is a state in which every field is set, each differently.
func someState() *vmm.State {
	n := uint64(0)
	next := func() uint64 { n++; return n * 0x0101010101010101 }
	blob := func(size int) []byte {
		b := make([]byte, size)
		for i := range b {
			b[i] = byte(next())
		}
		return b
	}
	s := &vmm.State{
		Machine: vmm.MachineState{MemoryBytes: 64 << 20, VCPUs: 2},
		VM:      vmm.VMState{PIT: blob(112), Clock: blob(48), PICMaster: blob(52), PICSlave: blob(52), IOAPIC: blob(52)},
		Devices: []vmm.DeviceState{{Name: "serial0", Version: 1, Data: blob(20)}, {Name: "other", Version: 3}},
	}
	for id := range s.Machine.VCPUs {
		v := vmm.VCPUState{
			ID: id, MPState: uint32(next()), TSCKHz: uint32(next()), TSCDeadline: next(),
			CPUID: []vmm.CPUIDEntry{{Function: uint32(next()), EDX: uint32(next())}, {Index: uint32(next()), Flags: 1}},
			MSRs:  []vmm.MSR{{Index: uint32(next()), Value: next()}},
			XSave: blob(576), XCRs: blob(40), DebugRegs: blob(128), LAPIC: blob(64), Events: blob(64),
		}
		setAll(reflect.ValueOf(&v.Regs).Elem(), next)
		setAll(reflect.ValueOf(&v.Sregs).Elem(), next)
		s.VCPUs = append(s.VCPUs, v)
	}
	return s
}

// setAll sets every number in v.
func setAll(v reflect.Value, next func() uint64) {
	switch v.Kind() {
	case reflect.Struct:
		for i := range v.NumField() {
			setAll(v.Field(i), next)
		}
	case reflect.Array:
		for i := range v.Len() {
			setAll(v.Index(i), next)
		}
	default:
		v.SetUint(next() & (1<<v.Type().Bits() - 1))
	}
}

func TestStateRoundTrip(t *testing.T) {
	want := someState()
	sections := want.Sections()
	got, err := vmm.ParseState(sections)
	if err != nil {
		t.Fatal(err)
	}
	// An absent device encoding is the same as an empty one.
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, want %+v", got, want)
	}
	// The state must not share memory with the sections.
	for _, s := range sections {
		clear(s.Data)
	}
	if !reflect.DeepEqual(got, someState()) {
		t.Error("the state changed with the sections that it was parsed from")
	}
}

// TestStateEncoding pins the layout of version 1 of a small section.
func TestStateEncoding(t *testing.T) {
	s := vmm.State{Machine: vmm.MachineState{MemoryBytes: 0x0807060504030201, VCPUs: 2}}
	want := []byte{
		1, 0, 8, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8,
		2, 0, 4, 0, 0, 0, 2, 0, 0, 0,
	}
	got := s.Sections()[0]
	if got.Name != "vmm/machine" || got.Version != 1 || !bytes.Equal(got.Data, want) {
		t.Errorf("%+v, want vmm/machine, version 1, %x", got, want)
	}
}

func TestParseStateIgnoresSectionsOfOthers(t *testing.T) {
	s := append([]vmm.Section{{Name: "app/notes", Version: 99, Data: []byte("x")}}, someState().Sections()...)
	got, err := vmm.ParseState(s)
	if err != nil || !reflect.DeepEqual(got, someState()) {
		t.Errorf("%v, %+v", err, got)
	}
}

// edit returns the sections of someState, one of them changed.
func edit(name string, f func(*vmm.Section)) []vmm.Section {
	sections := someState().Sections()
	for i := range sections {
		if sections[i].Name == name {
			f(&sections[i])
		}
	}
	return sections
}

func addPart(tag uint16, data string) func(*vmm.Section) {
	return func(s *vmm.Section) {
		s.Data = binary.LittleEndian.AppendUint16(s.Data, tag)
		s.Data = binary.LittleEndian.AppendUint32(s.Data, uint32(len(data)))
		s.Data = append(s.Data, data...)
	}
}

func TestParseStateSkipsWhatMayBeSkipped(t *testing.T) {
	for _, name := range []string{"vmm/machine", "vmm/kvm", "vmm/vcpu/1"} {
		got, err := vmm.ParseState(edit(name, func(s *vmm.Section) {
			addPart(0x8001, "new")(s)
			addPart(0xffff, "")(s)
		}))
		if err != nil || !reflect.DeepEqual(got, someState()) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestParseStateRefuses(t *testing.T) {
	drop := func(name string) []vmm.Section {
		var out []vmm.Section
		for _, s := range someState().Sections() {
			if s.Name != name {
				out = append(out, s)
			}
		}
		return out
	}
	version := func(v uint32) func(*vmm.Section) { return func(s *vmm.Section) { s.Version = v } }
	rename := func(to string) func(*vmm.Section) { return func(s *vmm.Section) { s.Name = to } }
	vcpus := func(n byte) func(*vmm.Section) { return func(s *vmm.Section) { s.Data[20] = n } }
	for _, tc := range []struct {
		name     string
		sections []vmm.Section
		want     error
	}{
		{"nothing", nil, vmm.ErrState},
		{"no machine", drop("vmm/machine"), vmm.ErrState},
		{"no kernel devices", drop("vmm/kvm"), vmm.ErrState},
		{"no vCPU 0", drop("vmm/vcpu/0"), vmm.ErrState},
		{"no vCPU 1", drop("vmm/vcpu/1"), vmm.ErrState},
		{"a section twice", append(someState().Sections(), someState().Sections()[2]), vmm.ErrState},
		{"a device twice", edit("vmm/device/other", rename("vmm/device/serial0")), vmm.ErrState},
		{"another's section twice", append(someState().Sections(), vmm.Section{Name: "a"}, vmm.Section{Name: "a"}), vmm.ErrState},
		{"no vCPUs", edit("vmm/machine", vcpus(0)), vmm.ErrState},
		{"a vCPU too many", edit("vmm/machine", vcpus(1)), vmm.ErrState},
		{"too many vCPUs", edit("vmm/machine", vcpus(255)), vmm.ErrState},
		{"unknown section", append(someState().Sections(), vmm.Section{Name: "vmm/nested", Version: 1}), vmm.ErrStateVersion},
		{"vCPU 01", append(someState().Sections(), vmm.Section{Name: "vmm/vcpu/01", Version: 1}), vmm.ErrState},
		{"device without a name", append(someState().Sections(), vmm.Section{Name: "vmm/device/", Version: 1}), vmm.ErrState},
		{"version 0", edit("vmm/kvm", version(0)), vmm.ErrState},
		{"newer machine", edit("vmm/machine", version(2)), vmm.ErrStateVersion},
		{"newer kernel devices", edit("vmm/kvm", version(2)), vmm.ErrStateVersion},
		{"newer vCPU", edit("vmm/vcpu/1", version(1<<31)), vmm.ErrStateVersion},
		{"unknown part", edit("vmm/kvm", addPart(6, "x")), vmm.ErrStateVersion},
		{"unknown part of a vCPU", edit("vmm/vcpu/0", addPart(0x7fff, "x")), vmm.ErrStateVersion},
		{"part twice", edit("vmm/kvm", addPart(5, "x")), vmm.ErrState},
		{"parts out of order", edit("vmm/machine", addPart(1, "12345678")), vmm.ErrState},
		{"skippable part twice", edit("vmm/machine", func(s *vmm.Section) { addPart(0x8000, "")(s); addPart(0x8000, "")(s) }), vmm.ErrState},
		{"part 0", edit("vmm/machine", func(s *vmm.Section) { s.Data[0] = 0 }), vmm.ErrState},
		{"wrong size", edit("vmm/machine", func(s *vmm.Section) { s.Data = append(s.Data, 0); s.Data[16]++ }), vmm.ErrState},
		{"empty blob", edit("vmm/kvm", func(s *vmm.Section) { clear(s.Data[2:6]); s.Data = append(s.Data[:6], s.Data[118:]...) }), vmm.ErrState},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s, err := vmm.ParseState(tc.sections)
			if s != nil || !errors.Is(err, tc.want) {
				t.Errorf("%v, want %v", err, tc.want)
			}
		})
	}
}

// TestParseStateRefusesEveryTruncation cuts every section at every byte.
func TestParseStateRefusesEveryTruncation(t *testing.T) {
	for _, s := range someState().Sections() {
		if strings.HasPrefix(s.Name, "vmm/device/") {
			continue // opaque here
		}
		for n := range s.Data {
			_, err := vmm.ParseState(edit(s.Name, func(s *vmm.Section) { s.Data = s.Data[:n] }))
			if !errors.Is(err, vmm.ErrState) {
				t.Fatalf("%s cut at %d: %v", s.Name, n, err)
			}
		}
	}
}

// TestParseStateFlips flips every bit of the first bytes of each section, and one of every byte: the
// result is refused, or it means something else and encodes to the same bytes.
func TestParseStateFlips(t *testing.T) {
	want := someState()
	for _, s := range want.Sections() {
		for i := range s.Data {
			for bit := range 8 {
				if i > 400 && bit != i%8 {
					continue
				}
				flipped := edit(s.Name, func(s *vmm.Section) { s.Data[i] ^= 1 << bit })
				got, err := vmm.ParseState(flipped)
				if err != nil {
					checkStateError(t, err)
					continue
				}
				if reflect.DeepEqual(got, want) {
					t.Fatalf("%s, byte %d, bit %d: the flip is not seen", s.Name, i, bit)
				}
				checkCanonical(t, got, flipped)
			}
		}
	}
}

func checkStateError(t *testing.T, err error) {
	t.Helper()
	if !errors.Is(err, vmm.ErrState) && !errors.Is(err, vmm.ErrStateVersion) {
		t.Fatalf("%v is of no kind that ParseState has", err)
	}
}

// checkCanonical wants s to encode to the vmm sections that it was parsed from.
func checkCanonical(t *testing.T, s *vmm.State, from []vmm.Section) {
	t.Helper()
	again := make(map[string]vmm.Section)
	for _, sec := range s.Sections() {
		again[sec.Name] = sec
	}
	for _, sec := range from {
		if !strings.HasPrefix(sec.Name, "vmm/") {
			continue
		}
		got, ok := again[sec.Name]
		if !ok || got.Version != sec.Version || !bytes.Equal(got.Data, sec.Data) {
			t.Fatalf("section %s, version %d, was\n%x and is encoded as version %d\n%x", sec.Name, sec.Version, sec.Data, got.Version, got.Data)
		}
		delete(again, sec.Name)
	}
	if len(again) > 0 {
		t.Fatalf("sections from nowhere: %v", again)
	}
}

// The sections of a State in one file: for each the lengths of name and data (u32), the version (u32),
// the name and the data, little-endian.
func packSections(sections []vmm.Section) []byte {
	var b []byte
	for _, s := range sections {
		b = binary.LittleEndian.AppendUint32(b, uint32(len(s.Name)))
		b = binary.LittleEndian.AppendUint32(b, uint32(len(s.Data)))
		b = binary.LittleEndian.AppendUint32(b, s.Version)
		b = append(append(b, s.Name...), s.Data...)
	}
	return b
}

// unpackSections reads as many whole sections as b has.
func unpackSections(b []byte) (out []vmm.Section) {
	for len(b) >= 12 {
		name, data := binary.LittleEndian.Uint32(b), binary.LittleEndian.Uint32(b[4:])
		s := vmm.Section{Version: binary.LittleEndian.Uint32(b[8:])}
		b = b[12:]
		if uint64(name)+uint64(data) > uint64(len(b)) {
			return out
		}
		s.Name, s.Data = string(b[:name]), b[name:name+data]
		out, b = append(out, s), b[name+data:]
	}
	return out
}

// golden is a state of a worker guest with two vCPUs, which TestRecordState in state_linux_amd64_test.go recorded.
const golden = "state-v1.bin"

func readGolden(t testing.TB) []vmm.Section {
	t.Helper()
	return unpackSections(readTestdata(t, golden))
}

func TestGoldenStateParses(t *testing.T) {
	sections := readGolden(t)
	s, err := vmm.ParseState(sections)
	if err != nil {
		t.Fatal(err)
	}
	checkCanonical(t, s, sections)
	if s.Machine.VCPUs != 2 || s.Machine.MemoryBytes != 16<<20 || len(s.VCPUs) != 2 {
		t.Errorf("%+v, want 2 vCPUs and 16 MiB", s.Machine)
	}
	for i, v := range s.VCPUs {
		// As the worker guest runs: user mode, long mode, paging.
		if v.ID != uint32(i) || v.Sregs.CS.Selector != 0x33 || v.Sregs.EFER&(1<<10) == 0 || v.Regs.R13 != uint64(0x20000+i*4096) {
			t.Errorf("vCPU %d: %+v, %+v", i, v.Regs, v.Sregs)
		}
		if len(v.CPUID) == 0 || len(v.MSRs) == 0 || v.TSCKHz == 0 {
			t.Errorf("vCPU %d: %d CPUID leaves, %d MSRs, %d kHz", i, len(v.CPUID), len(v.MSRs), v.TSCKHz)
		}
	}
	if len(s.Devices) != 1 || s.Devices[0].Name != "serial0" {
		t.Errorf("devices %+v", s.Devices)
	}
}

func FuzzParseState(f *testing.F) {
	f.Add(packSections(someState().Sections()))
	f.Add(packSections(readGolden(f)))
	f.Add(packSections(edit("vmm/kvm", addPart(0x8000, "skip"))))
	f.Add(packSections(someState().Sections()[:1]))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		sections := unpackSections(b)
		s, err := vmm.ParseState(sections)
		if err != nil {
			if s != nil {
				t.Error("a state and an error")
			}
			checkStateError(t, err)
			return
		}
		again, err := vmm.ParseState(s.Sections())
		if err != nil || !reflect.DeepEqual(again, s) {
			t.Fatalf("what was parsed does not parse again: %v", err)
		}
		if !hasSkippable(sections) {
			checkCanonical(t, s, sections)
		}
	})
}

// hasSkippable says whether a part of a section may be skipped; the sections have parsed.
func hasSkippable(sections []vmm.Section) bool {
	for _, s := range sections {
		if !strings.HasPrefix(s.Name, "vmm/") || strings.HasPrefix(s.Name, "vmm/device/") {
			continue
		}
		for b := s.Data; len(b) > 0; b = b[6+binary.LittleEndian.Uint32(b[2:]):] {
			if binary.LittleEndian.Uint16(b)&0x8000 != 0 {
				return true
			}
		}
	}
	return false
}
