package boot

import (
	"bytes"
	"errors"
	"io"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const mib = 1 << 20

// checkLongMode translates addresses by the tables that c points to, and checks GDT against segment registers.
func checkLongMode(t *testing.T, g *guest, c CPU, gib uint64) {
	t.Helper()
	translate := func(va uint64) uint64 {
		table := c.CR3
		for shift := uint(39); ; shift -= 9 {
			e := g.u64(table + (va>>shift&0x1ff)*8)
			if e&(ptePresent|pteWritable) != ptePresent|pteWritable {
				t.Fatalf("%#x is not mapped at shift %d: %#x", va, shift, e)
			}
			table = e &^ 0xfff
			if e&pteLarge != 0 {
				return e&^(1<<shift-1) | va&(1<<shift-1)
			}
			if shift == 21 {
				t.Fatalf("%#x: no large page", va)
			}
		}
	}
	for va := uint64(0x123); va < gib<<30; va += 2 * mib {
		if pa := translate(va); pa != va {
			t.Fatalf("%#x is mapped to %#x", va, pa)
		}
	}
	for name, s := range map[string]Segment{"CS": c.CS, "DS": c.DS, "ES": c.ES, "SS": c.SS, "TR": c.TR} {
		if d := g.u64(c.GDT.Base + uint64(s.Selector)); d != s.descriptor() || d == 0 {
			t.Errorf("%s: GDT has %#x, and the register is %#x", name, d, s.descriptor())
		}
	}
	if c.GDT.Limit < selTSS+15 || g.u64(c.GDT.Base) != 0 {
		t.Error("GDT has no null entry, or is too short for the TSS")
	}
}

func TestDescriptors(t *testing.T) {
	c, err := writeLongMode(newGuest(2*mib), bootGiB)
	if err != nil {
		t.Fatal(err)
	}
	// The well-known values: flat 64-bit code, flat data, both accessed, and a busy TSS.
	if d := c.CS.descriptor(); d != 0x00af9b000000ffff {
		t.Errorf("code descriptor %#x", d)
	}
	if d := c.DS.descriptor(); d != 0x00cf93000000ffff {
		t.Errorf("data descriptor %#x", d)
	}
	if d := c.TR.descriptor(); d != 0x00008b0011000067 {
		t.Errorf("TSS descriptor %#x", d)
	}
	s := Segment{Base: 0xfedcba98, Limit: 0xfffff, DPL: 3, Type: 1, AVL: true}
	if d := s.descriptor(); d != 0xfe1f61dcba98ffff {
		t.Errorf("descriptor %#x", d)
	}
}

func TestLoadBzImage(t *testing.T) {
	code, initrd := pattern(1, 3*mib-5), pattern(9, 700001)
	const size = 128 * mib
	g := newGuest(size)
	l, err := Load(g, Config{
		Kernel: image(bzImage(code, nil)), Initrd: image(initrd), Cmdline: "console=ttyS0", MemSize: size, RSDP: ACPIBase,
	})
	if err != nil {
		t.Fatal(err)
	}
	want := Loaded{CPU: l.CPU, Kernel: Range{testPref, testInitSize}, Initrd: Range{(size - 700001) &^ 4095, 700001}}
	if d := cmp.Diff(want, *l); d != "" {
		t.Error(d)
	}
	if !bytes.Equal(g.read(testPref, uint64(len(code))), code) {
		t.Error("code differs")
	}
	if !bytes.Equal(g.read(l.Initrd.GPA, l.Initrd.Len), initrd) {
		t.Error("initrd differs")
	}
	checkBootState(t, g, l.CPU)
	checkLongMode(t, g, l.CPU, bootGiB)

	zp := l.CPU.RSI
	if got := g.read(zp+offSetupSects, 1)[0]; got != testSetupSects {
		t.Errorf("setup_sects %d", got)
	}
	if got := g.u32(zp + 0x268); got != 0x1234 {
		t.Errorf("the header's last field is %#x", got)
	}
	if got := g.read(zp+0x26c, 0x2d0-0x26c); !bytes.Equal(got, make([]byte, len(got))) {
		t.Error("code behind the setup header reached boot_params")
	}
	if got := g.read(zp, offRSDP); !bytes.Equal(got, make([]byte, len(got))) {
		t.Error("screen_info is not zero")
	}
	if got := g.u64(zp + offRSDP); got != ACPIBase {
		t.Errorf("RSDP %#x", got)
	}
	if img, n := g.u32(zp+offRamdiskImage), g.u32(zp+offRamdiskSize); uint64(img) != l.Initrd.GPA || n != 700001 {
		t.Errorf("ramdisk %#x, %d bytes", img, n)
	}
	if got := g.u32(zp + offCode32Start); got != testPref {
		t.Errorf("code32_start %#x", got)
	}
	if g.u32(zp+offSubarch) != 0 || g.u64(zp+offSetupData) != 0 {
		t.Error("the kernel file set subarch or setup_data")
	}
	if got := g.read(zp+offLoadFlags, 1)[0]; got != loadedHigh {
		t.Errorf("loadflags %#x", got)
	}
	cmdline := string(g.read(uint64(g.u32(zp+offCmdlinePtr)), 14))
	if cmdline != "console=ttyS0\x00" {
		t.Errorf("command line %q", cmdline)
	}
}

// checkBootState checks what boot.rst demands of the CPU at a 64-bit entry, and of every boot_params.
func checkBootState(t *testing.T, g *guest, c CPU) {
	t.Helper()
	switch {
	case c.CR0&(cr0PE|cr0PG) != cr0PE|cr0PG || c.CR4&cr4PAE == 0 || c.EFER != eferLME|eferLMA:
		t.Error("not in long mode with paging")
	case c.RFLAGS != 2:
		t.Errorf("RFLAGS %#x: interrupts must be off", c.RFLAGS)
	case c.CS.Selector != 0x10 || c.DS.Selector != 0x18 || c.ES.Selector != 0x18 || c.SS.Selector != 0x18:
		t.Error("selectors are not __BOOT_CS and __BOOT_DS")
	case !c.CS.L || c.CS.DB || c.CS.DPL != 0:
		t.Error("CS is no 64-bit code segment of CPL 0")
	}
	zp := c.RSI
	if g.read(zp+0x1ef, 1)[0] != 0 {
		t.Error("the sentinel is set: Linux would clear fields")
	}
	if got := string(g.read(zp+offMagic, 4)); got != headerMagic || g.read(zp+offLoaderType, 1)[0] != 0xff {
		t.Errorf("magic %q, or no loader type: Linux would ignore the initrd", got)
	}
	if got := g.read(zp+offVidMode, 2); got[0] != 0xff || got[1] != 0xff {
		t.Errorf("vid_mode %x", got)
	}
	n := uint64(g.read(zp+offE820Entries, 1)[0])
	var got []E820Entry
	for i := range n {
		a := zp + offE820Table + 20*i
		got = append(got, E820Entry{Range{g.u64(a), g.u64(a + 8)}, E820Type(g.u32(a + 16))})
	}
	if d := cmp.Diff(E820(g.size), got); d != "" {
		t.Error(d)
	}
}

func TestE820(t *testing.T) {
	const gib = 1 << 30
	low := []E820Entry{{Range{0, 0x9fc00}, E820RAM}, {Range{0x9fc00, 0x60400}, E820Reserved}}
	for size, want := range map[uint64][]E820Entry{
		2 * mib:        append(low[:2:2], E820Entry{Range{mib, mib}, E820RAM}),
		3 * gib:        append(low[:2:2], E820Entry{Range{mib, 3*gib - mib}, E820RAM}),
		3*gib + 2*mib:  append(low[:2:2], E820Entry{Range{mib, 3*gib - mib}, E820RAM}, E820Entry{Range{4 * gib, 2 * mib}, E820RAM}),
		16 * gib:       append(low[:2:2], E820Entry{Range{mib, 3*gib - mib}, E820RAM}, E820Entry{Range{4 * gib, 13 * gib}, E820RAM}),
		mib:            low,
		512 * 1024:     {{Range{0, 512 * 1024}, E820RAM}},
		lowRAMEnd:      low[:1],
		lowRAMEnd + 64: low,
	} {
		if d := cmp.Diff(want, E820(size)); d != "" {
			t.Errorf("%d bytes: %s", size, d)
		}
	}
}

func TestInitrdStaysBelowItsLimit(t *testing.T) {
	const size = 6 << 30
	for _, limit := range []uint32{0x7fffffff, 0x37ffffff, 0xffffffff} {
		g := newGuest(size)
		k := bzImage(pattern(1, mib), func(b []byte) { le.PutUint32(b[offInitrdMax:], limit) })
		l, err := Load(g, Config{Kernel: image(k), Initrd: image(pattern(2, 5000)), MemSize: size})
		if err != nil {
			t.Fatal(err)
		}
		top := min(uint64(limit)+1, 3<<30)
		if l.Initrd.End() > top || l.Initrd.End() < top-pageSize || l.Initrd.GPA%pageSize != 0 {
			t.Errorf("limit %#x: initrd at %s", limit, l.Initrd)
		}
	}
}

func TestFixedKernelGoesWhereItWants(t *testing.T) {
	const pref = mib + 0x123000
	k := bzImage(pattern(1, 4096), func(b []byte) {
		b[offRelocatable] = 0
		le.PutUint64(b[offPrefAddress:], pref)
	})
	l, err := Load(newGuest(64*mib), Config{Kernel: image(k), MemSize: 64 * mib})
	if err != nil || l.Kernel.GPA != pref || l.CPU.RIP != pref+0x200 {
		t.Errorf("%+v, %v", l, err)
	}
}

func TestRelocatableKernelIsAligned(t *testing.T) {
	k := bzImage(pattern(1, 4096), func(b []byte) { le.PutUint64(b[offPrefAddress:], 0) })
	l, err := Load(newGuest(64*mib), Config{Kernel: image(k), MemSize: 64 * mib})
	if err != nil || l.Kernel.GPA != 2*mib {
		t.Errorf("%+v, %v", l, err)
	}
}

func TestLoadELF(t *testing.T) {
	data := pattern(3, 0x4000)
	const size = 64 * mib
	g := newGuest(size)
	l, err := Load(g, Config{
		Kernel: image(vmlinux(testPref+0x40, data, testPhdrs())), Initrd: image(pattern(4, 100)),
		Cmdline: strings.Repeat("x", elfCmdline), MemSize: size,
	})
	if err != nil {
		t.Fatal(err)
	}
	if l.CPU.RIP != testPref+0x40 || l.Kernel != (Range{testPref, 0x205000}) {
		t.Errorf("entry %#x, kernel %s", l.CPU.RIP, l.Kernel)
	}
	if !bytes.Equal(g.read(testPref, 0x3000), data[:0x3000]) || !bytes.Equal(g.read(testPref+0x200000, 0x1000), data[0x3000:]) {
		t.Error("segments differ")
	}
	checkBootState(t, g, l.CPU)
	checkLongMode(t, g, l.CPU, bootGiB)
	if v := g.u32(l.CPU.RSI+offVersion) & 0xffff; v < 0x20c {
		t.Errorf("protocol version %#x", v)
	}
}

func TestBzImageRejected(t *testing.T) {
	code := pattern(1, 8192)
	edit := func(f func(b []byte)) []byte { return bzImage(code, f) }
	for name, c := range map[string]struct {
		file []byte
		want error
	}{
		"old protocol": {edit(func(b []byte) { le.PutUint16(b[offVersion:], 0x020b) }), ErrUnsupportedKernel},
		"32-bit only":  {edit(func(b []byte) { b[offXLoadFlags] = 0 }), ErrUnsupportedKernel},
		"zImage":       {edit(func(b []byte) { b[offLoadFlags] = 0 }), ErrUnsupportedKernel},
		"beyond hole":  {edit(func(b []byte) { le.PutUint64(b[offPrefAddress:], 3<<30) }), ErrUnsupportedKernel},
		"huge address": {edit(func(b []byte) { le.PutUint64(b[offPrefAddress:], 1<<64-1) }), ErrUnsupportedKernel},
		"short header": {edit(func(b []byte) { b[offJump+1] = 0x20 }), ErrMalformed},
		"no alignment": {edit(func(b []byte) { le.PutUint32(b[offAlignment:], 0) }), ErrMalformed},
		"odd align":    {edit(func(b []byte) { le.PutUint32(b[offAlignment:], 3<<20) }), ErrMalformed},
		"wide align":   {edit(func(b []byte) { le.PutUint32(b[offAlignment:], 1<<31) }), ErrMalformed},
		"no code":      {edit(func(b []byte) { le.PutUint32(b[offSysSize:], 0) }), ErrMalformed},
		"code missing": {edit(func(b []byte) { le.PutUint32(b[offSysSize:], 8192/16+1) }), ErrTruncated},
		"all setup":    {edit(func(b []byte) { b[offSetupSects] = 255 }), ErrTruncated},
		"cut header":   {edit(nil)[:headerMin-1], ErrTruncated},
		"cut setup":    {edit(nil)[:headerEnd], ErrTruncated},
		"low fixed":    {edit(func(b []byte) { b[offRelocatable] = 0; le.PutUint64(b[offPrefAddress:], 0x10000) }), ErrOverlap},
		"init size":    {edit(func(b []byte) { le.PutUint32(b[offInitSize:], 1<<32-1) }), ErrTooLarge},
		"out of RAM":   {edit(func(b []byte) { le.PutUint64(b[offPrefAddress:], 62*mib) }), ErrTooLarge},
		"above RAM":    {edit(func(b []byte) { le.PutUint64(b[offPrefAddress:], 66*mib) }), ErrTooLarge},
		"long cmdline": {edit(func(b []byte) { le.PutUint32(b[offCmdlineSize:], 3) }), ErrTooLarge},
		"initrd limit": {edit(func(b []byte) { le.PutUint32(b[offInitrdMax:], 100) }), ErrTooLarge},
		"no magic":     {edit(func(b []byte) { b[offMagic] = 'h' }), ErrNotKernel},
		"no boot flag": {edit(func(b []byte) { b[offBootFlag] = 0 }), ErrNotKernel},
		"empty":        {nil, ErrNotKernel},
		"text":         {[]byte("#!/bin/sh\n"), ErrNotKernel},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Load(newGuest(64*mib), Config{
				Kernel: image(c.file), Initrd: image([]byte("initrd")), Cmdline: "quiet", MemSize: 64 * mib,
			})
			wantErr(t, err, c.want)
		})
	}
}

