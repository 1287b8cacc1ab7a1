package testvm

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"github.com/cryovisor/cryovisor/internal/kvm"
	"golang.org/x/sys/unix"
)

// ports is what a guest talks to.
type ports interface {
	In(port uint16, data []byte)
	Out(port uint16, data []byte)
}

// machine is the least VMM that runs a test guest: memory, vCPUs, KVM's
// interrupt controllers and one set of ports. The tests of this package use it
// so that the guests are proved without the project's VMM.
type machine struct {
	vm     *kvm.VM
	vcpus  []*kvm.VCPU
	ram    []byte // base + GPA; the hole is unused
	memory uint64
	dev    ports

	stop atomic.Bool
	wg   sync.WaitGroup
	tids []atomic.Int64
	ends []chan error
}

// exitError is an exit that ended a vCPU.
type exitError struct {
	Reason   kvm.ExitReason
	Internal kvm.InternalError
	RIP      uint64
}

func (e *exitError) Error() string {
	return fmt.Sprintf("%v at RIP %#x, %+v", e.Reason, e.RIP, e.Internal)
}

func openKVM(t testing.TB) *kvm.System {
	t.Helper()
	s, err := kvm.Open(kvm.DevicePath)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) {
		t.Skip(err)
	}
	must(t, err)
	t.Cleanup(func() { must(t, s.Close()) })
	return s
}

func newMachine(t testing.TB, memory uint64, im Image, dev ports) *machine {
	t.Helper()
	sys := openKVM(t)
	vm, err := sys.CreateVM()
	must(t, err)
	m := &machine{vm: vm, memory: memory, dev: dev}
	t.Cleanup(func() { must(t, vm.Close()) })
	must(t, vm.SetIdentityMapAddr(0xfffbc000))
	must(t, vm.SetTSSAddr(0xfffbd000))
	must(t, vm.CreateIRQChip())
	must(t, vm.CreatePIT2(kvm.PITSpeakerDummy))
	m.mapRAM(t)
	for _, s := range im.Load {
		copy(m.ram[s.GPA:], s.Data)
	}
	leaves, err := sys.SupportedCPUID()
	must(t, err)
	deadline, err := sys.CheckExtension(kvm.CapTSCDeadlineTimer)
	must(t, err)
	m.tids = make([]atomic.Int64, len(im.VCPUs))
	for id, cpu := range im.VCPUs {
		m.addVCPU(t, id, cpu, cpuidOf(leaves, id, deadline != 0))
	}
	return m
}

