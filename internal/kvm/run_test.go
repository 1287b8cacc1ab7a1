//go:build linux && amd64

package kvm

import (
	"bytes"
	"errors"
	"io/fs"
	"runtime"
	"slices"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"
)

// spin reports over port 0xe1 and then does nothing for ever.
var spin = []byte{
	0xe6, 0xe1, // out 0xe1, al
	0xeb, 0xfe, // jmp .
}

func TestPortAndMemoryAccess(t *testing.T) {
	m := newMachine(t, []byte{
		0xe4, 0xe1, // in al, 0xe1
		0xe6, 0xe2, // out 0xe2, al
		0xb8, 0x00, 0xf0, // mov ax, 0xf000
		0x8e, 0xd8, // mov ds, ax
		0xa1, 0x10, 0x00, // mov ax, [0x10]
		0xa3, 0x20, 0x00, // mov [0x20], ax
		0xeb, 0xfe,
	})
	io := must1(m.run(t, ExitIO).IO())(t)
	if io.Out || io.Port != 0xe1 || io.Size != 1 || io.Count != 1 || len(io.Data) != 1 {
		t.Fatalf("IN: %+v", io)
	}
	io.Data[0] = 0x5a
	m.expectOut(t, 0xe2, 0x5a)
	mm := must1(m.run(t, ExitMMIO).MMIO())(t)
	if mm.Write || mm.Addr != 0xf0010 || len(mm.Data) != 2 {
		t.Fatalf("load: %+v", mm)
	}
	copy(mm.Data, []byte{0x34, 0x12})
	mm = must1(m.run(t, ExitMMIO).MMIO())(t)
	if !mm.Write || mm.Addr != 0xf0020 || !bytes.Equal(mm.Data, []byte{0x34, 0x12}) {
		t.Fatalf("store: %+v", mm)
	}
}

// TestStringOutput has a repeated instruction, of which KVM may give several
// accesses in one exit.
func TestStringOutput(t *testing.T) {
	text := []byte("frozen at rest!!")
	m := newMachine(t, []byte{
		0xbe, 0x00, 0x20, // mov si, 0x2000
		0xb9, byte(len(text) / 2), 0x00, // mov cx, len/2
		0xba, 0xe2, 0x00, // mov dx, 0xe2
		0xf3, 0x6f, // rep outsw
		0xe6, 0xe1, // out 0xe1, al
	})
	copy(m.ram[0x2000:], text)
	var got []byte
	for len(got) < len(text) {
		io := must1(m.run(t, ExitIO).IO())(t)
		if !io.Out || io.Port != 0xe2 || io.Size != 2 || len(io.Data) != 2*io.Count {
			t.Fatalf("OUTSW: %+v", io)
		}
		got = append(got, io.Data...)
	}
	if !bytes.Equal(got, text) {
		t.Errorf("got %q, want %q", got, text)
	}
	m.expectOut(t, 0xe1, 0)
}

func TestHalt(t *testing.T) {
	m := newBareMachine(t, []byte{0xf4})
	m.run(t, ExitHLT)
	if r := must1(m.vcpu.Regs())(t); r.RIP != codeGPA+1 {
		t.Errorf("RIP is %#x after HLT", r.RIP)
	}
}

// TestTripleFault takes an exception in protected mode without an interrupt
// descriptor table.
func TestTripleFault(t *testing.T) {
	m := newBareMachine(t, []byte{0x0f, 0x0b}) // ud2
	s := must1(m.vcpu.Sregs())(t)
	s.CR0 |= 1
	s.CS = Segment{Limit: 0xffffffff, Selector: 8, Typ: 0xb, Present: 1, DB: 1, S: 1, G: 1}
	s.SS = Segment{Limit: 0xffffffff, Selector: 16, Typ: 3, Present: 1, DB: 1, S: 1, G: 1}
	s.DS, s.ES, s.FS, s.GS = s.SS, s.SS, s.SS, s.SS
	s.IDT = Descriptor{}
	must(t, m.vcpu.SetSregs(s))
	m.run(t, ExitShutdown)
}