func TestELFRejected(t *testing.T) {
	data := pattern(3, 0x4000)
	edit := func(f func(b []byte)) []byte {
		b := vmlinux(testPref, data, testPhdrs())
		f(b)
		return b
	}
	ph := func(i, field int) int { return elfHeaderSize + i*elfPhdrSize + field }
	for name, c := range map[string]struct {
		file []byte
		want error
	}{
		"32-bit":        {edit(func(b []byte) { b[4] = 1 }), ErrUnsupportedKernel},
		"big-endian":    {edit(func(b []byte) { b[5] = 2 }), ErrUnsupportedKernel},
		"arm64":         {edit(func(b []byte) { b[18] = 183 }), ErrUnsupportedKernel},
		"object":        {edit(func(b []byte) { b[16] = 1 }), ErrUnsupportedKernel},
		"no phdrs":      {edit(func(b []byte) { b[56] = 0 }), ErrMalformed},
		"many phdrs":    {edit(func(b []byte) { b[56], b[57] = 0xff, 0xff }), ErrMalformed},
		"phdr size":     {edit(func(b []byte) { b[54] = 32 }), ErrMalformed},
		"phdrs outside": {edit(func(b []byte) { le.PutUint64(b[32:], 1<<64-8) }), ErrTruncated},
		"nothing":       {edit(func(b []byte) { b[ph(0, 0)], b[ph(1, 0)] = 4, 4 }), ErrMalformed},
		"filesz":        {edit(func(b []byte) { le.PutUint64(b[ph(0, 40):], 1) }), ErrMalformed},
		"wraps":         {edit(func(b []byte) { le.PutUint64(b[ph(0, 24):], 1<<64-16) }), ErrMalformed},
		"cut":           {edit(func([]byte) {})[:0x3000], ErrTruncated},
		"far offset":    {edit(func(b []byte) { le.PutUint64(b[ph(0, 8):], 1<<63) }), ErrTruncated},
		"overlap":       {edit(func(b []byte) { le.PutUint64(b[ph(1, 24):], testPref+0x2fff) }), ErrOverlap},
		"low":           {edit(func(b []byte) { le.PutUint64(b[ph(1, 24):], 0x9000) }), ErrOverlap},
		"in the hole":   {edit(func(b []byte) { le.PutUint64(b[ph(1, 24):], 3<<30) }), ErrTooLarge},
		"huge bss":      {edit(func(b []byte) { le.PutUint64(b[ph(1, 40):], 1<<40) }), ErrTooLarge},
		"entry in bss":  {edit(func(b []byte) { le.PutUint64(b[24:], testPref+0x202000) }), ErrMalformed},
		"entry virtual": {edit(func(b []byte) { le.PutUint64(b[24:], 0xffffffff81000000) }), ErrMalformed},
		"cut header":    {edit(func([]byte) {})[:63], ErrTruncated},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Load(newGuest(4<<30), Config{Kernel: image(c.file), MemSize: 4 << 30})
			wantErr(t, err, c.want)
		})
	}
}

