package lifecycle_test

import (
	"bytes"
	"context"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"filippo.io/age"

	"github.com/cryovisor/cryovisor/lifecycle"
	"github.com/cryovisor/cryovisor/memory"
	"github.com/cryovisor/cryovisor/snapshot"
	"github.com/cryovisor/cryovisor/vmm"
)

// frozen is a machine that never ran: its memory and state, for snapshots that any system can make.
type frozen struct {
	size  uint64 // of its memory, as the state says
	ram   []byte // the memory from address 0 on; what is behind it is zero
	high  []byte // the memory from 4 GiB on
	vcpus []vmm.VCPUState
}

const (
	coreRAM    = 16 << 20
	coreTables = 0x100000 // where the page tables begin
	coreKernel = 0xffff_ffff_8000_0000
	corePage   = memory.PageSize
)

// newFrozen is a machine with two vCPUs. Every second page is zero. The page tables map a kernel of 4 MiB at coreKernel, by 2 MiB each
// of the memory in the wrong order, and three pages of a process.
func newFrozen() *frozen {
	f := &frozen{size: coreRAM, ram: make([]byte, coreRAM)}
	random := rand.NewChaCha8([32]byte{1})
	for at := 0; at < coreRAM; at += 2 * corePage {
		_, _ = random.Read(f.ram[at:][:corePage])
	}
	clear(f.ram[coreTables:][:16*corePage])
	table := func(i int) uint64 { return coreTables + uint64(i)*corePage }
	f.set(table(0), 511, table(1)|1)
	f.set(table(1), 510, table(2)|1)
	f.set(table(2), 0, 4<<20|1|1<<7)
	f.set(table(2), 1, 2<<20|1|1<<7)
	f.set(table(0), 0, table(3)|1)
	f.set(table(3), 0, table(4)|1)
	f.set(table(4), 2, table(5)|1)
	f.set(table(5), 0, 0x200000|1)
	f.set(table(5), 1, 0x203000|1)
	f.set(table(5), 7, memory.HoleStart|1) // a device
	n := uint64(0)
	next := func() uint64 { n++; return n * 0x0101_0101_0101_0101 }
	for id := range uint32(2) {
		v := vmm.VCPUState{
			ID: id, MSRs: []vmm.MSR{{Index: 0x10, Value: 1}, {Index: 0xc0000102, Value: next()}},
			XSave: bytes.Repeat([]byte{byte(id + 1)}, 576), XCRs: []byte{1}, DebugRegs: []byte{1}, LAPIC: []byte{1}, Events: []byte{1},
		}
		v.Regs = vmm.Regs{
			RAX: next(), RBX: next(), RCX: next(), RDX: next(), RSI: next(), RDI: next(), RSP: next(), RBP: next(),
			R8: next(), R9: next(), R10: next(), R11: next(), R12: next(), R13: next(), R14: next(), R15: next(),
			RIP: coreKernel + 0x1000*uint64(id), RFLAGS: 2,
		}
		v.Sregs = vmm.Sregs{
			CS: vmm.SegmentReg{Selector: 0x10, Limit: 0xffffffff, Type: 11, Present: 1, S: 1, L: 1, G: 1},
			SS: vmm.SegmentReg{Selector: 0x18, Type: 3, Present: 1, DPL: 3, S: 1, DB: 1, AVL: 1},
			DS: vmm.SegmentReg{Selector: 0x2b}, ES: vmm.SegmentReg{Selector: 0x33}, FS: vmm.SegmentReg{Selector: 0x3b, Base: next()},
			GS: vmm.SegmentReg{Selector: 0x43, Base: next()}, TR: vmm.SegmentReg{Selector: 0x40, Base: next()},
			GDT: vmm.TableReg{Base: next(), Limit: 0x7f}, IDT: vmm.TableReg{Base: next(), Limit: 0xfff},
			CR0: 1<<31 | 1, CR2: next(), CR3: coreTables, CR4: 1 << 5, EFER: 1<<10 | 1<<8,
		}
		f.vcpus = append(f.vcpus, v)
	}
	return f
}

// set writes an entry of a page table.
func (f *frozen) set(table uint64, index int, entry uint64) {
	binary.LittleEndian.PutUint64(f.ram[table+uint64(index)*8:], entry)
}

