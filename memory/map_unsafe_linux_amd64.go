package memory

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A mapping is a reservation of address space with RAM mapped into it.
type mapping struct {
	reserved unsafe.Pointer // what munmap gets
	length   uintptr
	mem      []byte // the span, aligned; only RAM in it is accessible
}

// reserve takes address space for n bytes, none of it accessible.
func reserve(n uint64) (*mapping, error) {
	length := uintptr(n) + hugePage
	p, err := unix.MmapPtr(-1, 0, nil, length, unix.PROT_NONE,
		unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		return nil, fmt.Errorf("memory: reserve %d bytes of address space: %w", length, err)
	}
	skip := -uintptr(p) & (hugePage - 1)
	return &mapping{p, length, unsafe.Slice((*byte)(unsafe.Add(p, skip)), n)}, nil
}

// place maps r: anonymous memory, or with an image its file, private and
// writable either way. Guest RAM has no place in a core dump.
func (m *mapping) place(r Range, image *os.File) error {
	fd, offset := -1, int64(0)
	flags := unix.MAP_PRIVATE | unix.MAP_FIXED | unix.MAP_NORESERVE
	if image == nil {
		flags |= unix.MAP_ANONYMOUS
	} else {
		fd, offset = int(image.Fd()), int64(r.GPA)
	}
	at := unsafe.Pointer(&m.mem[r.GPA])
	_, err := unix.MmapPtr(fd, offset, at, uintptr(r.Len), unix.PROT_READ|unix.PROT_WRITE, flags)
	if err != nil {
		return fmt.Errorf("memory: map %d bytes of RAM at GPA %#x: %w", r.Len, r.GPA, err)
	}
	if err := unix.Madvise(m.mem[r.GPA:r.End()], unix.MADV_DONTDUMP); err != nil {
		return fmt.Errorf("memory: exclude RAM from core dumps: %w", err)
	}
	return nil
}

// advise asks for huge pages, or against them, where the kernel has them.
func (m *mapping) advise(r Range, huge bool) error {
	advice := unix.MADV_NOHUGEPAGE
	if huge {
		advice = unix.MADV_HUGEPAGE
	}
	err := unix.Madvise(m.mem[r.GPA:r.End()], advice)
	if err != nil && !errors.Is(err, unix.EINVAL) { // EINVAL: built without them
		return fmt.Errorf("memory: advise on huge pages: %w", err)
	}
	return nil
}

// collapse has the kernel (6.1 and later) move the file's pages of r, which is hugePage long, to a huge page, and map it.
func (m *mapping) collapse(r Range) error {
	return unix.Madvise(m.mem[r.GPA:r.End()], unix.MADV_COLLAPSE)
}

// discard drops the private pages of r. What is read there next is what lies
// beneath: zeros, or the image. It does not wait for a missing page.
func (m *mapping) discard(r Range) error {
	if err := unix.Madvise(m.mem[r.GPA:r.End()], unix.MADV_DONTNEED); err != nil {
		return fmt.Errorf("memory: discard %d bytes at GPA %#x: %w", r.Len, r.GPA, err)
	}
	return nil
}

// deny makes r inaccessible: a system call that touches it gets EFAULT.
func (m *mapping) deny(r Range) error {
	return unix.Mprotect(m.mem[r.GPA:r.End()], unix.PROT_NONE)
}

// load copies ram to p, which is as long. Aligned words of 2, 4 and 8 bytes are
// read by one instruction each, which copy does not promise (and doesn't do for
// 2 bytes): the guest may be writing them.
func load(p, ram []byte) {
	at := unsafe.Pointer(unsafe.SliceData(ram))
	if uintptr(at)&uintptr(len(ram)-1) != 0 {
		copy(p, ram)
		return
	}
	switch len(ram) {
	case 2:
		binary.NativeEndian.PutUint16(p, *(*uint16)(at)) // there is no atomic.Uint16; this is a MOVW
	case 4:
		binary.NativeEndian.PutUint32(p, atomic.LoadUint32((*uint32)(at)))
	case 8:
		binary.NativeEndian.PutUint64(p, atomic.LoadUint64((*uint64)(at)))
	default:
		copy(p, ram)
	}
}

// store copies p to ram, as load does the other way: the guest may be reading.
func store(ram, p []byte) {
	at := unsafe.Pointer(unsafe.SliceData(ram))
	if uintptr(at)&uintptr(len(ram)-1) != 0 {
		copy(ram, p)
		return
	}
	switch len(ram) {
	case 2:
		*(*uint16)(at) = binary.NativeEndian.Uint16(p)
	case 4:
		atomic.StoreUint32((*uint32)(at), binary.NativeEndian.Uint32(p))
	case 8:
		atomic.StoreUint64((*uint64)(at), binary.NativeEndian.Uint64(p))
	default:
		copy(ram, p)
	}
}

// base is the host address of GPA 0.
func (m *mapping) base() uintptr { return uintptr(unsafe.Pointer(unsafe.SliceData(m.mem))) }

// unmap gives the address space back. Nobody may touch the mapping any more.
func (m *mapping) unmap() error {
	if err := unix.MunmapPtr(m.reserved, m.length); err != nil {
		return fmt.Errorf("memory: unmap: %w", err)
	}
	return nil
}