func TestConfigRejected(t *testing.T) {
	const size = 64 * mib
	good := func() Config {
		return Config{Kernel: image(bzImage(pattern(1, 8192), nil)), MemSize: size}
	}
	for name, c := range map[string]struct {
		edit func(*Config)
		want error
	}{
		"no kernel":       {func(c *Config) { c.Kernel = Image{} }, ErrNotKernel},
		"NUL":             {func(c *Config) { c.Cmdline = "a\x00b" }, ErrCmdline},
		"long cmdline":    {func(c *Config) { c.Cmdline = strings.Repeat("x", testCmdlineMax+1) }, ErrTooLarge},
		"big initrd":      {func(c *Config) { c.Initrd = Image{failingReader{}, size} }, ErrTooLarge},
		"negative initrd": {func(c *Config) { c.Initrd = Image{failingReader{}, -1} }, ErrMalformed},
		"short initrd":    {func(c *Config) { c.Initrd = image(nil); c.Initrd.Size = 5 }, ErrTruncated},
		"initrd fails":    {func(c *Config) { c.Initrd = Image{failingReader{}, 5} }, io.ErrClosedPipe},
		"kernel fails":    {func(c *Config) { c.Kernel = Image{failingReader{}, 5000} }, io.ErrClosedPipe},
		"RSDP in RAM":     {func(c *Config) { c.RSDP = 0x1000 }, ErrMalformed},
		"no memory":       {func(c *Config) { c.MemSize = 0 }, ErrTooLarge},
		"silly memory":    {func(c *Config) { c.MemSize = 1<<64 - 1 }, ErrTooLarge},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := good()
			c.edit(&cfg)
			_, err := Load(newGuest(size), cfg)
			wantErr(t, err, c.want)
		})
	}
	_, err := Load(newGuest(mib), good()) // memory smaller than cfg says
	var mem *MemoryError
	if !errors.As(err, &mem) || !errors.Is(err, errNotRAM) || mem.GPA != testPref {
		t.Errorf("failing memory: %v", err)
	}
}

