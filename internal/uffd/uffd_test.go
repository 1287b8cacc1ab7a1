//go:build linux && amd64

package uffd

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"unsafe"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// abi is what this package says of the kernel's structs and numbers.
func abi() map[string]uint64 {
	return map[string]uint64{
		"sizeof(struct uffdio_api)":                        uint64(unsafe.Sizeof(api{})),
		"offsetof(struct uffdio_api, features)":            uint64(unsafe.Offsetof(api{}.features)),
		"offsetof(struct uffdio_api, ioctls)":              uint64(unsafe.Offsetof(api{}.ioctls)),
		"sizeof(struct uffdio_range)":                      uint64(unsafe.Sizeof(span{})),
		"offsetof(struct uffdio_range, len)":               uint64(unsafe.Offsetof(span{}.length)),
		"sizeof(struct uffdio_register)":                   uint64(unsafe.Sizeof(register{})),
		"offsetof(struct uffdio_register, mode)":           uint64(unsafe.Offsetof(register{}.mode)),
		"offsetof(struct uffdio_register, ioctls)":         uint64(unsafe.Offsetof(register{}.ioctls)),
		"sizeof(struct uffdio_zeropage)":                   uint64(unsafe.Sizeof(zeroPage{})),
		"offsetof(struct uffdio_zeropage, mode)":           uint64(unsafe.Offsetof(zeroPage{}.mode)),
		"offsetof(struct uffdio_zeropage, zeropage)":       uint64(unsafe.Offsetof(zeroPage{}.done)),
		"sizeof(struct uffdio_writeprotect)":               uint64(unsafe.Sizeof(writeProtect{})),
		"offsetof(struct uffdio_writeprotect, mode)":       uint64(unsafe.Offsetof(writeProtect{}.mode)),
		"sizeof(struct uffd_msg)":                          uint64(unsafe.Sizeof(Event{})),
		"offsetof(struct uffd_msg, arg.pagefault.flags)":   uint64(unsafe.Offsetof(Event{}.flags)),
		"offsetof(struct uffd_msg, arg.pagefault.address)": uint64(unsafe.Offsetof(Event{}.addr)),

		"USERFAULTFD_IOC_NEW":          iocNew,
		"UFFDIO_API":                   reqAPI,
		"UFFDIO_REGISTER":              reqRegister,
		"UFFDIO_WAKE":                  reqWake,
		"UFFDIO_ZEROPAGE":              reqZeroPage,
		"UFFDIO_WRITEPROTECT":          reqWriteProtect,
		"UFFD_API":                     apiVersion,
		"UFFD_FEATURE_MISSING_SHMEM":   missingShmem,
		"UFFD_EVENT_PAGEFAULT":         eventPageFault,
		"UFFD_PAGEFAULT_FLAG_WRITE":    faultWrite,
		"UFFDIO_REGISTER_MODE_MISSING": ModeMissing,

		"UFFD_FEATURE_PAGEFAULT_FLAG_WP":  pageFaultFlagWP,
		"UFFD_FEATURE_WP_HUGETLBFS_SHMEM": wpHugetlbfsShmem,
		"UFFD_PAGEFAULT_FLAG_WP":          faultWP,
		"UFFDIO_REGISTER_MODE_WP":         ModeWriteProtect,
		"UFFDIO_WRITEPROTECT_MODE_WP":     writeProtectOn,
	}
}

// kernelABI is what the headers of Linux 6.1 say, for hosts without a compiler
// or headers: include/uapi/linux/userfaultfd.h.
var kernelABI = map[string]uint64{
	"sizeof(struct uffdio_api)":                        24,
	"offsetof(struct uffdio_api, features)":            8,
	"offsetof(struct uffdio_api, ioctls)":              16,
	"sizeof(struct uffdio_range)":                      16,
	"offsetof(struct uffdio_range, len)":               8,
	"sizeof(struct uffdio_register)":                   32,
	"offsetof(struct uffdio_register, mode)":           16,
	"offsetof(struct uffdio_register, ioctls)":         24,
	"sizeof(struct uffdio_zeropage)":                   32,
	"offsetof(struct uffdio_zeropage, mode)":           16,
	"offsetof(struct uffdio_zeropage, zeropage)":       24,
	"sizeof(struct uffdio_writeprotect)":               24,
	"offsetof(struct uffdio_writeprotect, mode)":       16,
	"sizeof(struct uffd_msg)":                          32,
	"offsetof(struct uffd_msg, arg.pagefault.flags)":   8,
	"offsetof(struct uffd_msg, arg.pagefault.address)": 16,

	"USERFAULTFD_IOC_NEW":          0xaa00,
	"UFFDIO_API":                   0xc018aa3f,
	"UFFDIO_REGISTER":              0xc020aa00,
	"UFFDIO_WAKE":                  0x8010aa02,
	"UFFDIO_ZEROPAGE":              0xc020aa04,
	"UFFDIO_WRITEPROTECT":          0xc018aa06,
	"UFFD_API":                     0xaa,
	"UFFD_FEATURE_MISSING_SHMEM":   32,
	"UFFD_EVENT_PAGEFAULT":         0x12,
	"UFFD_PAGEFAULT_FLAG_WRITE":    1,
	"UFFDIO_REGISTER_MODE_MISSING": 1,

	"UFFD_FEATURE_PAGEFAULT_FLAG_WP":  1,
	"UFFD_FEATURE_WP_HUGETLBFS_SHMEM": 4096,
	"UFFD_PAGEFAULT_FLAG_WP":          2,
	"UFFDIO_REGISTER_MODE_WP":         2,
	"UFFDIO_WRITEPROTECT_MODE_WP":     1,
}

