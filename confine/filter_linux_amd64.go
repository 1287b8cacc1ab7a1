package confine

import (
	"slices"

	"github.com/elastic/go-seccomp-bpf"
	"golang.org/x/sys/unix"

	"github.com/cryovisor/cryovisor/internal/kvm"
	"github.com/cryovisor/cryovisor/internal/pagemap"
	"github.com/cryovisor/cryovisor/internal/uffd"
)

// newNamespaces are the flags of clone that make namespaces, and the one that hands the new thread to a tracer.
const newNamespaces = unix.CLONE_NEWCGROUP | unix.CLONE_NEWIPC | unix.CLONE_NEWNET | unix.CLONE_NEWNS | unix.CLONE_NEWPID |
	unix.CLONE_NEWUSER | unix.CLONE_NEWUTS | unix.CLONE_PTRACE

// requests are the ioctls that are allowed, whatever the descriptor is; the number of a request names the kind of device.
func requests() []uintptr {
	return slices.Concat(kvm.Requests(), uffd.Requests(), pagemap.Requests(), []uintptr{
		unix.TUNSETIFF, unix.TUNGETIFF, unix.TUNSETVNETHDRSZ, unix.TUNSETOFFLOAD, // taps
		unix.BLKSSZGET,                            // block devices
		unix.TCGETS, unix.TCSETS, unix.TIOCGWINSZ, // terminals, but not to type for the user (TIOCSTI, TIOCLINUX)
	})
}

// policy is the filter of the process pid. KVM_RUN comes first, as it is what guests wait for.
func policy(r Rules, pid int) seccomp.Policy {
	var free []string
	for _, group := range freeCalls {
		free = append(free, group...)
	}
	return seccomp.Policy{
		DefaultAction: seccomp.ActionErrno, // EPERM; also for the calls of 32-bit programs
		Syscalls: []seccomp.SyscallGroup{
			{Action: seccomp.ActionAllow, NamesWithCondtions: anyOf("ioctl", 1, requests()...)},
			{Action: seccomp.ActionAllow, Names: free},
			{Action: seccomp.ActionAllow, NamesWithCondtions: conditional(r, uint64(pid))},
			// Its arguments lie in memory, where no filter sees them. glibc falls back to clone.
			{Action: seccomp.ActionErrno | seccomp.Action(unix.ENOSYS), Names: []string{"clone3"}},
			{Action: seccomp.ActionKillProcess, Names: fatalCalls},
		},
	}
}

// conditional are the system calls that are allowed with some arguments.
func conditional(r Rules, pid uint64) []seccomp.NameWithConditions {
	families := []uintptr{unix.AF_UNIX}
	if r.Network {
		families = append(families, unix.AF_INET, unix.AF_INET6)
	}
	return slices.Concat(
		only("clone", bits(0, seccomp.BitsSet, unix.CLONE_THREAD), bits(0, seccomp.BitsNotSet, newNamespaces)), // no processes
		only("mmap", bits(2, seccomp.BitsNotSet, unix.PROT_EXEC)),                                              // no code
		only("mprotect", bits(2, seccomp.BitsNotSet, unix.PROT_EXEC)),
		anyOf("socket", 0, families...),
		anyOf("socketpair", 0, unix.AF_UNIX),
		only("kill", bits(0, seccomp.Equal, pid)), // no signals to others
		only("tgkill", bits(0, seccomp.Equal, pid)),
		only("prlimit64", bits(0, seccomp.Equal, 0), bits(2, seccomp.Equal, 0)), // its own, to read
		anyOf("prctl", 0, unix.PR_SET_VMA, unix.PR_SET_NAME),                    // names of mappings and threads
	)
}

// anyOf allows a system call if an argument is one of the values.
func anyOf(name string, argument uint32, values ...uintptr) []seccomp.NameWithConditions {
	var all []seccomp.NameWithConditions
	for _, v := range values {
		all = append(all, only(name, bits(argument, seccomp.Equal, uint64(v)))...)
	}
	return all
}

// only allows a system call if all of the conditions hold.
func only(name string, conditions ...seccomp.Condition) []seccomp.NameWithConditions {
	return []seccomp.NameWithConditions{{Name: name, Conditions: conditions}}
}

func bits(argument uint32, is seccomp.Operation, value uint64) seccomp.Condition {
	return seccomp.Condition{Argument: argument, Operation: is, Value: value}
}