func TestResetVector(t *testing.T) {
	g := newGuest(64 * mib)
	_, err := Load(g, Config{
		Kernel: image(bzImage(pattern(1, 8192), nil)), MemSize: 64 * mib, Reset: &Reset{Port: 0x602, Value: 1},
	})
	if err != nil {
		t.Fatal(err)
	}
	// As the GNU assembler has it: mov $0x602,%dx; mov $1,%al; out %al,%dx; 1: hlt; jmp 1b
	want := []byte{0xba, 0x02, 0x06, 0xb0, 0x01, 0xee, 0xf4, 0xeb, 0xfd}
	if got := g.read(0xffff0, 9); !bytes.Equal(got, want) {
		t.Errorf("reset vector is %x, want %x", got, want)
	}
}

// TestLowUsed: nothing outside LowUsed, the kernel and the initrd is written.
func TestLowUsed(t *testing.T) {
	g := newGuest(64 * mib)
	l, err := Load(g, Config{Kernel: image(bzImage(pattern(1, 8192), nil)), Initrd: image([]byte("x")), MemSize: 64 * mib})
	if err != nil {
		t.Fatal(err)
	}
	for n := range g.pages {
		page := Range{n * pageSize, pageSize}
		if !page.overlaps(LowUsed()) && !page.overlaps(l.Kernel) && !page.overlaps(l.Initrd) {
			t.Errorf("page %s was written", page)
		}
	}
	if LowUsed().End() > lowRAMEnd {
		t.Errorf("LowUsed is %s", LowUsed())
	}
}

