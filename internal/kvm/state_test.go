//go:build linux && amd64

package kvm

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"slices"
	"testing"

	gokvm "github.com/bobuhiro11/gokvm/kvm"
	"golang.org/x/sys/unix"
)

// roundTrip sets what change makes of the present state, and wants it back.
func roundTrip[T comparable](t *testing.T, get func() (T, error), set func(T) error, change func(*T)) {
	t.Helper()
	before := must1(get())(t)
	want := before
	change(&want)
	if want == before {
		t.Fatal("the test changes nothing")
	}
	must(t, set(want))
	if got := must1(get())(t); got != want {
		t.Errorf("set %+v, got %+v", want, got)
	}
}

func TestRegisters(t *testing.T) {
	v := newMachine(t, nil).vcpu
	random := rand.New(rand.NewPCG(1, 2))
	roundTrip(t, v.Regs, v.SetRegs, func(r *Regs) {
		for _, p := range []*uint64{
			&r.RAX, &r.RBX, &r.RCX, &r.RDX, &r.RSI, &r.RDI, &r.RSP, &r.RBP,
			&r.R8, &r.R9, &r.R10, &r.R11, &r.R12, &r.R13, &r.R14, &r.R15,
		} {
			*p = random.Uint64()
		}
		r.RIP, r.RFLAGS = 0x2345, 0x246
	})
	roundTrip(t, v.Sregs, v.SetSregs, func(s *Sregs) {
		s.CS.Base, s.CS.Selector = 0x10000, 0x1000
		s.GDT = Descriptor{Base: 0x4000, Limit: 0x17}
		s.CR2 = 0x1234000
	})
	roundTrip(t, v.DebugRegs, v.SetDebugRegs, func(d *DebugRegs) {
		d.DB = [4]uint64{1 << 12, 2 << 12, 3 << 12, 4 << 12}
	})
	roundTrip(t, v.VCPUEvents, v.SetVCPUEvents, func(e *VCPUEvents) { e.N.Masked = 1 })
	roundTrip(t, v.MPState, v.SetMPState, func(s *MPState) { *s = MPHalted })
	roundTrip(t, v.LAPIC, v.SetLAPIC, func(l *LAPICState) { l.Regs[0xd3] = 0x02 }) // LDR
}

func TestSregs2(t *testing.T) {
	m := newMachine(t, nil)
	if must1(m.vm.CheckExtension(CapSregs2))(t) == 0 {
		t.Skip(m.sys.Require(CapSregs2))
	}
	roundTrip(t, m.vcpu.Sregs2, m.vcpu.SetSregs2, func(s *Sregs2) { s.CS.Base = 0x20000 })
}

func TestXSave(t *testing.T) {
	m := newMachine(t, nil)
	v := m.vcpu
	area := must1(v.XSave())(t)
	if len(area) != m.vm.XSaveSize() {
		t.Fatalf("%d bytes, want %d", len(area), m.vm.XSaveSize())
	}
	// Intel SDM, volume 1, 13.4: XMM registers from byte 160 on, XSTATE_BV at 512.
	xmm := area[160 : 160+16*16]
	for i := range xmm {
		xmm[i] = byte(3*i + 1)
	}
	area[512] |= 1 << 1
	must(t, v.SetXSave(area))
	got := must1(v.XSave())(t)
	if !bytes.Equal(got[160:160+16*16], xmm) {
		t.Errorf("XMM registers are % x", got[160:160+16*16])
	}
	if err := v.SetXSave(area[:len(area)-1]); !errors.Is(err, ErrShortBuffer) {
		t.Errorf("a short area: %v", err)
	}
}

func TestXCRS(t *testing.T) {
	v := newMachine(t, nil).vcpu
	x := must1(v.XCRS())(t)
	if x.NrXRCS == 0 {
		t.Fatal("no extended control register")
	}
	must(t, v.SetXCRS(x))
	if got := must1(v.XCRS())(t); got != x {
		t.Errorf("set %+v, got %+v", x, got)
	}
	x.Registers[0].Value = 0 // x87 state can't be disabled
	var ke *Error
	if err := v.SetXCRS(x); !errors.As(err, &ke) || !errors.Is(err, unix.EINVAL) {
		t.Errorf("XCR0 without x87: %v", err)
	}
}

