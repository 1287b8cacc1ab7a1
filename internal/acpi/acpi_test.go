package acpi

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write testdata/*.aml")

const (
	testBase = 0xe0000
	testRoom = 0x1f000
)

func testConfig() Config {
	return Config{
		CPUs:   2,
		Power:  Power{SleepControl: 0x600, SleepStatus: 0x601, Reset: 0x602},
		Serial: []SerialPort{{Port: 0x3f8, GSI: 4}},
		Virtio: []VirtioMMIO{
			{Base: 0xd0000000, Size: 0x1000, GSI: 5, Trigger: Edge},
			{Base: 0xd0001000, Size: 0x200, GSI: 6, Trigger: Level},
		},
		VMGenID: &VMGenID{Addr: 0x1_000ff000, GSI: 9},
	}
}

// readTables walks the tables from the RSDP as a guest does, checking signatures, lengths and checksums.
func readTables(t *testing.T, tab *Tables) map[string][]byte {
	t.Helper()
	at := func(addr, n uint64) []byte {
		if addr < tab.Base || addr+n > tab.Base+uint64(len(tab.Data)) {
			t.Fatalf("[%#x, %#x) is outside the tables", addr, addr+n)
		}
		return tab.Data[addr-tab.Base:][:n]
	}
	sum := func(what string, b []byte) {
		if checksum(b) != 0 {
			t.Errorf("%s: wrong checksum", what)
		}
	}
	found := map[string][]byte{}
	read := func(addr uint64) []byte {
		b := at(addr, uint64(le.Uint32(at(addr, headerSize)[4:])))
		sum(string(b[:4]), b)
		found[string(b[:4])] = b
		return b
	}
	root := at(tab.RSDP(), rsdpSize)
	if tab.RSDP()%16 != 0 || string(root[:8]) != "RSD PTR " || root[15] != 2 {
		t.Fatalf("RSDP %x at %#x", root, tab.RSDP())
	}
	sum("RSDP 1.0", root[:20])
	sum("RSDP", root)
	list := read(le.Uint64(root[24:]))[headerSize:]
	for ; len(list) > 0; list = list[8:] {
		read(le.Uint64(list))
	}
	fadt := found["FACP"]
	if x := le.Uint64(fadt[140:]); x != uint64(le.Uint32(fadt[40:])) {
		t.Errorf("DSDT and X_DSDT differ: %#x", x)
	}
	read(le.Uint64(fadt[140:]))
	return found
}

func TestTables(t *testing.T) {
	tab, err := Build(testConfig(), testBase, testRoom)
	if err != nil {
		t.Fatal(err)
	}
	found := readTables(t, tab)
	if len(found) != 4 {
		t.Errorf("found %d tables", len(found))
	}
	fadt := found["FACP"]
	gas := func(port byte) []byte { return []byte{1, 8, 0, 1, port, 6, 0, 0, 0, 0, 0, 0} }
	for name, c := range map[string]struct{ got, want []byte }{
		"reset":   {fadt[116:129], append(gas(2), ResetValue)},
		"control": {fadt[244:256], gas(0)},
		"status":  {fadt[256:268], gas(1)},
	} {
		if !bytes.Equal(c.got, c.want) {
			t.Errorf("%s register is %x, want %x", name, c.got, c.want)
		}
	}
	if f := le.Uint32(fadt[112:]); f&(1<<20|1<<10) != 1<<20|1<<10 {
		t.Errorf("FADT flags %#x: not hardware-reduced, or no reset register", f)
	}
}

// TestGolden keeps the tables from changing unnoticed: they are part of what a resumed guest has seen.
func TestGolden(t *testing.T) {
	tab, err := Build(testConfig(), testBase, testRoom)
	if err != nil {
		t.Fatal(err)
	}
	for sig, got := range readTables(t, tab) {
		file := filepath.Join("testdata", strings.ToLower(sig)+".aml")
		if *update {
			if err := os.WriteFile(file, got, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want) {
			t.Errorf("%s differs from %s:\n%x\n%x", sig, file, got, want)
		}
	}
}

// TestManyCPUs: IDs that do not fit a local APIC entry get x2APIC entries, and long packages their lengths.
func TestManyCPUs(t *testing.T) {
	for _, n := range []int{1, 254, 255, 256, 1000} {
		cfg := testConfig()
		cfg.CPUs = n
		tab, err := Build(cfg, testBase, testRoom)
		if err != nil {
			t.Fatal(err)
		}
		entries := readTables(t, tab)["APIC"][headerSize+8:]
		next := uint32(0)
		for ; len(entries) > 0; entries = entries[entries[1]:] {
			id, flags := uint32(0), byte(0)
			switch entries[0] {
			case madtLAPIC:
				id, flags = uint32(entries[3]), entries[4]
			case madtX2APIC:
				id, flags = le.Uint32(entries[4:]), entries[8]
			default:
				continue
			}
			if id != next || flags != 1 {
				t.Fatalf("%d processors: entry %x, want ID %d", n, entries[:16], next)
			}
			next++
		}
		if int(next) != n {
			t.Errorf("MADT has %d of %d processors", next, n)
		}
	}
}

// iasl runs the ACPICA compiler, which must have nothing to complain about.
func iasl(t *testing.T, dir string, args ...string) {
	t.Helper()
	path, err := exec.LookPath("iasl")
	if errors.Is(err, exec.ErrNotFound) {
		t.Skipf("%v: install acpica-tools", err)
	} else if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(path, args...)
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	complaint := regexp.MustCompile(`(?i)(error|warning|exception|invalid|incorrect|unknown)`)
	for line := range strings.Lines(string(out)) {
		if complaint.MatchString(line) && !strings.Contains(line, "0 Errors, 0 Warnings") {
			t.Errorf("iasl %s: %s", strings.Join(args, " "), line)
		}
	}
	if err != nil {
		t.Fatalf("iasl %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

// TestDisassembles has the ACPICA tools read every table, compile what they made of it, and get the same bytes.
func TestDisassembles(t *testing.T) {
	cfg := testConfig()
	cfg.CPUs = 300
	tab, err := Build(cfg, testBase, testRoom)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for sig, b := range readTables(t, tab) {
		file := strings.ToLower(sig)
		if err := os.WriteFile(filepath.Join(dir, file+".aml"), b, 0o644); err != nil {
			t.Fatal(err)
		}
		iasl(t, dir, "-d", file+".aml")
		iasl(t, dir, "-oa", "-p", "again-"+file, file+".dsl") // -oa: as written, no optimizing
		again, err := os.ReadFile(filepath.Join(dir, "again-"+file+".aml"))
		if err != nil {
			t.Fatal(err)
		}
		// The compiler puts its own name into the header (bytes 28 to 36), which moves the checksum.
		if len(again) != len(b) || !bytes.Equal(again[headerSize:], b[headerSize:]) {
			t.Errorf("%s compiles to other bytes", sig)
		}
	}
	checkSource(t, filepath.Join(dir, "dsdt.dsl"))
}

// checkSource looks for what Linux and Windows look for.
func checkSource(t *testing.T, file string) {
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	src := strings.Join(strings.Fields(string(b)), " ")
	for _, want := range []string{
		`Name (_HID, "ACPI0007" /* Processor Device */) // _HID: Hardware ID Name (_UID, 0x012B)`,
		`Name (_HID, EisaId ("PNP0501")`, `Name (_DDN, "COM1")`, `Name (_HID, "LNRO0005")`,
		`Memory32Fixed (ReadWrite, 0xD0000000, // Address Base 0x00001000, // Address Length )`,
		`Interrupt (ResourceConsumer, Edge, ActiveHigh, Exclusive, ,, ) { 0x00000005, }`,
		`Interrupt (ResourceConsumer, Level, ActiveHigh, Exclusive, ,, ) { 0x00000006, }`,
		`Name (_CID, "VM_Gen_Counter")`, `Name (ADDR, Package (0x02) { 0x000FF000, One })`,
		`Name (_HID, "ACPI0013" /* Generic Event Device */)`,
		`If ((Arg0 == 0x09)) { Notify (\_SB.VGEN, 0x80)`,
		`Name (_S5, Package (0x04) // _S5_: S5 System State { 0x05, Zero, Zero, Zero })`,
	} {
		if !strings.Contains(src, want) {
			t.Errorf("the disassembled DSDT lacks: %s", want)
		}
	}
	if t.Failed() {
		t.Log(string(b[max(0, len(b)-6000):]))
	}
}

