//go:build linux && amd64

package kvm

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io/fs"
	"runtime"
	"testing"
	"unsafe"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// codeGPA is where real-mode test guests start.
const codeGPA = 0x1000

// openKVM opens the device, or skips the test where there is none to open.
func openKVM(t *testing.T) *System {
	t.Helper()
	s, err := Open(DevicePath)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) {
		t.Skip(err)
	}
	must(t, err)
	t.Cleanup(func() { must(t, s.Close()) })
	return s
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// must1 returns v, or ends the test.
func must1[T any](v T, err error) func(*testing.T) T {
	return func(t *testing.T) T {
		t.Helper()
		must(t, err)
		return v
	}
}

// machine is a VM with interrupt controllers, one vCPU and some RAM from
// address 0 on.
type machine struct {
	sys  *System
	vm   *VM
	vcpu *VCPU
	ram  []byte
}

const ramSize = 64 << 10

// newMachine makes a machine with interrupt controllers and a timer, whose vCPU
// is in real mode at codeGPA, where code is.
func newMachine(t *testing.T, code []byte) *machine {
	t.Helper()
	return makeMachine(t, code, true)
}

// newBareMachine makes a machine without interrupt controllers: HLT is an exit.
func newBareMachine(t *testing.T, code []byte) *machine {
	t.Helper()
	return makeMachine(t, code, false)
}

func makeMachine(t *testing.T, code []byte, chips bool) *machine {
	t.Helper()
	runtime.LockOSThread()
	t.Cleanup(runtime.UnlockOSThread)
	m := &machine{sys: openKVM(t)}
	m.vm = must1(m.sys.CreateVM())(t)
	t.Cleanup(func() { must(t, m.vm.Close()) })
	must(t, m.vm.SetIdentityMapAddr(0xfffbc000))
	must(t, m.vm.SetTSSAddr(0xfffbd000))
	if chips {
		must(t, m.vm.CreateIRQChip())
		must(t, m.vm.CreatePIT2(PITSpeakerDummy))
	}
	m.ram = must1(unix.Mmap(-1, 0, ramSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS))(t)
	t.Cleanup(func() { must(t, unix.Munmap(m.ram)) })
	must(t, m.vm.SetUserMemoryRegion(0, MemLogDirtyPages, 0, ramSize, uintptr(unsafe.Pointer(&m.ram[0]))))
	m.vcpu = must1(m.vm.CreateVCPU(0))(t)
	t.Cleanup(func() { must(t, m.vcpu.Close()) })
	copy(m.ram[codeGPA:], code)
	s := must1(m.vcpu.Sregs())(t)
	for _, seg := range []*Segment{&s.CS, &s.DS, &s.ES, &s.SS} {
		seg.Base, seg.Selector = 0, 0
	}
	must(t, m.vcpu.SetSregs(s))
	must(t, m.vcpu.SetRegs(Regs{RIP: codeGPA, RFLAGS: 2, RSP: 0x8000}))
	return m
}

// run runs until an exit that is not an interrupted Run, and checks its reason.
func (m *machine) run(t *testing.T, want ExitReason) Exit {
	t.Helper()
	for {
		e, err := m.vcpu.Run()
		must(t, err)
		switch e.Reason {
		case want:
			return e
		case ExitIntr:
		default:
			t.Fatalf("exit %v (%+v), want %v", e.Reason, e.InternalError(), want)
		}
	}
}

// expectOut runs until the guest writes a byte to a port.
func (m *machine) expectOut(t *testing.T, port uint16, want ...byte) {
	t.Helper()
	io := must1(m.run(t, ExitIO).IO())(t)
	if !io.Out || io.Port != port || !bytes.Equal(io.Data, want) {
		t.Fatalf("port access %+v, want %#x to port %#x", io, want, port)
	}
}

// setVector points a real-mode interrupt vector at an address below 64 KiB.
func (m *machine) setVector(vector byte, addr uint16) {
	binary.LittleEndian.PutUint32(m.ram[4*int(vector):], uint32(addr))
}

// run1 makes one Run, of whatever outcome.
func (m *machine) run1(t *testing.T) Exit {
	t.Helper()
	return must1(m.vcpu.Run())(t)
}

// ramPointer returns the address in this process of guest memory at gpa.
func ramPointer(m *machine, gpa int) unsafe.Pointer { return unsafe.Pointer(&m.ram[gpa]) }