func TestTSC(t *testing.T) {
	m := newMachine(t, nil)
	must(t, m.sys.Require(CapGetTSCKHz))
	khz := must1(m.vcpu.TSCKHz())(t)
	if khz == 0 {
		t.Fatal("the time stamp counter stands still")
	}
	must(t, m.vcpu.SetTSCKHz(khz))
	if got := must1(m.vcpu.TSCKHz())(t); got != khz {
		t.Errorf("set %d kHz, got %d", khz, got)
	}
}

func TestKVMClockCtrlWithoutClock(t *testing.T) {
	if err := newMachine(t, nil).vcpu.KVMClockCtrl(); !errors.Is(err, unix.EINVAL) {
		t.Errorf("got %v, want EINVAL: the guest has no kvmclock", err)
	}
}

func TestNestedState(t *testing.T) {
	m := newMachine(t, nil)
	if err := m.vcpu.SetNestedState(make([]byte, nestedHdrSize-1)); !errors.Is(err, ErrShortBuffer) {
		t.Errorf("less than a header: %v", err)
	}
	long := make([]byte, nestedHdrSize)
	binary.LittleEndian.PutUint32(long[nestedSizeOffset:], nestedHdrSize+1)
	if err := m.vcpu.SetNestedState(long); !errors.Is(err, ErrShortBuffer) {
		t.Errorf("less than it says: %v", err)
	}
	if err := m.sys.Require(CapNestedState); errors.Is(err, errors.ErrUnsupported) {
		t.Skip(err)
	}
	state := must1(m.vcpu.NestedState())(t)
	must(t, m.vcpu.SetNestedState(state))
	if got := must1(m.vcpu.NestedState())(t); !bytes.Equal(got, state) {
		t.Errorf("set % x, got % x", state, got)
	}
}

// Registers of the Intel SDM, volume 4.
const (
	msrTSC         = 0x10
	msrSysenterEIP = 0x176
	msrNonsense    = 0xdeadbeef
)

func TestMSRs(t *testing.T) {
	m := newMachine(t, nil)
	v := m.vcpu
	must(t, v.SetCPUID2(must1(m.sys.SupportedCPUID())(t)))
	list := must1(m.sys.MSRIndexList())(t)
	if !slices.Contains(list, msrTSC) || slices.Contains(list, 0) {
		t.Fatalf("list of registers: %#x", list)
	}
	must(t, v.SetMSRs([]MSREntry{{Index: msrSysenterEIP, Data: 0x1234567}}))
	// More than one request takes.
	many := slices.Repeat([]uint32{msrTSC, msrSysenterEIP}, 150)
	got := must1(v.MSRs(many))(t)
	if len(got) != len(many) {
		t.Fatalf("%d of %d registers", len(got), len(many))
	}
	last := uint64(0)
	for i, e := range got {
		if e.Index != many[i] {
			t.Fatalf("number %d is %#x, want %#x", i, e.Index, many[i])
		}
		if e.Index == msrTSC && e.Data < last {
			t.Errorf("the time stamp counter went from %d to %d", last, e.Data)
		} else if e.Index == msrTSC {
			last = e.Data
		} else if e.Data != 0x1234567 {
			t.Errorf("number %d is %#x", i, e.Data)
		}
	}
}

func TestRefusedMSR(t *testing.T) {
	v := newMachine(t, nil).vcpu
	for _, position := range []int{0, 1, msrBatch - 1, msrBatch, 2*msrBatch + 7} {
		list := slices.Repeat([]uint32{msrSysenterEIP}, 3*msrBatch)
		list[position] = msrNonsense
		entries, err := v.MSRs(list)
		var me *MSRError
		if !errors.As(err, &me) || me.Index != msrNonsense || me.Position != position || len(entries) != position {
			t.Errorf("reading number %d: %d registers, %v", position, len(entries), err)
		}
		write := make([]MSREntry, len(list))
		for i, index := range list {
			write[i] = MSREntry{Index: index, Data: uint64(i + 1)}
		}
		err = v.SetMSRs(write)
		if !errors.As(err, &me) || me.Index != msrNonsense || me.Position != position {
			t.Errorf("writing number %d: %v", position, err)
		}
		if position > 0 {
			if e := must1(v.MSRs([]uint32{msrSysenterEIP}))(t)[0]; e.Data != uint64(position) {
				t.Errorf("writing number %d: the register holds %d", position, e.Data)
			}
		}
	}
}