func TestLoadFlat(t *testing.T) {
	code := pattern(5, 10000)
	for size, gib := range map[uint64]uint64{2 * mib: 4, 3 << 30: 4, 5 << 30: 6, 63 << 30: 64} {
		g := newGuest(size)
		c, err := LoadFlat(g, Flat{Image: image(code), Base: mib, Entry: mib + 16, MemSize: size})
		if err != nil {
			t.Fatal(err)
		}
		if c.RIP != mib+16 || c.RSP != stackTop || c.CS.DPL != 0 || c.CR4&cr4OSFXSR == 0 {
			t.Errorf("registers %+v", c)
		}
		if !bytes.Equal(g.read(mib, 10000), code) {
			t.Error("image differs")
		}
		checkLongMode(t, g, c, gib)
	}
	for name, c := range map[string]struct {
		f    Flat
		want error
	}{
		"empty":      {Flat{Base: mib, Entry: mib, MemSize: 2 * mib}, ErrMalformed},
		"low":        {Flat{Image: image(code), Base: 0x8000, Entry: 0x8000, MemSize: 2 * mib}, ErrOverlap},
		"beyond":     {Flat{Image: image(code), Base: 2 * mib, Entry: 2 * mib, MemSize: 2 * mib}, ErrTooLarge},
		"wraps":      {Flat{Image: image(code), Base: 1<<64 - 1, Entry: 1<<64 - 1, MemSize: 2 * mib}, ErrTooLarge},
		"entry":      {Flat{Image: image(code), Base: mib, Entry: mib + 10000, MemSize: 2 * mib}, ErrMalformed},
		"big memory": {Flat{Image: image(code), Base: mib, Entry: mib, MemSize: 64 << 30}, ErrTooLarge},
		"max memory": {Flat{Image: image(code), Base: mib, Entry: mib, MemSize: 1<<64 - 1}, ErrTooLarge},
		"hole":       {Flat{Image: image(code), Base: 3<<30 - 1, Entry: 3<<30 - 1, MemSize: 4 << 30}, ErrTooLarge},
	} {
		_, err := LoadFlat(newGuest(c.f.MemSize), c.f)
		if !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
}
