package pagemap

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync/atomic"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The PAGEMAP_SCAN interface of Linux 6.7 (include/uapi/linux/fs.h; see
// Documentation/admin-guide/mm/pagemap.rst).
const (
	reqScan = 0xC0606610 // _IOWR('f', 16, struct pm_scan_arg)

	isFile    = 1 << 2 // PAGE_IS_FILE: belongs to a file, or is shared
	isPresent = 1 << 3 // PAGE_IS_PRESENT
	isSwapped = 1 << 4 // PAGE_IS_SWAPPED
	isZero    = 1 << 5 // PAGE_IS_PFNZERO: the kernel's page of zeros
)

// Requests are the numbers of all requests that this package makes, for a filter of system calls.
func Requests() []uintptr { return []uintptr{reqScan} }

// scanArg is struct pm_scan_arg.
type scanArg struct {
	size             uint64
	flags            uint64
	start            uint64
	end              uint64
	walkEnd          uint64 // out: where the scan stopped
	vec              uint64
	vecLen           uint64
	maxPages         uint64
	categoryInverted uint64
	categoryMask     uint64
	categoryAnyOf    uint64
	returnMask       uint64
}

// region is struct page_region.
type region struct{ start, end, categories uint64 }

// Entries of /proc/pid/pagemap, 8 bytes for each page.
const (
	entryFile    = 1 << 61
	entrySwapped = 1 << 62
	entryPresent = 1 << 63
)

// noScan is set when the kernel turned out not to have PAGEMAP_SCAN.
var noScan atomic.Bool

// A Map reads the page tables of this process. It is safe for concurrent use.
type Map struct{ f *os.File }

// Open opens the page map of this process.
func Open() (*Map, error) {
	f, err := os.Open("/proc/self/pagemap")
	if err != nil {
		return nil, fmt.Errorf("pagemap: %w", err)
	}
	return &Map{f}, nil
}

// Close closes it.
func (m *Map) Close() error { return m.f.Close() }

// Private returns the private pages of [start, end) in ascending order, merged:
// pages that are in memory or in swap, and are neither a file's nor the
// kernel's page of zeros. Kernels before 6.7 can't tell the page of zeros apart:
// there, pages that were only read are returned too.
func (m *Map) Private(start, end uintptr) ([]Region, error) {
	return m.find(start, end, isFile|isZero)
}

// Mapped returns the pages of [start, end) that somebody has touched, in ascending order, merged: private ones, and those of a
// file that the kernel has mapped, be it because a neighbour was touched. The page of zeros is left out, but before Linux 6.7.
func (m *Map) Mapped(start, end uintptr) ([]Region, error) { return m.find(start, end, isZero) }

// find returns pages that are in memory or in swap and in none of the categories without.
func (m *Map) find(start, end uintptr, without uint64) ([]Region, error) {
	if !noScan.Load() {
		found, err := m.scan(start, end, without)
		if !errors.Is(err, unix.ENOTTY) {
			return found, err
		}
		noScan.Store(true)
	}
	return m.read(start, end, without)
}

// scan asks the kernel to look, with PAGEMAP_SCAN.
func (m *Map) scan(start, end uintptr, without uint64) ([]Region, error) {
	raw, err := m.f.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("pagemap: %w", err)
	}
	vec := make([]region, 512)
	// The kernel finds vec through an address inside of arg, which is not a
	// pointer to the garbage collector.
	var pin runtime.Pinner
	pin.Pin(&vec[0])
	defer pin.Unpin()
	arg := scanArg{
		size:             uint64(unsafe.Sizeof(scanArg{})),
		start:            uint64(start),
		end:              uint64(end),
		vec:              uint64(uintptr(unsafe.Pointer(&vec[0]))),
		vecLen:           uint64(len(vec)),
		categoryInverted: without,
		categoryMask:     without,
		categoryAnyOf:    isPresent | isSwapped,
		returnMask:       isPresent | isSwapped,
	}
	var found []Region
	for arg.start < arg.end {
		n, err := scanOnce(raw, &arg)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err == nil && arg.walkEnd <= arg.start {
			err = unix.EIO // it promises progress
		}
		if err != nil {
			return nil, fmt.Errorf("pagemap: PAGEMAP_SCAN of %#x: %w", arg.start, err)
		}
		for _, r := range vec[:n] {
			found = add(found, uintptr(r.start), uintptr(r.end))
		}
		arg.start = arg.walkEnd
	}
	return found, nil
}

func scanOnce(raw syscall.RawConn, arg *scanArg) (n int, err error) {
	cerr := raw.Control(func(fd uintptr) {
		r, _, errno := unix.Syscall(unix.SYS_IOCTL, fd, reqScan, uintptr(unsafe.Pointer(arg)))
		if n = int(r); errno != 0 {
			n, err = 0, errno
		}
	})
	return n, errors.Join(cerr, err)
}

// read looks at the entries one by one, 512 KiB of them (256 MiB of memory) at
// a time.
func (m *Map) read(start, end uintptr, without uint64) ([]Region, error) {
	none := uint64(0)
	if without&isFile != 0 {
		none = entryFile
	}
	var found []Region
	entries := make([]uint64, min(64<<10, (end-start)/PageSize))
	for start < end {
		part := entries[:min(uintptr(len(entries)), (end-start)/PageSize)]
		buf := unsafe.Slice((*byte)(unsafe.Pointer(&part[0])), len(part)*8)
		if _, err := m.f.ReadAt(buf, int64(start/PageSize*8)); err != nil {
			return nil, fmt.Errorf("pagemap: %w", err)
		}
		for i, e := range part {
			if e&(entryPresent|entrySwapped) != 0 && e&none == 0 {
				page := start + uintptr(i)*PageSize
				found = add(found, page, page+PageSize)
			}
		}
		start += uintptr(len(part)) * PageSize
	}
	return found, nil
}