func TestIsPowerOff(t *testing.T) {
	for v := range 256 {
		want := v == 0x34 || v == 0x35 || v == 0x36 || v == 0x37 || v == 0x74 || v == 0x75 || v == 0x76 || v == 0x77 ||
			v == 0xb4 || v == 0xb5 || v == 0xb6 || v == 0xb7 || v == 0xf4 || v == 0xf5 || v == 0xf6 || v == 0xf7
		if IsPowerOff(byte(v)) != want {
			t.Errorf("%#x", v)
		}
	}
}

func TestPackageLength(t *testing.T) {
	for _, n := range []int{0, 62, 63, 0xfff - 2, 0xfff - 1, 0xfffff - 3, 0xfffff - 2} {
		b := pkg(nil, make([]byte, n))
		extra := int(b[0] >> 6)
		got := int(b[0] & 0x3f)
		if extra > 0 {
			got = int(b[0] & 0xf)
		}
		for i := range extra {
			got |= int(b[1+i]) << (4 + 8*i)
		}
		if got != len(b) || len(b) != n+1+extra {
			t.Errorf("body of %d bytes: length says %d of %d", n, got, len(b))
		}
	}
}

func TestIntegers(t *testing.T) {
	for v, want := range map[uint64]string{
		0: "00", 1: "01", 2: "0a02", 0xff: "0aff", 0x100: "0b0001", 0xffff: "0bffff", 0x10000: "0c00000100",
		0xffffffff: "0cffffffff", 0x100000000: "0e0000000001000000",
	} {
		if got := fmt.Sprintf("%x", integer(v)); got != want {
			t.Errorf("%#x encodes as %s, want %s", v, got, want)
		}
	}
	if got := fmt.Sprintf("%x", eisaID("PNP0501")); got != "0c41d00501" {
		t.Errorf("PNP0501 encodes as %s", got)
	}
}

