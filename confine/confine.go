// Package confine has a process give up what it doesn't need for running guests, for good: a guest that breaks out of
// its machine finds itself in a process that can start no program, reach no file but those it was given, and make a
// hundred system calls in place of four hundred.
//
// Two parts of Linux do that. A seccomp filter bounds which system calls there are, and with which arguments; it is the
// same for everybody. Landlock bounds which files can be opened, which Rules say. Both count for all threads of the
// process, those of the Go runtime and of C included, and for good.
//
// What is open already stays usable, so a program opens what it needs only once (listening sockets, taps, disks, key
// files) and then calls [Apply], before its first guest runs:
//
//	applied, err := confine.Apply(confine.Rules{ReadWrite: []string{"/var/lib/me"}, ReadOnly: []string{"/images"}})
//	if err != nil { ... }             // the process may be confined in part: end it
//	if applied.Landlock == 0 { ... }  // this kernel has none: only system calls are bounded
//
// A call that is not allowed fails with EPERM, and a file that is not with EACCES (errors.Is(err, fs.ErrPermission)
// for both). What only somebody who has taken over the process would do ends it with SIGSYS: to execute a program, to
// attach to another process, to mount, to load code into the kernel, to change user. os/exec does not come so far: it gets
// EPERM when it forks. So a program that starts others has guests in a process of their own.
package confine

import "errors"

var (
	// ErrUnsupported says that the system can't confine a process: it is not Linux on x86-64, or its kernel has no seccomp
	// filters (Linux 5.7), or something around the process forbids them.
	ErrUnsupported = errors.New("confine: this system has no seccomp filters, or does not allow them")
	// ErrApplied says that the process is confined already. It can't be confined further, nor less.
	ErrApplied = errors.New("confine: this process is confined already")
)

// Rules say what a process keeps. Paths are followed through symbolic links at once, and mean the files and directories
// that are there then: one that is replaced later is another. A path that is not there is an error. The devices and files
// that running guests and the Go runtime need are allowed in any case: /dev/kvm, /dev/userfaultfd, /dev/urandom,
// /dev/null, /proc/self and the time zones.
type Rules struct {
	// ReadWrite are directories in which, at any depth, files, directories and sockets may be made, read, changed, moved,
	// connected to and removed; or files and devices that may be read and changed.
	ReadWrite []string
	// ReadOnly are directories which, at any depth, may be read; or files.
	ReadOnly []string
	// Remove are directories whose files, at any depth, may be removed, and no more.
	Remove []string
	// Sockets are directories whose unix sockets may be connected to and removed: where machines have their vsock, if they are made
	// before. Before version 9 of Landlock sockets that other processes have made can be connected to wherever they are.
	Sockets []string
	// Network keeps new sockets of IPv4 and IPv6, and what finding hosts and checking certificates reads. Without it the
	// process can only go on to use those that it has, and to accept connections.
	Network bool
}

// Level is how far a system can confine a process, or has.
type Level struct {
	// Seccomp says that system calls are bounded. Always so if Apply returns no error.
	Seccomp bool
	// Landlock is the version of the kernel's interface by which files are bounded; 0 if there is none, or Landlock
	// is not turned on. The first one that is used is 2 (Linux 5.19). From 4 on (Linux 6.7) TCP is bounded as well, from 5 on
	// (6.10) requests to devices, from 6 on (6.12) signals and abstract unix sockets of others.
	Landlock int
}