// store makes a snapshot of it and opens it. ram is what the snapshot says the memory is.
func (f *frozen) store(t *testing.T, ram uint64) (*snapshot.Store, *snapshot.Reader) {
	t.Helper()
	key, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	store, err := snapshot.OpenStore(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	w, err := store.Create(t.Context(), snapshot.Options{Recipients: []age.Recipient{key.Recipient()}})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Abort()
	one := []byte{1}
	state := vmm.State{
		Machine: vmm.MachineState{MemoryBytes: f.size, VCPUs: uint32(len(f.vcpus))},
		VM:      vmm.VMState{PIT: one, Clock: one, PICMaster: one, PICSlave: one, IOAPIC: one}, VCPUs: f.vcpus,
	}
	sections := []snapshot.Section{{Name: "embedder", Version: 7, Critical: true}}
	for _, s := range state.Sections() {
		sections = append(sections, snapshot.Section{Name: s.Name, Version: s.Version, Critical: true, Data: s.Data})
	}
	for _, s := range sections {
		if err := w.AddSection(s); err != nil {
			t.Fatal(err)
		}
	}
	ranges := []snapshot.Range{{GPA: 0, Len: uint64(len(f.ram))}}
	if len(f.high) > 0 {
		ranges = append(ranges, snapshot.Range{GPA: memory.HoleEnd, Len: uint64(len(f.high))})
	}
	err = w.WriteMemory(t.Context(), ram, ranges, func(gpa uint64, n int) ([]byte, error) {
		if gpa >= memory.HoleEnd {
			return f.high[gpa-memory.HoleEnd:][:n], nil
		}
		return f.ram[gpa:][:n], nil
	})
	if err != nil {
		t.Fatal(err)
	}
	info, err := w.Commit(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	r, err := store.Open(t.Context(), info.ID, key)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return store, r
}

// export exports f to a file of its own.
func (f *frozen) export(t *testing.T, opts lifecycle.CoreOptions) (path string, info lifecycle.CoreInfo) {
	t.Helper()
	_, r := f.store(t, f.size)
	path = filepath.Join(t.TempDir(), "core")
	info, err := lifecycle.ExportCore(t.Context(), path, r, opts)
	if err != nil {
		t.Fatal(err)
	}
	return path, info
}

func openCore(t *testing.T, path string) *elf.File {
	t.Helper()
	f, err := elf.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if f.Type != elf.ET_CORE || f.Machine != elf.EM_X86_64 || f.Class != elf.ELFCLASS64 || f.Progs[0].Type != elf.PT_NOTE {
		t.Fatalf("not a core of x86-64: %+v", f.FileHeader)
	}
	return f
}

// segment is a PT_LOAD.
type segment struct{ virtual, physical, size uint64 }

func segments(f *elf.File) (out []segment) {
	for _, p := range f.Progs {
		if p.Type == elf.PT_LOAD {
			out = append(out, segment{p.Vaddr, p.Paddr, p.Filesz})
		}
	}
	return out
}

func contents(t *testing.T, p *elf.Prog) []byte {
	t.Helper()
	b, err := io.ReadAll(p.Open())
	if err != nil || uint64(len(b)) != p.Filesz || p.Memsz != p.Filesz {
		t.Fatalf("%d bytes of segment %+v, %v", len(b), p.ProgHeader, err)
	}
	return b
}

func TestExportCore(t *testing.T) {
	f := newFrozen()
	reported := uint64(0)
	path, info := f.export(t, lifecycle.CoreOptions{Progress: func(done, total uint64) {
		if done <= reported || done > total || total > coreRAM {
			t.Errorf("%d of %d after %d", done, total, reported)
		}
		reported = done
	}})
	if want := (lifecycle.CoreInfo{VCPUs: 2, MemoryBytes: coreRAM, Mappings: 4}); info != want {
		t.Errorf("%+v, want %+v", info, want)
	}
	if reported < coreRAM/3 {
		t.Errorf("%d bytes were reported", reported)
	}
	core := openCore(t, path)
	want := []segment{
		{lifecycle.CorePhysical, 0, coreRAM},
		{0x400000, 0x200000, corePage},
		{0x401000, 0x203000, corePage},
		{coreKernel, 4 << 20, 2 << 20},
		{coreKernel + 2<<20, 2 << 20, 2 << 20},
	}
	if got := segments(core); !slices.Equal(got, want) {
		t.Fatalf("segments %#x, want %#x", got, want)
	}
	for _, p := range core.Progs[1:] {
		if !bytes.Equal(contents(t, p), f.ram[p.Paddr:][:p.Filesz]) {
			t.Errorf("the memory at %#x differs", p.Vaddr)
		}
	}
	compareNotes(t, contents(t, core.Progs[0]), f.vcpus)
	if fi, err := os.Stat(path); err != nil || fi.Mode().Perm()&0o077 != 0 {
		t.Errorf("mode %v, %v", fi.Mode(), err)
	}
}

// compareNotes compares the notes with the state: at a processor's offset in the struct that its note is.
func compareNotes(t *testing.T, notes []byte, vcpus []vmm.VCPUState) {
	t.Helper()
	var threads, states, floats [][]byte
	for len(notes) > 0 {
		size := binary.LittleEndian.Uint32(notes[4:])
		desc := notes[20:][:size]
		switch name, kind := string(notes[12:16]), binary.LittleEndian.Uint32(notes[8:]); {
		case name == "CORE" && kind == 1 && size == 336:
			threads = append(threads, desc)
		case name == "CORE" && kind == 2:
			floats = append(floats, desc)
		case name == "QEMU" && kind == 0 && size == 440:
			states = append(states, desc)
		default:
			t.Fatalf("note %q of type %d and %d bytes", name, kind, size)
		}
		notes = notes[20+size:]
	}
	if len(threads) != len(vcpus) || len(states) != len(vcpus) || len(floats) != len(vcpus) {
		t.Fatalf("%d threads, %d processors and %d floating point registers for %d vCPUs", len(threads), len(states), len(floats), len(vcpus))
	}
	word := func(b []byte, at int) uint64 { return binary.LittleEndian.Uint64(b[at:]) }
	for i := range vcpus {
		v, thread, state := &vcpus[i], threads[i], states[i]
		r, s := &v.Regs, &v.Sregs
		kernelGS := uint64(0)
		for _, m := range v.MSRs {
			if m.Index == 0xc0000102 {
				kernelGS = m.Value
			}
		}
		for at, want := range []uint64{
			r.R15, r.R14, r.R13, r.R12, r.RBP, r.RBX, r.R11, r.R10, r.R9, r.R8, r.RAX, r.RCX, r.RDX, r.RSI, r.RDI, 0,
			r.RIP, uint64(s.CS.Selector), r.RFLAGS, r.RSP, uint64(s.SS.Selector), s.FS.Base, s.GS.Base,
			uint64(s.DS.Selector), uint64(s.ES.Selector), uint64(s.FS.Selector), uint64(s.GS.Selector),
		} {
			if got := word(thread, 112+8*at); got != want {
				t.Errorf("vCPU %d, register %d of the thread: %#x, want %#x", i, at, got, want)
			}
		}
		for at, want := range map[int]uint64{
			8: r.RAX, 8 + 17*8: r.RFLAGS, 8 + 16*8: r.RIP, 392: s.CR0, 408: s.CR2, 416: s.CR3, 424: s.CR4, 432: kernelGS,
			152: uint64(s.CS.Limit)<<32 | uint64(s.CS.Selector), 336: s.TR.Base, 360: s.GDT.Base, 384: s.IDT.Base,
			344: uint64(s.GDT.Limit) << 32, 272: uint64(s.SS.Limit)<<32 | uint64(s.SS.Selector),
		} {
			if got := word(state, at); got != want {
				t.Errorf("vCPU %d, offset %d of the processor: %#x, want %#x", i, at, got, want)
			}
		}
		if !bytes.Equal(floats[i], v.XSave[:512]) {
			t.Errorf("vCPU %d: floating point registers differ", i)
		}
	}
}

// TestExportCoreSegments: the attributes of segment registers are where they are in a descriptor (Intel SDM, volume 3A, 3.4.5).
func TestExportCoreSegments(t *testing.T) {
	path, _ := newFrozen().export(t, lifecycle.CoreOptions{})
	notes := contents(t, openCore(t, path).Progs[0])
	state := notes[bytes.Index(notes, []byte("QEMU\x00"))+8:]
	// Code: present, of 64-bit mode, in units of pages, execute and read, accessed. Stack: DPL 3, 32-bit, AVL, read and write, accessed.
	for at, want := range map[int]uint32{152 + 8: 0x00a09b00, 272 + 8: 0x0050f300} {
		if got := binary.LittleEndian.Uint32(state[at:]); got != want {
			t.Errorf("offset %d: %#08x, want %#08x", at, got, want)
		}
	}
}

func TestExportCorePhysical(t *testing.T) {
	f := newFrozen()
	path, info := f.export(t, lifecycle.CoreOptions{Physical: true})
	got := segments(openCore(t, path))
	if info.Mappings != 0 || info.Incomplete || !slices.Equal(got, []segment{{0, 0, coreRAM}}) {
		t.Errorf("%+v, segments %#x", info, got)
	}
	// And so it is where no processor pages.
	for i := range f.vcpus {
		f.vcpus[i].Sregs.CR0 = 1
	}
	path, info = f.export(t, lifecycle.CoreOptions{})
	got = segments(openCore(t, path))
	if info.Mappings != 0 || info.Incomplete || !slices.Equal(got, []segment{{0, 0, coreRAM}}) {
		t.Errorf("%+v, segments %#x", info, got)
	}
}

// TestExportCoreAroundTheHole: memory is on both sides of the 32-bit hole, and so are pages that straddle it.
func TestExportCoreAroundTheHole(t *testing.T) {
	f := newFrozen()
	f.size = memory.HoleStart + 8<<20
	f.high = bytes.Clone(f.ram[:8<<20])
	slices.Reverse(f.high)
	const table = coreTables + 6*corePage
	f.set(coreTables, 1, table|1)
	f.set(table, 0, memory.HoleStart|1|1<<7) // 1 GiB of devices
	f.set(table, 1, memory.HoleEnd|1|1<<7)   // 1 GiB, of which 8 MiB are memory
	path, info := f.export(t, lifecycle.CoreOptions{})
	core := openCore(t, path)
	got := segments(core)
	want := []segment{
		{lifecycle.CorePhysical, 0, memory.HoleStart},
		{lifecycle.CorePhysical + memory.HoleEnd, memory.HoleEnd, 8 << 20},
	}
	if info.Mappings != 5 || !slices.Equal(got[:2], want) || !slices.Contains(got, segment{1<<39 + 1<<30, memory.HoleEnd, 8 << 20}) {
		t.Fatalf("%+v, segments %#x", info, got)
	}
	for _, p := range core.Progs[2:] {
		b := f.ram
		if p.Paddr >= memory.HoleEnd {
			b = f.high[p.Paddr-memory.HoleEnd:]
		} else {
			b = b[p.Paddr:]
		}
		if p.Filesz <= 8<<20 && !bytes.Equal(contents(t, p), b[:p.Filesz]) {
			t.Errorf("the memory at %#x differs", p.Vaddr)
		}
	}
	low := make([]byte, coreRAM)
	if _, err := core.Progs[1].ReadAt(low, 0); err != nil || !bytes.Equal(low, f.ram) {
		t.Errorf("the memory below the hole differs: %v", err)
	}
}

// TestExportCoreHostile: tables that go in circles cost what is bounded, and all of the memory is there.
func TestExportCoreHostile(t *testing.T) {
	f := newFrozen()
	for i := range 512 {
		f.set(coreTables, i, coreTables|1)
	}
	path, info := f.export(t, lifecycle.CoreOptions{})
	if !info.Incomplete || info.Mappings == 0 || info.Mappings > 0xffff {
		t.Errorf("%+v", info)
	}
	if core := openCore(t, path); !bytes.Equal(contents(t, core.Progs[1]), f.ram) {
		t.Error("the memory differs")
	}
}

func TestExportCoreFails(t *testing.T) {
	f := newFrozen()
	taken := filepath.Join(t.TempDir(), "taken")
	if err := os.WriteFile(taken, []byte("old"), 0o644); err != nil {
		t.Fatal(err)
	}
	_, good := f.store(t, f.size)
	canceled, cancel := context.WithCancel(t.Context())
	cancel()
	f.size = coreRAM / 2
	_, outside := f.store(t, coreRAM)
	f.size = coreRAM + 1
	_, odd := f.store(t, coreRAM)
	f.size = coreRAM
	store, damaged := f.store(t, coreRAM)
	pack := store.PackPath(damaged.Header().Packs[0])
	b, err := os.ReadFile(pack)
	if err != nil {
		t.Fatal(err)
	}
	b[len(b)/2] ^= 1
	if err := os.WriteFile(pack, b, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name string
		ctx  context.Context
		r    *snapshot.Reader
		path string
		want error
	}{
		{"the name is taken", t.Context(), good, taken, fs.ErrExist},
		{"canceled", canceled, good, "", context.Canceled},
		{"no directory", t.Context(), good, filepath.Join(t.TempDir(), "a", "b"), fs.ErrNotExist},
		{"pages outside of memory", t.Context(), outside, "", snapshot.ErrFormat},
		{"a size that is none", t.Context(), odd, "", vmm.ErrState},
		{"damage", t.Context(), damaged, "", snapshot.ErrCorrupt},
	} {
		t.Run(tc.name, func(t *testing.T) {
			path := tc.path
			if path == "" {
				path = filepath.Join(t.TempDir(), "core")
			}
			info, err := lifecycle.ExportCore(tc.ctx, path, tc.r, lifecycle.CoreOptions{Progress: func(uint64, uint64) {
				if path == taken {
					t.Error("it began even so")
				}
			}})
			if !errors.Is(err, tc.want) || info != (lifecycle.CoreInfo{}) {
				t.Errorf("%v, want %v; %+v", err, tc.want, info)
			}
			for _, e := range dirEntries(filepath.Dir(path)) {
				if e != "taken" {
					t.Errorf("%s is left", e)
				}
			}
		})
	}
	if b, err := os.ReadFile(taken); err != nil || string(b) != "old" {
		t.Errorf("%q, %v", b, err)
	}
	if _, err := lifecycle.ExportCore(t.Context(), taken, good, lifecycle.CoreOptions{Overwrite: true}); err != nil {
		t.Fatal(err)
	}
	openCore(t, taken)
	if left := dirEntries(filepath.Dir(taken)); !slices.Equal(left, []string{"taken"}) {
		t.Errorf("left: %v", left)
	}
}

// TestExportCoreKeepsLateFile: a file that takes the name while the core is written stays.
func TestExportCoreKeepsLateFile(t *testing.T) {
	f := newFrozen()
	_, r := f.store(t, f.size)
	path := filepath.Join(t.TempDir(), "core")
	_, err := lifecycle.ExportCore(t.Context(), path, r, lifecycle.CoreOptions{Progress: func(done, total uint64) {
		if err := os.WriteFile(path, []byte("other"), 0o600); err != nil {
			t.Error(err)
		}
	}})
	if b, readErr := os.ReadFile(path); !errors.Is(err, fs.ErrExist) || readErr != nil || string(b) != "other" {
		t.Errorf("%v; %v", err, readErr)
	}
	if left := dirEntries(filepath.Dir(path)); len(left) != 1 {
		t.Errorf("left: %v", left)
	}
}

func dirEntries(dir string) (names []string) {
	entries, _ := os.ReadDir(dir) // there need not be one
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// TestExportCoreInGDB asks gdb for registers and memory, where there is one.
func TestExportCoreInGDB(t *testing.T) {
	gdb, err := exec.LookPath("gdb")
	if err != nil {
		t.Skip("no gdb: install it to have it read a core")
	}
	f := newFrozen()
	path, _ := f.export(t, lifecycle.CoreOptions{})
	ask := func(format string, args ...any) string { return fmt.Sprintf("output/x "+format, args...) }
	cmd := exec.Command(gdb, "--batch", "-nx", "--core="+path)
	var want strings.Builder
	expect := func(v uint64, question string) {
		cmd.Args = append(cmd.Args, "-ex", question, "-ex", `echo \n`)
		fmt.Fprintf(&want, "%#x\n", v)
	}
	word := func(gpa int) uint64 { return binary.LittleEndian.Uint64(f.ram[gpa:]) }
	for i := range f.vcpus {
		cmd.Args = append(cmd.Args, "-ex", fmt.Sprintf("thread %d", i+1), "-ex", `echo @\n`)
		expect(f.vcpus[i].Regs.RIP, ask("(long)$rip"))
		expect(f.vcpus[i].Regs.R15, ask("$r15"))
		expect(f.vcpus[i].Regs.RSP, ask("(long)$rsp"))
		expect(f.vcpus[i].Sregs.GS.Base, ask("$gs_base"))
		expect(binary.LittleEndian.Uint64(f.vcpus[i].XSave[160:]), ask("$xmm0.v2_int64[0]"))
		expect(word(4<<20), ask("*(unsigned long*)%#x", uint64(coreKernel)))
		expect(word(2<<20), ask("*(unsigned long*)%#x", uint64(coreKernel+2<<20)))
		expect(word(0x200000), ask("*(unsigned long*)%#x", 0x400000))
		expect(word(0x2000), ask("*(unsigned long*)%#x", uint64(lifecycle.CorePhysical+0x2000)))
	}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	var got strings.Builder
	for _, part := range strings.Split(string(out), "@\n")[1:] {
		lines := strings.SplitAfterN(part, "\n", 10)
		got.WriteString(strings.Join(lines[:min(9, len(lines))], ""))
	}
	if got.String() != want.String() {
		t.Errorf("gdb says\n%s\nwant\n%s\nof\n%s", got.String(), want.String(), out)
	}
}
