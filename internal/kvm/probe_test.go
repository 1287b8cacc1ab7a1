//go:build linux && amd64

package kvm

import (
	"errors"
	"os"
	"regexp"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestInterpreted compares the probe with the kernel module that is known to
// interpret, where one can see which modules are loaded.
func TestInterpreted(t *testing.T) {
	s := openKVM(t)
	got := must1(Interpreted(s))(t)
	for range 20 {
		if again := must1(Interpreted(s))(t); again != got {
			t.Fatalf("the probe says %v, then %v", got, again)
		}
	}
	t.Log("interpreted:", got)
	if _, err := os.Stat("/sys/module/kvm_pvm"); err == nil && !got {
		t.Error("kvm_pvm is loaded, and the probe says that this KVM does not interpret")
	} else if !errors.Is(err, os.ErrNotExist) {
		must(t, err)
	}
	cpu := must1(os.ReadFile("/proc/cpuinfo"))(t)
	if regexp.MustCompile(`(?m)^flags\s*:.*\b(vmx|svm)\b`).Match(cpu) && got {
		t.Error("the processor virtualises, and the probe says that this KVM interprets")
	}
}

// newProbeMachine returns the probe's vCPU, about to execute code in place of
// the probe's own.
func newProbeMachine(t *testing.T, code ...byte) *VCPU {
	t.Helper()
	runtime.LockOSThread()
	t.Cleanup(runtime.UnlockOSThread)
	vm := must1(openKVM(t).CreateVM())(t)
	t.Cleanup(func() { must(t, vm.Close()) })
	mem := must1(unix.Mmap(-1, 0, probeMemory, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS))(t)
	t.Cleanup(func() { must(t, unix.Munmap(mem)) })
	fillProbe(mem)
	copy(mem[probeCode:], code)
	v := must1(newProbe(vm, mem))(t)
	t.Cleanup(func() { must(t, v.Close()) })
	return v
}

// TestProbeOfAProcessor is the answer of a KVM that runs the breakpoint: the
// guest jumps to the handler itself.
func TestProbeOfAProcessor(t *testing.T) {
	v := newProbeMachine(t, 0xe9, 0xfb, 0, 0, 0) // jmp probeHandler
	if got := must1(runProbe(v, probeGuard))(t); got {
		t.Error("a handler that ran counts as interpreted")
	}
}

func TestProbeGoneWrong(t *testing.T) {
	for name, code := range map[string][]byte{
		"halts":       {0xf4},
		"other port":  {0xe6, 0xe1},
		"other value": {0xb0, 0x00, 0xe6, probePort},
		"reads port":  {0xe4, probePort},
	} {
		v := newProbeMachine(t, code...)
		if got, err := runProbe(v, probeGuard); got || !errors.Is(err, ErrProbe) {
			t.Errorf("%s: %v, %v", name, got, err)
		}
	}
}

// TestProbeNeverHangs lets the guard end a guest that does nothing.
func TestProbeNeverHangs(t *testing.T) {
	v := newProbeMachine(t, 0xeb, 0xfe)
	if _, err := runProbe(v, time.Millisecond); !errors.Is(err, ErrProbe) {
		t.Errorf("a guest that spins: %v", err)
	}
}

// TestUnemulatableInstruction has the bytes of the instruction that KVM gives
// up on, where there is such an instruction.
func TestUnemulatableInstruction(t *testing.T) {
	v := newProbeMachine(t)
	for {
		e := must1(v.Run())(t)
		switch e.Reason {
		case ExitIntr:
			continue
		case ExitIO:
			if must1(e.IO())(t).Port == probePort {
				return // a processor ran it; nothing is interpreted here
			}
			t.Fatalf("exit %v", e.Reason)
		case ExitInternalError:
			ie := e.InternalError()
			if ie.Suberror != InternalEmulation || len(ie.Insn) == 0 || ie.Insn[0] != 0xcc {
				t.Errorf("%+v, want the bytes of int3", ie)
			}
			if r := must1(v.Regs())(t); r.RIP != probeCode {
				t.Errorf("RIP is %#x, want that of the instruction", r.RIP)
			}
			return
		default:
			t.Fatalf("exit %v", e.Reason)
		}
	}
}