func TestKickEndsASpinningGuest(t *testing.T) {
	m := newMachine(t, spin)
	m.expectOut(t, 0xe1, 0)
	tid := unix.Gettid()
	for round := range 200 {
		var kicked atomic.Bool
		ready, done := make(chan struct{}), make(chan error)
		go func() {
			<-ready
			// Sometimes before KVM_RUN, sometimes in it: neither may be lost.
			for range round * 100 {
				kicked.Load()
			}
			kicked.Store(true)
			done <- m.vcpu.Kick(tid)
		}()
		close(ready)
		for {
			e := must1(m.vcpu.Run())(t)
			if e.Reason != ExitIntr {
				t.Fatalf("round %d: exit %v", round, e.Reason)
			}
			if kicked.Load() {
				break
			}
		}
		must(t, <-done)
		m.vcpu.SetImmediateExit(false)
	}
}

// TestKickBeforeRun has the signal come and go before KVM_RUN.
func TestKickBeforeRun(t *testing.T) {
	m := newMachine(t, spin)
	must(t, m.vcpu.Kick(unix.Gettid()))
	if e := m.run1(t); e.Reason != ExitIntr {
		t.Fatalf("exit %v: the kick was lost", e.Reason)
	}
	m.vcpu.SetImmediateExit(false)
	m.expectOut(t, 0xe1, 0)
}

// TestKickDuringRun kicks only after the guest has been seen to run: its loop
// writes to memory.
func TestKickDuringRun(t *testing.T) {
	m := newMachine(t, []byte{
		0xff, 0x06, 0x00, 0x20, // inc word [0x2000]
		0xeb, 0xfa, // jmp back
	})
	tid := unix.Gettid()
	counter := (*atomic.Uint32)(ramPointer(m, 0x2000))
	kicked := make(chan error)
	var stop atomic.Bool
	go func() {
		for counter.Load() == 0 {
			runtime.Gosched()
		}
		stop.Store(true)
		kicked <- m.vcpu.Kick(tid)
	}()
	for !stop.Load() {
		m.run1(t)
	}
	must(t, <-kicked)
}

func TestImmediateExitEntersNoGuest(t *testing.T) {
	m := newMachine(t, spin)
	m.vcpu.SetImmediateExit(true)
	for range 3 {
		if e := must1(m.vcpu.Run())(t); e.Reason != ExitIntr {
			t.Fatalf("exit %v with immediate_exit set", e.Reason)
		}
	}
	if r := must1(m.vcpu.Regs())(t); r.RIP != codeGPA {
		t.Fatalf("the guest ran to %#x", r.RIP)
	}
	m.vcpu.SetImmediateExit(false)
	m.expectOut(t, 0xe1, 0)
}

// TestImmediateExitCompletesIO is what a pause relies on: the value that a
// device gave reaches the registers although the guest does not run on.
func TestImmediateExitCompletesIO(t *testing.T) {
	m := newMachine(t, []byte{
		0xe4, 0xe1, // in al, 0xe1
		0xeb, 0xfe,
	})
	io := must1(m.run(t, ExitIO).IO())(t)
	io.Data[0] = 0xa5
	m.vcpu.SetImmediateExit(true)
	if e := must1(m.vcpu.Run())(t); e.Reason != ExitIntr {
		t.Fatalf("exit %v", e.Reason)
	}
	if r := must1(m.vcpu.Regs())(t); r.RAX&0xff != 0xa5 || r.RIP != codeGPA+2 {
		t.Errorf("AL is %#x at %#x: the port was not read", r.RAX&0xff, r.RIP)
	}
}

func TestOpenErrors(t *testing.T) {
	_, err := Open("/nonexistent/kvm")
	var ke *Error
	if !errors.As(err, &ke) || !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no device: %v", err)
	}
	// A file that is no KVM device answers no request.
	_, err = Open("/dev/null")
	if !errors.As(err, &ke) || !errors.Is(err, unix.ENOTTY) {
		t.Errorf("not KVM: %v", err)
	}
}

func TestRequire(t *testing.T) {
	s := openKVM(t)
	must(t, s.Require(CapUserMemory, CapImmediateExit))
	const nonsense = Cap(1 << 20)
	err := s.Require(CapUserMemory, nonsense)
	var ce *CapabilityError
	if !errors.As(err, &ce) || !slices.Equal(ce.Missing, []Cap{nonsense}) || !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("got %v", err)
	}
}