func TestConfigRejected(t *testing.T) {
	for name, edit := range map[string]func(*Config){
		"no processor":    func(c *Config) { c.CPUs = 0 },
		"too many":        func(c *Config) { c.CPUs = maxCPUs + 1 },
		"GSI":             func(c *Config) { c.Virtio[0].GSI = 24 },
		"shared GSI":      func(c *Config) { c.VMGenID.GSI = 4 },
		"virtio GSI":      func(c *Config) { c.Virtio[1].GSI = 5 },
		"serial GSI":      func(c *Config) { c.Serial[0].GSI = 99 },
		"trigger":         func(c *Config) { c.Virtio[0].Trigger = 2 },
		"no window":       func(c *Config) { c.Virtio[0].Size = 0 },
		"wrapping window": func(c *Config) { c.Virtio[0].Base = 0xfffff000; c.Virtio[0].Size = 0x1001 },
		"shared window":   func(c *Config) { c.Virtio[1].Base = 0xd0000fff },
		"APIC window":     func(c *Config) { c.Virtio[0].Base = 0xfebfffff },
		"no sleep port":   func(c *Config) { c.Power.SleepControl = 0 },
		"shared port":     func(c *Config) { c.Power.Reset = 0x3ff },
		"last port":       func(c *Config) { c.Serial[0].Port = 0xfffc },
		"generation ID":   func(c *Config) { c.VMGenID.Addr = 4 },
		"virtio devices":  func(c *Config) { c.Virtio = make([]VirtioMMIO, 257) },
	} {
		cfg := testConfig()
		edit(&cfg)
		if _, err := Build(cfg, testBase, testRoom); !errors.Is(err, ErrConfig) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, base := range []uint64{0, testBase + 16, 1 << 32} {
		if _, err := Build(testConfig(), base, testRoom); !errors.Is(err, ErrConfig) {
			t.Errorf("base %#x: %v", base, err)
		}
	}
	var large *TooLargeError
	if _, err := Build(testConfig(), testBase, 100); !errors.As(err, &large) || large.Need <= large.Have {
		t.Errorf("no room: %v", err)
	}
	if _, err := Build(testConfig(), testBase, large.Need); err != nil {
		t.Errorf("just enough room: %v", err)
	}
}
