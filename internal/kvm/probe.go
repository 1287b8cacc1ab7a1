//go:build linux && amd64

package kvm

import (
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The probe's guest memory: one region from guest physical address 0 on.
const (
	probeGDT     = 0x1000 // null, code, data
	probeIDT     = 0x2000
	probeCode    = 0x3000
	probeHandler = 0x3100
	probeStack   = 0x5000 // grows down
	probeMemory  = 0x6000

	probePort = 0xe9
	// probeDone is what the breakpoint's handler reports.
	probeDone = 0xbd
	// probeGuard bounds the probe, which takes microseconds when all is well.
	probeGuard = 5 * time.Second
)

// ErrProbe is a probe whose guest did something that no KVM is known to do.
var ErrProbe = errors.New("the probe's guest did not behave as expected")

// Interpreted reports whether this KVM interprets the guest's kernel-mode code
// instruction by instruction, as KVM does under PVM, in place of running it on
// the processor. On such a KVM kernel-mode code is a thousand times slower and
// many instructions end the guest with an InternalError, so no stock kernel
// boots.
//
// KVM does not say so in any capability, so this asks a scratch machine: it
// executes int3 in 32-bit protected mode at CPL 0. A processor calls the
// breakpoint's handler. KVM's emulator, which interprets, delivers software
// interrupts in real mode only, and gives up on it.
func Interpreted(s *System) (interpreted bool, err error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	vm, err := s.CreateVM()
	if err != nil {
		return false, err
	}
	defer func() { err = errors.Join(err, vm.Close()) }()
	mem, err := unix.Mmap(-1, 0, probeMemory, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return false, &Error{Op: "probe: mmap", Err: err}
	}
	// Only after the vCPU is closed: deferred calls run last to first.
	defer func() { err = errors.Join(err, unix.Munmap(mem)) }()
	fillProbe(mem)
	v, err := newProbe(vm, mem)
	if err != nil {
		return false, err
	}
	defer func() { err = errors.Join(err, v.Close()) }()
	return runProbe(v, probeGuard)
}

// fillProbe writes the guest: two instructions, a handler, and the tables that
// lead from one to the other.
func fillProbe(mem []byte) {
	le := binary.LittleEndian
	// Flat 4 GiB segments (Intel SDM, volume 3, 3.4.5).
	le.PutUint64(mem[probeGDT+8:], 0x00cf9b000000ffff)
	le.PutUint64(mem[probeGDT+16:], 0x00cf93000000ffff)
	// 32-bit interrupt gate, present, DPL 0, selector 8 (volume 3, 6.11).
	const vector = 3
	le.PutUint64(mem[probeIDT+8*vector:], 0x00008e0000080000|probeHandler)
	copy(mem[probeCode:], []byte{0xcc, 0xf4})                                // int3; hlt
	copy(mem[probeHandler:], []byte{0xb0, probeDone, 0xe6, probePort, 0xf4}) // mov al, probeDone; out probePort, al; hlt
}

// newProbe returns a vCPU at probeCode in flat 32-bit protected mode without
// paging.
func newProbe(vm *VM, mem []byte) (_ *VCPU, err error) {
	// Outside the memory, as Intel processors need them (see SetTSSAddr).
	if err := errors.Join(vm.SetIdentityMapAddr(0xfffbc000), vm.SetTSSAddr(0xfffbd000)); err != nil {
		return nil, err
	}
	host := uintptr(unsafe.Pointer(unsafe.SliceData(mem)))
	if err := vm.SetUserMemoryRegion(0, 0, 0, uint64(len(mem)), host); err != nil {
		return nil, err
	}
	v, err := vm.CreateVCPU(0)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, v.Close())
		}
	}()
	s, err := v.Sregs()
	if err != nil {
		return nil, err
	}
	code := Segment{Limit: 0xffffffff, Selector: 8, Typ: 0xb, Present: 1, DB: 1, S: 1, G: 1}
	data := code
	data.Selector, data.Typ = 16, 3
	s.CS, s.DS, s.ES, s.FS, s.GS, s.SS = code, data, data, data, data, data
	s.GDT = Descriptor{Base: probeGDT, Limit: 3*8 - 1}
	s.IDT = Descriptor{Base: probeIDT, Limit: 4*8 - 1}
	s.CR0 |= 1 // PE
	regs := Regs{RIP: probeCode, RSP: probeStack, RFLAGS: 2}
	return v, errors.Join(v.SetSregs(s), v.SetRegs(regs))
}

// runProbe runs the guest to its first exit that tells something.
func runProbe(v *VCPU, limit time.Duration) (interpreted bool, err error) {
	tid := unix.Gettid()
	expired := make(chan struct{})
	guard := time.AfterFunc(limit, func() {
		close(expired)
		_ = v.Kick(tid) // an error means that the probe has ended meanwhile
	})
	defer guard.Stop()
	for {
		e, err := v.Run()
		if err != nil {
			return false, err
		}
		switch e.Reason {
		case ExitInternalError:
			if ie := e.InternalError(); ie.Suberror != InternalEmulation {
				return false, fmt.Errorf("%w: %v, suberror %d", ErrProbe, e.Reason, ie.Suberror)
			}
			return true, nil
		case ExitIO:
			io, err := e.IO()
			if err != nil {
				return false, err
			}
			if !io.Out || io.Port != probePort || io.Data[0] != probeDone {
				return false, fmt.Errorf("%w: access to port %#x", ErrProbe, io.Port)
			}
			return false, nil
		case ExitIntr:
			select {
			case <-expired:
				return false, fmt.Errorf("%w: nothing within %v", ErrProbe, limit)
			default: // a signal of the runtime's
			}
		default:
			return false, fmt.Errorf("%w: %v", ErrProbe, e.Reason)
		}
	}
}
