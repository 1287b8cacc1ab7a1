package confine

import (
	"fmt"
	"runtime"
	"unsafe"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// haveSeccomp says whether this process may have filters that can end it (Linux 4.14).
func haveSeccomp() bool {
	action := kill
	_, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_GET_ACTION_AVAIL, 0, uintptr(unsafe.Pointer(&action)))
	return errno == 0
}

// install has all threads, and those to come, make their system calls through a filter. None of them can gain
// privileges any more by executing a program.
func install(program []bpf.RawInstruction) error {
	// no_new_privs is set for this thread, and goes from it to the others with the filter.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("confine: give up new privileges: %w", err)
	}
	instructions := make([]unix.SockFilter, len(program))
	for i, p := range program {
		instructions[i] = unix.SockFilter{Code: p.Op, Jt: p.Jt, Jf: p.Jf, K: p.K}
	}
	prog := unix.SockFprog{Len: uint16(len(instructions)), Filter: &instructions[0]}
	// Without TSYNC_ESRCH (Linux 5.7), a thread that can't be given the filter is told by a positive result.
	const flags = unix.SECCOMP_FILTER_FLAG_TSYNC | unix.SECCOMP_FILTER_FLAG_TSYNC_ESRCH
	if _, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, flags, uintptr(unsafe.Pointer(&prog))); errno != 0 {
		return fmt.Errorf("confine: bound the system calls: %w", errno)
	}
	return nil
}