func (m *machine) mapRAM(t testing.TB) {
	t.Helper()
	end := endOfRAM(m.memory)
	ram, err := unix.Mmap(-1, 0, int(end), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	must(t, err)
	t.Cleanup(func() { must(t, unix.Munmap(ram)) })
	m.ram = ram
	must(t, m.vm.SetUserMemoryRegion(0, 0, 0, min(end, holeStart), uintptr(unsafe.Pointer(&ram[0]))))
	if end > holeEnd {
		must(t, m.vm.SetUserMemoryRegion(1, 0, holeEnd, end-holeEnd, uintptr(unsafe.Pointer(&ram[holeEnd]))))
	}
}

func (m *machine) addVCPU(t testing.TB, id int, cpu CPU, leaves []kvm.CPUIDEntry) {
	t.Helper()
	v, err := m.vm.CreateVCPU(id)
	must(t, err)
	t.Cleanup(func() { must(t, v.Close()) })
	m.vcpus = append(m.vcpus, v)
	m.ends = append(m.ends, make(chan error, 1))
	must(t, v.SetCPUID2(leaves))
	must(t, v.SetMPState(kvm.MPRunnable))
	must(t, v.SetSregs(kvmSregs(cpu.Sregs)))
	must(t, v.SetRegs(kvm.Regs(cpu.Regs)))
	if cpu.XCR0 != 0 {
		x := kvm.XCRS{NrXRCS: 1}
		x.Registers[0].Value = cpu.XCR0
		must(t, v.SetXCRS(x))
	}
}

// cpuidOf makes the leaves of one vCPU: its APIC id, and the TSC deadline timer,
// which KVM leaves out of what it says it supports.
func cpuidOf(leaves []kvm.CPUIDEntry, id int, deadline bool) []kvm.CPUIDEntry {
	leaves = slices.Clone(leaves)
	for i := range leaves {
		switch l := &leaves[i]; l.Function {
		case 1:
			l.Ebx = l.Ebx&0x00ffffff | uint32(id)<<24
			if deadline {
				l.Ecx |= 1 << 24
			}
		case 0xb, 0x1f:
			l.Edx = uint32(id)
		}
	}
	return leaves
}

func kvmSregs(s Sregs) kvm.Sregs {
	seg := func(r SegmentReg) kvm.Segment {
		return kvm.Segment{
			Base: r.Base, Limit: r.Limit, Selector: r.Selector, Typ: r.Type, Present: r.Present,
			DPL: r.DPL, DB: r.DB, S: r.S, L: r.L, G: r.G, AVL: r.AVL, Unusable: r.Unusable,
		}
	}
	return kvm.Sregs{
		CS: seg(s.CS), DS: seg(s.DS), ES: seg(s.ES), FS: seg(s.FS), GS: seg(s.GS), SS: seg(s.SS),
		TR: seg(s.TR), LDT: seg(s.LDT),
		GDT: kvm.Descriptor{Base: s.GDT.Base, Limit: s.GDT.Limit},
		IDT: kvm.Descriptor{Base: s.IDT.Base, Limit: s.IDT.Limit},
		CR0: s.CR0, CR2: s.CR2, CR3: s.CR3, CR4: s.CR4, CR8: s.CR8, EFER: s.EFER,
		ApicBase: s.APICBase, InterruptBitmap: s.InterruptBitmap,
	}
}

// start runs all vCPUs until halt.
func (m *machine) start(t testing.TB) {
	m.stop.Store(false)
	for id := range m.vcpus {
		select {
		case <-m.ends[id]: // of an earlier run
		default:
		}
		m.wg.Go(func() { m.ends[id] <- m.run(id) })
	}
	t.Cleanup(m.halt)
}

// halt gets all vCPUs out of the guest.
func (m *machine) halt() {
	m.stop.Store(true)
	done := make(chan struct{})
	go func() { m.wg.Wait(); close(done) }()
	for {
		for id, v := range m.vcpus {
			if tid := m.tids[id].Load(); tid != 0 {
				_ = v.Kick(int(tid))
			}
		}
		select {
		case <-done:
			return
		case <-time.After(10 * time.Millisecond):
		}
	}
}

func (m *machine) run(id int) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	m.tids[id].Store(int64(unix.Gettid()))
	defer m.tids[id].Store(0)
	v := m.vcpus[id]
	for !m.stop.Load() {
		e, err := v.Run()
		if err != nil {
			return err
		}
		switch e.Reason {
		case kvm.ExitIntr:
			v.SetImmediateExit(false)
		case kvm.ExitIO:
			if err := m.io(e); err != nil {
				return err
			}
		default:
			r, _ := v.Regs()
			return &exitError{Reason: e.Reason, Internal: e.InternalError(), RIP: r.RIP}
		}
	}
	return m.settle(v)
}

// settle gives the result of the last port read to the guest's registers.
func (m *machine) settle(v *kvm.VCPU) error {
	v.SetImmediateExit(true)
	defer v.SetImmediateExit(false)
	_, err := v.Run()
	return err
}

func (m *machine) io(e kvm.Exit) error {
	io, err := e.IO()
	if err != nil {
		return err
	}
	for d := io.Data; len(d) > 0; d = d[io.Size:] {
		if io.Out {
			m.dev.Out(io.Port, d[:io.Size])
		} else {
			m.dev.In(io.Port, d[:io.Size])
		}
	}
	return nil
}

// wait waits for the end of a vCPU.
func (m *machine) wait(ctx context.Context, id int) error {
	select {
	case err := <-m.ends[id]:
		return err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
