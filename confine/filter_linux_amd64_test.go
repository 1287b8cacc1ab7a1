package confine

import (
	"encoding/binary"
	"testing"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// judge is the filter of process 42, executed.
func judge(t *testing.T, r Rules) func(architecture, nr uint32, args ...uint64) uint32 {
	t.Helper()
	raw, err := filter(r, 42)
	if err != nil {
		t.Fatal(err)
	}
	program, whole := bpf.Disassemble(raw)
	if !whole {
		t.Fatal("a program that can't be read")
	}
	vm, err := bpf.NewVM(program)
	if err != nil {
		t.Fatal(err)
	}
	return func(architecture, nr uint32, args ...uint64) uint32 {
		// struct seccomp_data. The interpreter reads words as those of a packet, with the first byte as the highest; the kernel as
		// the host has them, so the low half of an argument comes first.
		data := make([]byte, 64)
		binary.BigEndian.PutUint32(data, nr)
		binary.BigEndian.PutUint32(data[4:], architecture)
		for i, a := range args {
			binary.BigEndian.PutUint32(data[16+8*i:], uint32(a))
			binary.BigEndian.PutUint32(data[20+8*i:], uint32(a>>32))
		}
		verdict, err := vm.Run(data)
		if err != nil {
			t.Fatal(err)
		}
		return uint32(verdict)
	}
}

// TestFilter asks for every system call, with arguments that no condition allows: what the tables say, and nothing else.
func TestFilter(t *testing.T) {
	want := map[uint32]uint32{unix.SYS_CLONE3: enosys}
	for _, group := range freeCalls {
		for _, nr := range group {
			want[nr] = allow
		}
	}
	for _, nr := range fatalCalls {
		want[nr] = kill
	}
	ask := judge(t, Rules{})
	none := ^uint64(0)
	for nr := range uint32(1 << 12) {
		expect, ok := want[nr]
		if !ok {
			expect = eperm
		}
		if got := ask(unix.AUDIT_ARCH_X86_64, nr, none, none, none, none, none, none); got != expect {
			t.Errorf("%d: %#x, want %#x", nr, got, expect)
		}
		if got := ask(unix.AUDIT_ARCH_I386, nr); got != eperm {
			t.Errorf("%d for 32 bits: %#x", nr, got)
		}
		if got := ask(unix.AUDIT_ARCH_X86_64, 1<<30|nr); got != enosys {
			t.Errorf("%d for x32: %#x", nr, got)
		}
	}
}

// TestConditions asks for what depends on arguments.
func TestConditions(t *testing.T) {
	const threads = unix.CLONE_VM | unix.CLONE_FS | unix.CLONE_FILES | unix.CLONE_SIGHAND | unix.CLONE_SYSVSEM | unix.CLONE_THREAD // Go's
	closed, network := judge(t, Rules{}), judge(t, Rules{Network: true})
	type call struct {
		nr   uint32
		args []uint64
	}
	for _, c := range []struct {
		call
		want, wantNetwork uint32
	}{
		{call{unix.SYS_CLONE, []uint64{threads}}, allow, allow},
		{call{unix.SYS_CLONE, []uint64{uint64(unix.SIGCHLD)}}, eperm, eperm},
		{call{unix.SYS_CLONE, []uint64{unix.CLONE_VM | unix.CLONE_VFORK | uint64(unix.SIGCHLD)}}, eperm, eperm},
		{call{unix.SYS_CLONE, []uint64{threads | unix.CLONE_NEWNS}}, eperm, eperm},
		{call{unix.SYS_CLONE, []uint64{threads << 32}}, eperm, eperm},
		{call{unix.SYS_MMAP, []uint64{0, 4096, unix.PROT_READ | unix.PROT_WRITE}}, allow, allow},
		{call{unix.SYS_MMAP, []uint64{0, 4096, unix.PROT_EXEC}}, eperm, eperm},
		{call{unix.SYS_MPROTECT, []uint64{0, 4096, unix.PROT_NONE}}, allow, allow},
		{call{unix.SYS_MPROTECT, []uint64{0, 4096, unix.PROT_READ | unix.PROT_EXEC}}, eperm, eperm},
		{call{unix.SYS_SOCKET, []uint64{unix.AF_UNIX}}, allow, allow},
		{call{unix.SYS_SOCKET, []uint64{unix.AF_INET}}, eperm, allow},
		{call{unix.SYS_SOCKET, []uint64{unix.AF_INET6}}, eperm, allow},
		{call{unix.SYS_SOCKET, []uint64{unix.AF_NETLINK}}, eperm, eperm},
		{call{unix.SYS_SOCKETPAIR, []uint64{unix.AF_UNIX}}, allow, allow},
		{call{unix.SYS_KILL, []uint64{42}}, allow, allow},
		{call{unix.SYS_KILL, []uint64{43}}, eperm, eperm},
		{call{unix.SYS_TGKILL, []uint64{42, 7}}, allow, allow},
		{call{unix.SYS_TGKILL, []uint64{1, 1}}, eperm, eperm},
		{call{unix.SYS_PRLIMIT64, []uint64{0, 1, 0, 5}}, allow, allow},
		{call{unix.SYS_PRLIMIT64, []uint64{0, 1, 5, 0}}, eperm, eperm},
		{call{unix.SYS_PRLIMIT64, []uint64{1, 1, 0, 5}}, eperm, eperm},
		{call{unix.SYS_PRCTL, []uint64{unix.PR_SET_VMA}}, allow, allow},
		{call{unix.SYS_PRCTL, []uint64{unix.PR_SET_SECCOMP}}, eperm, eperm},
		{call{unix.SYS_IOCTL, []uint64{3, unix.TIOCSTI}}, eperm, eperm},
		{call{unix.SYS_IOCTL, []uint64{3, unix.TCGETS | 1<<32}}, eperm, eperm},
		{call{unix.SYS_IOCTL, []uint64{3, 0xae01 | 0xff<<16}}, eperm, eperm},
	} {
		for i, ask := range []func(uint32, uint32, ...uint64) uint32{closed, network} {
			if got, want := ask(unix.AUDIT_ARCH_X86_64, c.nr, c.args...), []uint32{c.want, c.wantNetwork}[i]; got != want {
				t.Errorf("%d %#x, network %v: %#x, want %#x", c.nr, c.args, i == 1, got, want)
			}
		}
	}
	for _, request := range requests() {
		if got := closed(unix.AUDIT_ARCH_X86_64, unix.SYS_IOCTL, 3, uint64(request)); got != allow {
			t.Errorf("request %#x: %#x", request, got)
		}
	}
}