func TestABI(t *testing.T) {
	check := func(t *testing.T, want map[string]uint64) {
		for what, ours := range abi() {
			if theirs, ok := want[what]; !ok || ours != theirs {
				t.Errorf("%s is %#x here and %#x in the kernel (known: %v)", what, ours, theirs, ok)
			}
		}
	}
	t.Run("table", func(t *testing.T) { check(t, kernelABI) })
	t.Run("headers", func(t *testing.T) { check(t, compileABI(t)) })
}

// compileABI has the C compiler say what the installed headers mean.
func compileABI(t *testing.T) map[string]uint64 {
	cc, err := exec.LookPath("cc")
	if err != nil {
		t.Skip(err)
	}
	const header = "/usr/include/linux/userfaultfd.h"
	if _, err := os.Stat(header); err != nil {
		t.Skip(err)
	}
	var src strings.Builder
	src.WriteString("#include <stddef.h>\n#include <stdio.h>\n#include <sys/ioctl.h>\n#include <linux/userfaultfd.h>\nint main(void) {\n")
	for what := range abi() {
		fmt.Fprintf(&src, "printf(\"%s=%%llu\\n\", (unsigned long long)(%s));\n", what, what)
	}
	src.WriteString("return 0; }\n")
	dir := t.TempDir()
	file, prog := filepath.Join(dir, "abi.c"), filepath.Join(dir, "abi")
	if err := os.WriteFile(file, []byte(src.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(cc, "-o", prog, file).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	out, err := exec.Command(prog).Output()
	if err != nil {
		t.Fatal(err)
	}
	values := make(map[string]uint64)
	for line := range strings.Lines(string(out)) {
		what, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		var n uint64
		if _, err := fmt.Sscan(value, &n); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		values[what] = n
	}
	return values
}

func open(t *testing.T) *FD {
	t.Helper()
	fd, err := Open()
	if errors.Is(err, ErrNotPermitted) || errors.Is(err, ErrKernel) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { fd.Close() })
	return fd
}

// mapping is n pages of private memory of an empty memfd, registered with fd.
// No Go code touches it.
func mapping(t *testing.T, fd *FD, n int) (addr uintptr, file int) {
	t.Helper()
	file, err := unix.MemfdCreate("uffd", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(file) })
	if err := unix.Ftruncate(file, int64(n)*PageSize); err != nil {
		t.Fatal(err)
	}
	p, err := unix.MmapPtr(file, 0, nil, uintptr(n)*PageSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.MunmapPtr(p, uintptr(n)*PageSize) })
	if err := fd.Register(uintptr(p), uintptr(n)*PageSize, ModeMissing); err != nil {
		t.Fatal(err)
	}
	return uintptr(p), file
}

// load has the kernel read a byte at each address, each on its own thread, and
// returns the sum of them.
func load(addrs ...uintptr) chan int {
	sum := make(chan int, len(addrs))
	for _, addr := range addrs {
		go func() {
			var ends [2]int
			var b [1]byte
			if unix.Pipe2(ends[:], unix.O_CLOEXEC) == nil {
				defer unix.Close(ends[0])
				defer unix.Close(ends[1])
			}
			if _, _, errno := unix.Syscall(unix.SYS_WRITE, uintptr(ends[1]), addr, 1); errno != 0 {
				sum <- -1
				return
			}
			unix.Read(ends[0], b[:])
			sum <- int(b[0])
		}()
	}
	return sum
}

func TestFaultsAreServed(t *testing.T) {
	fd := open(t)
	addr, file := mapping(t, fd, 4)
	got := load(addr+PageSize, addr+3*PageSize)
	seen := map[uintptr]bool{}
	events := make([]Event, 8)
	for len(seen) < 2 {
		n, err := fd.Read(events)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range events[:n] {
			at, write, ok := e.Fault()
			if !ok || write {
				t.Fatalf("event %+v", e)
			}
			seen[at] = true
		}
	}
	if !seen[addr+PageSize] || !seen[addr+3*PageSize] {
		t.Fatalf("faults at %v of %#x", seen, addr)
	}
	page := make([]byte, PageSize)
	page[0] = 41
	if _, err := unix.Pwrite(file, page, PageSize); err != nil {
		t.Fatal(err)
	}
	if err := fd.Wake(addr+PageSize, PageSize); err != nil {
		t.Fatal(err)
	}
	if b := <-got; b != 41 {
		t.Fatalf("loaded %d", b)
	}
	// Page 1 is mapped: ZeroPage passes it by and maps the others.
	if n, err := fd.ZeroPage(addr, 4*PageSize); n != 3 || err != nil {
		t.Fatalf("ZeroPage: %d, %v", n, err)
	}
	if b := <-got; b != 0 {
		t.Fatalf("loaded %d from a page of zeros", b)
	}
	if n, err := fd.ZeroPage(addr, 4*PageSize); n != 0 || err != nil {
		t.Fatalf("ZeroPage again: %d, %v", n, err)
	}
	if b := <-load(addr + PageSize); b != 41 {
		t.Fatalf("ZeroPage changed a page that was there: %d", b)
	}
}

