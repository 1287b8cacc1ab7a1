package boot

import (
	"errors"
	"testing"
)

// fuzzLoad loads anything into a guest that refuses writes outside its RAM: every outcome is a typed error, or a
// kernel inside RAM that its entry point lies in.
func fuzzLoad(t *testing.T, file []byte) {
	const size = 256 * mib
	g := newGuest(size)
	l, err := Load(g, Config{Kernel: image(file), Initrd: image([]byte("initrd")), Cmdline: "q", MemSize: size})
	if err != nil {
		for _, typed := range []error{ErrNotKernel, ErrUnsupportedKernel, ErrMalformed, ErrTruncated, ErrTooLarge, ErrOverlap} {
			if errors.Is(err, typed) {
				return
			}
		}
		t.Fatalf("untyped error: %v", err)
	}
	if l.Kernel.GPA < LowEnd || l.Kernel.End() > size || l.Kernel.overlaps(l.Initrd) {
		t.Fatalf("kernel at %s, initrd at %s", l.Kernel, l.Initrd)
	}
	if rip := l.CPU.RIP; rip < l.Kernel.GPA || rip >= l.Kernel.End() {
		t.Fatalf("entry point %#x is outside the kernel at %s", rip, l.Kernel)
	}
	if string(g.read(l.Initrd.GPA, 6)) != "initrd" {
		t.Fatal("the initrd was overwritten")
	}
	checkBootState(t, g, l.CPU)
}

// The seeds are small: the fuzzer spends its time on minimizing long inputs.

func FuzzLoadBzImage(f *testing.F) {
	code := pattern(1, entry64+16)
	f.Add(bzImage(code, nil))
	f.Add(bzImage(code, func(b []byte) { b[offRelocatable] = 0 }))
	f.Add(bzImage(nil, func(b []byte) { b[offSetupSects] = 0 }))
	f.Fuzz(fuzzLoad)
}

func FuzzLoadELF(f *testing.F) {
	hdrs := []phdr{{ptLoad, testELFData, testPref, 16, 16}, {ptLoad, testELFData + 16, testPref + 0x200000, 8, 0x5000}}
	f.Add(vmlinux(testPref, pattern(1, 24), hdrs))
	f.Add(vmlinux(testPref, pattern(1, 24), hdrs[:1]))
	f.Add(vmlinux(testPref, nil, nil))
	f.Fuzz(fuzzLoad)
}
