package uffd

// Requests: _IO, _IOR and _IOWR of type 0xAA (linux/userfaultfd.h). The size of
// the argument is a part of the number; the tests check it.
const (
	iocNew          = 0xAA00
	reqAPI          = 0xC018AA3F
	reqRegister     = 0xC020AA00
	reqWake         = 0x8010AA02
	reqZeroPage     = 0xC020AA04
	reqWriteProtect = 0xC018AA06

	apiVersion       = 0xAA
	pageFaultFlagWP  = 1 << 0  // UFFD_FEATURE_PAGEFAULT_FLAG_WP, Linux 5.7
	missingShmem     = 1 << 5  // UFFD_FEATURE_MISSING_SHMEM
	wpHugetlbfsShmem = 1 << 12 // UFFD_FEATURE_WP_HUGETLBFS_SHMEM, Linux 5.19
	writeProtection  = pageFaultFlagWP | wpHugetlbfsShmem

	eventPageFault = 0x12   // UFFD_EVENT_PAGEFAULT
	faultWrite     = 1 << 0 // UFFD_PAGEFAULT_FLAG_WRITE
	faultWP        = 1 << 1 // UFFD_PAGEFAULT_FLAG_WP

	writeProtectOn = 1 << 0 // UFFDIO_WRITEPROTECT_MODE_WP
)

// Requests are the numbers of all requests that this package makes, for a filter of system calls.
func Requests() []uintptr {
	return []uintptr{iocNew, reqAPI, reqRegister, reqWake, reqZeroPage, reqWriteProtect}
}

// api is struct uffdio_api.
type api struct{ version, features, ioctls uint64 }

// span is struct uffdio_range.
type span struct{ start, length uint64 }

// register is struct uffdio_register.
type register struct {
	span
	mode, ioctls uint64
}

// zeroPage is struct uffdio_zeropage.
type zeroPage struct {
	span
	mode uint64
	done int64 // bytes, or a negative errno
}

// writeProtect is struct uffdio_writeprotect.
type writeProtect struct {
	span
	mode uint64
}

// An Event is one message of the kernel: struct uffd_msg with the page fault
// arm of its union.
type Event struct {
	event uint8
	_     [7]byte
	flags uint64
	addr  uint64
	_     uint64
}
