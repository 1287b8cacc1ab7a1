package confine

import (
	"fmt"
	"slices"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"github.com/cryovisor/cryovisor/internal/kvm"
	"github.com/cryovisor/cryovisor/internal/pagemap"
	"github.com/cryovisor/cryovisor/internal/uffd"
)

// What a filter answers.
const (
	allow  = uint32(unix.SECCOMP_RET_ALLOW)
	kill   = uint32(unix.SECCOMP_RET_KILL_PROCESS)
	eperm  = uint32(unix.SECCOMP_RET_ERRNO) | uint32(unix.EPERM)
	enosys = uint32(unix.SECCOMP_RET_ERRNO) | uint32(unix.ENOSYS)
)

// x32Bit marks the calls of x32, which come with the architecture of the others (arch/x86/include/uapi/asm/unistd.h).
const x32Bit = 0x40000000

// newNamespaces are the flags of clone that make namespaces, and the one that hands the new thread to a tracer.
const newNamespaces = unix.CLONE_NEWCGROUP | unix.CLONE_NEWIPC | unix.CLONE_NEWNET | unix.CLONE_NEWNS | unix.CLONE_NEWPID |
	unix.CLONE_NEWUSER | unix.CLONE_NEWUTS | unix.CLONE_PTRACE

// requests are the ioctls that are allowed, whatever the descriptor is; the number of a request names the kind of device.
func requests() []uint32 {
	var all []uint32
	for _, r := range slices.Concat(kvm.Requests(), uffd.Requests(), pagemap.Requests()) {
		all = append(all, uint32(r))
	}
	return append(all,
		unix.TUNSETIFF, unix.TUNGETIFF, unix.TUNSETVNETHDRSZ, unix.TUNSETOFFLOAD, // taps
		unix.BLKSSZGET,                            // block devices
		unix.TCGETS, unix.TCSETS, unix.TIOCGWINSZ, // terminals, but not to type for the user (TIOCSTI, TIOCLINUX)
	)
}

// conditionalCalls are the system calls that are allowed with some arguments, in a process with a pid.
func conditionalCalls(r Rules, pid int) []conditional {
	families := []uint32{unix.AF_UNIX}
	if r.Network {
		families = append(families, unix.AF_INET, unix.AF_INET6)
	}
	self := uint32(pid)
	return []conditional{
		{unix.SYS_IOCTL, []check{oneOf(1, requests()...)}},                            // first, as KVM_RUN is what guests wait for
		{unix.SYS_CLONE, []check{has(0, unix.CLONE_THREAD), lacks(0, newNamespaces)}}, // no processes
		{unix.SYS_MMAP, []check{lacks(2, unix.PROT_EXEC)}},                            // no code
		{unix.SYS_MPROTECT, []check{lacks(2, unix.PROT_EXEC)}},
		{unix.SYS_SOCKET, []check{oneOf(0, families...)}},
		{unix.SYS_SOCKETPAIR, []check{oneOf(0, unix.AF_UNIX)}},
		{unix.SYS_KILL, []check{oneOf(0, self)}}, // no signals to others
		{unix.SYS_TGKILL, []check{oneOf(0, self)}},
		{unix.SYS_PRLIMIT64, []check{oneOf(0, 0, self), oneOf(2, 0)}},          // its own, to read
		{unix.SYS_PRCTL, []check{oneOf(0, unix.PR_SET_VMA, unix.PR_SET_NAME)}}, // names of mappings and threads
	}
}

// filter is the program for the process pid. It is a row of blocks, each for one system call, which end in an answer; none is so
// long that a jump over it does not fit.
func filter(r Rules, pid int) ([]bpf.RawInstruction, error) {
	program := []bpf.Instruction{
		load(offArch),
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.AUDIT_ARCH_X86_64, SkipTrue: 1},
		bpf.RetConstant{Val: eperm},
		load(offNumber),
		bpf.JumpIf{Cond: bpf.JumpLessThan, Val: x32Bit, SkipTrue: 1},
		bpf.RetConstant{Val: enosys},
	}
	for _, c := range conditionalCalls(r, pid) {
		block, err := c.block()
		if err != nil {
			return nil, err
		}
		program = append(program, block...)
	}
	for _, nr := range slices.Concat(freeCalls...) {
		program = append(program, answer(nr, allow)...)
	}
	// The arguments of clone3 lie in memory, where no filter sees them. glibc falls back to clone.
	program = append(program, answer(unix.SYS_CLONE3, enosys)...)
	for _, nr := range fatalCalls {
		program = append(program, answer(nr, kill)...)
	}
	return bpf.Assemble(append(program, bpf.RetConstant{Val: eperm}))
}

// Offsets in struct seccomp_data (include/uapi/linux/seccomp.h), on a host that stores the low half of an argument first.
const (
	offNumber = 0
	offArch   = 4
	offArgs   = 16
)

func load(offset int) bpf.Instruction { return bpf.LoadAbsolute{Off: uint32(offset), Size: 4} }

func low(arg int) bpf.Instruction  { return load(offArgs + 8*arg) }
func high(arg int) bpf.Instruction { return load(offArgs + 8*arg + 4) }

// answer is the block of a system call whose arguments do not matter.
func answer(nr, verdict uint32) []bpf.Instruction {
	return []bpf.Instruction{
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: nr, SkipTrue: 1},
		bpf.RetConstant{Val: verdict},
	}
}

// conditional is a system call that is allowed if all checks pass, and refused otherwise.
type conditional struct {
	nr     uint32
	checks []check
}

// check is instructions that answer with EPERM, or go on behind themselves.
type check []bpf.Instruction

func (c conditional) block() ([]bpf.Instruction, error) {
	body := slices.Concat(c.checks...)
	body = append(body, bpf.RetConstant{Val: allow})
	if len(body) > 0xff {
		return nil, fmt.Errorf("confine: the block of system call %d has %d instructions: a jump over it does not fit", c.nr, len(body))
	}
	return slices.Insert(body, 0, bpf.Instruction(bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: c.nr, SkipTrue: uint8(len(body))})), nil
}

// has passes if one of the bits is set in the low half of an argument.
func has(arg int, bits uint32) check {
	return check{low(arg), bpf.JumpIf{Cond: bpf.JumpBitsSet, Val: bits, SkipTrue: 1}, bpf.RetConstant{Val: eperm}}
}

// lacks passes if none of the bits is set in the low half of an argument.
func lacks(arg int, bits uint32) check {
	return check{low(arg), bpf.JumpIf{Cond: bpf.JumpBitsNotSet, Val: bits, SkipTrue: 1}, bpf.RetConstant{Val: eperm}}
}

// oneOf passes if an argument, all of it, is one of at most 250 values.
func oneOf(arg int, values ...uint32) check {
	c := check{high(arg), bpf.JumpIf{Cond: bpf.JumpEqual, Val: 0, SkipTrue: 1}, bpf.RetConstant{Val: eperm}, low(arg)}
	for i, v := range values {
		c = append(c, bpf.JumpIf{Cond: bpf.JumpEqual, Val: v, SkipTrue: uint8(len(values) - i)})
	}
	return append(c, bpf.RetConstant{Val: eperm})
}