func TestCPUID(t *testing.T) {
	m := newMachine(t, nil)
	leaves := must1(m.sys.SupportedCPUID())(t)
	if len(leaves) < 5 || slices.Contains(leaves, CPUIDEntry{}) {
		t.Fatalf("%d leaves, empty one: %v", len(leaves), slices.Contains(leaves, CPUIDEntry{}))
	}
	if got := must1(m.vcpu.CPUID2())(t); len(got) != 0 {
		t.Errorf("%d leaves before any was set", len(got))
	}
	must(t, m.vcpu.SetCPUID2(leaves))
	got := must1(m.vcpu.CPUID2())(t)
	// A KVM was seen not to give back the leaves of AMX, 0x1d and 0x1e, for whose state this process has not asked.
	names := func(l []CPUIDEntry) (n [][2]uint32) {
		for _, e := range l {
			if e.Function != 0x1d && e.Function != 0x1e {
				n = append(n, [2]uint32{e.Function, e.Index})
			}
		}
		return n
	}
	// KVM keeps some bits of the content up to date, so only names compare.
	if !slices.Equal(names(got), names(leaves)) {
		t.Errorf("set leaves %#x, got %#x", names(leaves), names(got))
	}
}

func TestEmptyLeavesAreDropped(t *testing.T) {
	l := newCPUIDList(5)
	first, zero, beyond := CPUIDEntry{Eax: 13}, CPUIDEntry{Function: 5}, CPUIDEntry{Function: 9}
	copy(l.entries(), []CPUIDEntry{first, {}, zero, {}, beyond})
	l[0] = 4 // as the kernel would count
	if got, want := l.leaves(), []CPUIDEntry{first, zero}; !slices.Equal(got, want) {
		t.Errorf("got %+v, want %+v", got, want)
	}
	if got := newCPUIDList(0).leaves(); got != nil {
		t.Errorf("an empty list has %+v", got)
	}
}

func TestTimerAndClock(t *testing.T) {
	vm := newMachine(t, nil).vm
	pit := must1(vm.PIT2())(t)
	pit.Channels[2].Count, pit.Channels[2].Mode = 0x1234, 3
	must(t, vm.SetPIT2(pit))
	if c := must1(vm.PIT2())(t).Channels[2]; c.Count != 0x1234 || c.Mode != 3 {
		t.Errorf("timer channel 2 is %+v", c)
	}
	const future = 1 << 50 // ns; only the clock that was set can be beyond it
	must(t, vm.SetClock(ClockData{Clock: future}))
	if c := must1(vm.Clock())(t); c.Clock < future || c.Clock > future+1<<40 {
		t.Errorf("set the clock to %d, got %d", uint64(future), c.Clock)
	}
}

func TestInterruptControllers(t *testing.T) {
	vm := newMachine(t, nil).vm
	for _, id := range []uint32{PICMaster, PICSlave} {
		roundTrip(t, func() (IRQChipState, error) { return vm.IRQChip(id) }, vm.SetIRQChip,
			func(s *IRQChipState) { s.Chip[2], s.Chip[5] = 0xfb, 0x20 }) // imr, irq_base
	}
	roundTrip(t, func() (IRQChipState, error) { return vm.IRQChip(IOAPIC) }, vm.SetIRQChip,
		func(s *IRQChipState) {
			const redirection = 24 // of pin 0, after struct kvm_ioapic_state's header
			binary.LittleEndian.PutUint64(s.Chip[redirection+8*5:], 0x10035)
		})
	var ke *Error
	if _, err := vm.IRQChip(7); !errors.As(err, &ke) || !errors.Is(err, unix.EINVAL) {
		t.Errorf("a controller that there is not: %v", err)
	}
}

// TestInjectedException carries an exception over that the guest was about to take.
func TestInjectedException(t *testing.T) {
	v := newMachine(t, nil).vcpu
	e := must1(v.VCPUEvents())(t)
	e.E = gokvm.Exception{Inject: 1, Nr: 13, HadErrorCode: 1, ErrorCode: 0x28}
	must(t, v.SetVCPUEvents(e))
	if got := must1(v.VCPUEvents())(t); got.E.Nr != 13 || got.E.ErrorCode != 0x28 || got.E.Inject != 1 {
		t.Errorf("pending exception is %+v", got.E)
	}
}