// A write to a protected page is reported, waits, and goes on when the protection is
// off. A range that is upgraded still reports missing pages.
func TestWriteProtect(t *testing.T) {
	fd := open(t)
	if err := fd.CanWriteProtect(); err != nil {
		t.Skip(err)
	}
	addr, _ := mapping(t, fd, 2)
	if err := fd.Register(addr, 2*PageSize, ModeMissing|ModeWriteProtect); err != nil {
		t.Fatal(err)
	}
	if n, err := fd.ZeroPage(addr, PageSize); n != 1 || err != nil {
		t.Fatalf("ZeroPage: %d, %v", n, err)
	}
	if err := fd.WriteProtect(addr, PageSize, true); err != nil {
		t.Fatal(err)
	}
	for i, want := range []bool{true, false} {
		at := addr + uintptr(i)*PageSize
		stored := store(t, at)
		var events [1]Event
		if _, err := fd.Read(events[:]); err != nil {
			t.Fatal(err)
		}
		if got, write, ok := events[0].Fault(); got != at || !write || !ok || events[0].Protected() != want {
			t.Fatalf("event %+v at page %d, protected: want %v", events[0], i, want)
		}
		var err error
		if want {
			err = fd.WriteProtect(addr, PageSize, false)
		} else {
			_, err = fd.ZeroPage(at, PageSize)
		}
		if err != nil {
			t.Fatal(err)
		}
		if err := <-stored; err != nil {
			t.Fatal(err)
		}
	}
	if err := fd.WriteProtect(addr+2*PageSize, PageSize, true); !errors.Is(err, unix.ENOENT) {
		t.Errorf("beyond the mapping: %v, want ENOENT", err)
	}
}

// store has the kernel write a byte to addr.
func store(t *testing.T, addr uintptr) <-chan error {
	done := make(chan error, 1)
	f, err := os.Open("/dev/zero")
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		defer f.Close()
		if _, _, errno := unix.Syscall(unix.SYS_READ, f.Fd(), addr, 1); errno != 0 {
			done <- errno
			return
		}
		done <- nil
	}()
	return done
}

func TestCloseEndsRead(t *testing.T) {
	fd := open(t)
	ended := make(chan error)
	for range 2 {
		go func() {
			_, err := fd.Read(make([]Event, 1))
			ended <- err
		}()
	}
	if err := fd.Close(); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := <-ended; !errors.Is(err, ErrClosed) {
			t.Errorf("Read: %v", err)
		}
	}
	if err := fd.Wake(0, PageSize); !errors.Is(err, ErrClosed) {
		t.Errorf("Wake: %v", err)
	}
	if err := fd.Close(); err != nil {
		t.Errorf("second Close: %v", err)
	}
}

func TestBadRange(t *testing.T) {
	fd := open(t)
	addr, _ := mapping(t, fd, 1)
	if _, err := fd.ZeroPage(addr, 2*PageSize); !errors.Is(err, unix.ENOENT) {
		t.Errorf("beyond the mapping: %v, want ENOENT", err)
	}
	if err := fd.Register(addr+1, PageSize, ModeMissing); !errors.Is(err, unix.EINVAL) {
		t.Errorf("unaligned: %v, want EINVAL", err)
	}
}

// A thread without any privilege is told what it lacks.
func TestNotPermitted(t *testing.T) {
	open(t) // or skip: then the kernel has none to be permitted
	if b, err := os.ReadFile("/proc/sys/vm/unprivileged_userfaultfd"); err != nil || strings.TrimSpace(string(b)) != "0" {
		t.Skipf("everybody may: vm.unprivileged_userfaultfd is %q (%v)", b, err)
	}
	if st, err := os.Stat("/dev/userfaultfd"); err == nil && st.Mode()&0o006 != 0 {
		t.Skip("everybody may: /dev/userfaultfd is open to all")
	}
	result := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlock: the thread ends with the goroutine
		if err := dropPrivileges(); err != nil {
			result <- err
			return
		}
		fd, err := Open()
		if err == nil {
			fd.Close()
		}
		result <- err
	}()
	if err := <-result; !errors.Is(err, ErrNotPermitted) {
		t.Errorf("Open: %v, want ErrNotPermitted", err)
	}
}

// dropPrivileges makes this thread nobody's, without capabilities.
func dropPrivileges() error {
	if err := unix.Setfsuid(65534); err != nil && os.Getuid() == 0 {
		return err
	}
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var none [2]unix.CapUserData
	return unix.Capset(&header, &none[0])
}
