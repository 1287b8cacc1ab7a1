// Package uffd serves page faults in user space: the only caller of
// userfaultfd(2) in this module.
//
// The descriptor handles faults from kernel mode too (UFFD_USER_MODE_ONLY is
// never asked for), because KVM touches guest memory from the kernel: without
// that, an access of an emulated instruction to a missing page would fail with
// EFAULT, which KVM takes for memory-mapped I/O.
package uffd

import (
	"errors"
	"fmt"
)

// PageSize is the unit of all addresses and lengths.
const PageSize = 4096

// ErrNotPermitted says that the kernel has userfaultfd and that this process
// may not use it for faults of the kernel. The message says what to change.
var ErrNotPermitted = errors.New("userfaultfd is not permitted: run as root or with CAP_SYS_PTRACE," +
	" or give this user read and write access to /dev/userfaultfd," +
	" or set sysctl vm.unprivileged_userfaultfd=1")

// ErrKernel says that this kernel has no userfaultfd that serves shared
// memory: it was built without CONFIG_USERFAULTFD, or is older than 4.11. It
// matches errors.ErrUnsupported.
var ErrKernel = fmt.Errorf("the kernel lacks userfaultfd for shared memory"+
	" (CONFIG_USERFAULTFD, Linux 4.11 or later): %w", errors.ErrUnsupported)

// ErrClosed is returned by a Read that Close ended, and by all later calls.
var ErrClosed = errors.New("userfaultfd is closed")

// ErrNoWriteProtect says that this kernel can't write-protect all kinds of
// memory. It matches errors.ErrUnsupported.
var ErrNoWriteProtect = fmt.Errorf("the kernel lacks write protection by userfaultfd for shared memory"+
	" (Linux 5.19 or later with CONFIG_PTE_MARKER_UFFD_WP): %w", errors.ErrUnsupported)

// Registration modes (linux/userfaultfd.h, UFFDIO_REGISTER_MODE_*).
const (
	ModeMissing      = 1 << 0 // a page that is not there yet
	ModeWriteProtect = 1 << 1 // a write to a page that WriteProtect has protected
)
