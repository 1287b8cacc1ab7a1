package vmm_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cryovisor/cryovisor/internal/kvm"
	"github.com/cryovisor/cryovisor/internal/testvm"
	"github.com/cryovisor/cryovisor/memory"
	"github.com/cryovisor/cryovisor/vmm"
)

// someTime lets a running guest come to a random place.
func someTime(r *rand.Rand) { time.Sleep(time.Duration(r.IntN(600)) * time.Microsecond) }

// TestWorkerThroughManyMachines moves a worker guest that mostly does I/O from machine to machine at
// random moments, and compares all that it reported, every register and every byte of memory at the end.
func TestWorkerThroughManyMachines(t *testing.T) {
	for _, vcpus := range []int{1, 2, 4} {
		t.Run(fmt.Sprintf("vcpus=%d", vcpus), func(t *testing.T) {
			g := newWorker(t, testvm.WorkerConfig{Every: 1, VCPUs: vcpus})
			vm := g.boot(t, testvm.NoLimit)
			must(t, vm.Start())
			r := rand.New(rand.NewPCG(3, uint64(vcpus)))
			for range rounds(300) {
				someTime(r)
				pause(t, vm)
				vm = move(t, vm, g.hardware(testvm.NoLimit))
				must(t, vm.Resume())
			}
			g.work(t, vm, 10)
			g.check(t, vm)
			t.Logf("%d reports", g.reports.Load())
		})
	}
}

// TestWorkerAbove4GiB moves a guest whose memory goes on above the 32-bit hole.
func TestWorkerAbove4GiB(t *testing.T) {
	if testing.Short() {
		t.Skip("the emulated host has too little memory")
	}
	g := newWorker(t, testvm.WorkerConfig{Memory: 3<<30 + 64*mib, Every: 64, WorkingSet: 32 * mib})
	g.content = testvm.Content(zeros{})
	g.model = testvm.NewModel(g.Worker, g.content)
	vm := g.boot(t, testvm.NoLimit)
	must(t, vm.Start())
	for range 3 {
		g.work(t, vm, 20)
		pause(t, vm)
		vm = move(t, vm, g.hardware(testvm.NoLimit))
		must(t, vm.Resume())
	}
	g.work(t, vm, 20)
	g.check(t, vm)
}

// zeros is a memory of zeros.
type zeros struct{}

func (zeros) Page(_ uint64, dst []byte) bool { clear(dst); return false }

// counter is the device of the guest count.S: it answers with how often it was asked, and takes the same
// back. It belongs to the guest, through all machines.
type counter struct {
	next     atomic.Uint32 // the answer to the next read
	back     atomic.Uint32 // what the guest writes next
	progress atomic.Uint32
	mu       sync.Mutex
	err      error
}

func (c *counter) In(port uint16, data []byte) {
	if port != 0x5000 {
		c.fail(fmt.Errorf("%d bytes read from %#x", len(data), port))
		return
	}
	var b [4]byte
	binary.LittleEndian.PutUint32(b[:], c.next.Add(1)-1)
	copy(data, b[:])
}

func (c *counter) Out(port uint16, data []byte) {
	var b [4]byte
	copy(b[:], data)
	v := binary.LittleEndian.Uint32(b[:])
	switch port {
	case 0x5004: // the last eight numbers
		n := c.back.Add(1) - 1
		if want := n/8*11 + 3 + n%8; v != want {
			c.fail(fmt.Errorf("word %d is %d, want %d", n, v, want))
		}
	case 0x5008:
		if c.progress.Add(11) != v || c.next.Load() != v || c.back.Load() != v/11*8 {
			c.fail(fmt.Errorf("the guest counts %d, here are %d reads, %d writes, %d rounds", v, c.next.Load(), c.back.Load(), c.progress.Load()/11))
		}
	default:
		c.fail(fmt.Errorf("check %d of count.S failed", v))
	}
}

func (c *counter) fail(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err == nil {
		c.err = err
	}
}

func (c *counter) failed() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// TestPendingIO stops a guest that does nothing but port and memory-mapped I/O, singly and by string
// instructions, at random moments. An access that is lost, made twice or given a wrong value is seen by
// the device or by the guest.
func TestPendingIO(t *testing.T) {
	needKVM(t)
	dev := &counter{}
	hw := vmm.Hardware{Ports: []vmm.Ports{{First: 0x5000, Last: 0x500f, Device: dev}}}
	vm := newVM(t, flat(t, "count.bin", hw))
	must(t, vm.Start())
	r := rand.New(rand.NewPCG(4, 4))
	moves := 0
	for i := range rounds(3000) {
		if i%8 == 0 {
			someTime(r)
		}
		pause(t, vm)
		if i%8 == 0 {
			moves++
			vm = move(t, vm, hw)
		}
		must(t, vm.Resume())
		if err := dev.failed(); err != nil {
			t.Fatalf("after %d pauses and %d moves: %v", i, moves, err)
		}
	}
	last := dev.progress.Load()
	waitFor(t, vm, func() bool { return dev.progress.Load() > last+22 || dev.failed() != nil })
	must(t, dev.failed())
	t.Logf("%d rounds of the guest, %d moves", dev.progress.Load()/11, moves)
}

// TestTimersGoOn moves guests that wait for interrupts. One that is lost for ever would leave them asleep.
func TestTimersGoOn(t *testing.T) {
	for _, cfg := range []testvm.TimerConfig{
		{Source: testvm.TimerPeriodic},
		{Source: testvm.TimerPeriodic, Busy: true},
		{Source: testvm.TimerDeadline},
		{Source: testvm.TimerPIT},
		{Source: testvm.TimerDeadline, VCPUs: 2},
		{Source: testvm.TimerPIT, VCPUs: 2},
	} {
		t.Run(fmt.Sprintf("%v,busy=%v,vcpus=%d", cfg.Source, cfg.Busy, cfg.VCPUs), func(t *testing.T) {
			testTimer(t, cfg)
		})
	}
}

// ticking is a timer guest's device, through all machines.
type ticking struct {
	cfg     testvm.TimerConfig
	device  *testvm.TimerDevice
	reports [2]atomic.Int64
	err     atomic.Pointer[error]
}

func (g *ticking) hardware() vmm.Hardware {
	var saved []testvm.TimerState
	if g.device != nil {
		saved = g.device.State()
	}
	g.device = testvm.NewTimerDevice(g.cfg, saved, func(r testvm.TimerReport, err error) {
		g.reports[r.VCPU].Add(1)
		if err != nil {
			g.err.CompareAndSwap(nil, &err)
		}
	})
	return vmm.Hardware{Ports: []vmm.Ports{{First: 0x4000, Last: 0x401f, Device: g.device}}}
}

func testTimer(t *testing.T, cfg testvm.TimerConfig) {
	cfg.Memory, cfg.Every = 4*mib, 2
	im, err := testvm.Timer(cfg)
	must(t, err)
	g := &ticking{cfg: cfg}
	needKVM(t)
	vm := newVM(t, vmm.Config{MemoryBytes: cfg.Memory, VCPUs: max(cfg.VCPUs, 1), Boot: im.Program(), Hardware: g.hardware()})
	must(t, vm.Start())
	r := rand.New(rand.NewPCG(5, 5))
	for range rounds(100) {
		pause(t, vm)
		vm = move(t, vm, g.hardware())
		must(t, vm.Resume())
		for v := range max(cfg.VCPUs, 1) {
			want := g.reports[v].Load() + 1
			waitFor(t, vm, func() bool { return g.reports[v].Load() >= want || g.err.Load() != nil })
		}
		if err := g.err.Load(); err != nil {
			t.Fatal(*err)
		}
		someTime(r)
	}
}

// TestStateDoesNotChangeTheMachine reads the state twice, and once more of a machine that was made of it
// and has not run: what runs on by itself differs, and nothing else.
func TestStateDoesNotChangeTheMachine(t *testing.T) {
	g := newWorker(t, testvm.WorkerConfig{Every: 8, VCPUs: 2})
	vm := g.boot(t, testvm.NoLimit)
	must(t, vm.Start())
	g.work(t, vm, 10)
	pause(t, vm)
	first := encoded(t, vm)
	checkSameState(t, encoded(t, vm), first)
	vm = move(t, vm, g.hardware(testvm.NoLimit))
	moved := encoded(t, vm)
	checkSameState(t, moved, first)
	for i := range first.VCPUs {
		if a, b := tsc(first.VCPUs[i]), tsc(moved.VCPUs[i]); b < a || b-a > uint64(first.VCPUs[i].TSCKHz)*1000*60 {
			t.Errorf("vCPU %d: the TSC was %d and is %d", i, a, b)
		}
		if !bytes.Equal(moved.VCPUs[i].XSave, first.VCPUs[i].XSave) {
			t.Errorf("vCPU %d: another XSAVE area", i)
		}
	}
	must(t, vm.Resume())
	g.check(t, vm)
}

func tsc(v vmm.VCPUState) uint64 {
	return v.MSRs[slices.IndexFunc(v.MSRs, func(m vmm.MSR) bool { return m.Index == 0x10 })].Value
}

// runningMSRs are counters: TSC, MPERF, APERF, and the run time and reference count of Hyper-V.
var runningMSRs = []uint32{0x10, 0xe7, 0xe8, 0x40000010, 0x40000020}

// checkSameState compares two states of one paused machine, apart from the counters that go on while it is
// paused: runningMSRs, the deadline where it stands for the TSC, the current count of the APIC timer, the
// clock, and the PIT's load time.
func checkSameState(t *testing.T, got, want *vmm.State) {
	t.Helper()
	a, b := stopCounters(t, got).Sections(), stopCounters(t, want).Sections()
	if len(a) != len(b) {
		t.Fatalf("%d sections, want %d", len(a), len(b))
	}
	for i := range a {
		if a[i].Name != b[i].Name || a[i].Version != b[i].Version || !bytes.Equal(a[i].Data, b[i].Data) {
			t.Errorf("section %s differs", a[i].Name)
			explain(t, got, want)
		}
	}
}

func explain(t *testing.T, got, want *vmm.State) {
	t.Helper()
	for i := range got.VCPUs {
		for j, m := range got.VCPUs[i].MSRs {
			if w := want.VCPUs[i].MSRs[j]; m != w {
				t.Logf("vCPU %d: %x, was %x", i, m, w)
			}
		}
		t.Logf("vCPU %d: LAPIC same: %v, events same: %v", i,
			bytes.Equal(got.VCPUs[i].LAPIC, want.VCPUs[i].LAPIC), bytes.Equal(got.VCPUs[i].Events, want.VCPUs[i].Events))
	}
}

func stopCounters(t *testing.T, s *vmm.State) *vmm.State {
	t.Helper()
	s, err := vmm.ParseState(s.Sections()) // a copy
	must(t, err)
	clear(s.VM.Clock)
	for channel := range 3 {
		clear(s.VM.PIT[channel*24+16:][:8]) // kvm_pit_channel_state.count_load_time
	}
	for i := range s.VCPUs {
		v := &s.VCPUs[i]
		v.TSCDeadline = 0
		clear(v.LAPIC[0x390:0x394])
		for j, m := range v.MSRs {
			if slices.Contains(runningMSRs, m.Index) {
				v.MSRs[j].Value = 0
			}
		}
	}
	return s
}

// restoreFails wants Restore to refuse a state of a machine of 4 MiB.
func restoreFails(t *testing.T, state *vmm.State, hw vmm.Hardware, want error) error {
	t.Helper()
	mem, err := memory.New(4*mib, memory.Options{})
	must(t, err)
	vm, err := vmm.Restore(state, mem, hw)
	if err == nil {
		closeVM(t, vm)
		t.Errorf("restored, want %v", want)
		return nil
	}
	if !errors.Is(err, want) {
		t.Errorf("%v, want %v", err, want)
	}
	if _, err := mem.ReadAt(make([]byte, 1), 0); !errors.Is(err, memory.ErrClosed) {
		t.Errorf("the memory is not closed: %v", err)
	}
	return err
}

func TestRestoreRefuses(t *testing.T) {
	g := newWorker(t, testvm.WorkerConfig{})
	vm := g.boot(t, testvm.NoLimit)
	must(t, vm.Start())
	g.work(t, vm, 2)
	pause(t, vm)
	before := countResources(t)
	cpuid := func(s *vmm.State, leaf uint32) *vmm.CPUIDEntry {
		c := s.VCPUs[0].CPUID
		return &c[slices.IndexFunc(c, func(e vmm.CPUIDEntry) bool { return e.Function == leaf })]
	}
	for _, tc := range []struct {
		name   string
		change func(*vmm.State)
		want   error
	}{
		{"no vCPUs", func(s *vmm.State) { s.VCPUs, s.Machine.VCPUs = nil, 0 }, vmm.ErrState},
		{"another number of vCPUs", func(s *vmm.State) { s.Machine.VCPUs = 2 }, vmm.ErrState},
		{"another vCPU", func(s *vmm.State) { s.VCPUs[0].ID = 1 }, vmm.ErrState},
		{"another memory size", func(s *vmm.State) { s.Machine.MemoryBytes += 4096 }, vmm.ErrState},
		{"unknown feature", func(s *vmm.State) { cpuid(s, 7).EBX = 0xffffffff }, vmm.ErrCPU},
		{"another vendor", func(s *vmm.State) { cpuid(s, 0).EBX++ }, vmm.ErrCPU},
		{"another family", func(s *vmm.State) { cpuid(s, 1).EAX ^= 0x100 }, vmm.ErrCPU},
		{"no CPUID", func(s *vmm.State) { s.VCPUs[0].CPUID = nil }, vmm.ErrCPU},
		{"used state beyond the XSAVE area", func(s *vmm.State) {
			s.VCPUs[0].XSave = append(s.VCPUs[0].XSave, make([]byte, 64<<10)...)
			s.VCPUs[0].XSave[len(s.VCPUs[0].XSave)-1] = 1
		}, vmm.ErrCPU},
		{"XSAVE area too short", func(s *vmm.State) { s.VCPUs[0].XSave = s.VCPUs[0].XSave[:519] }, vmm.ErrState},
		{"PIT", func(s *vmm.State) { s.VM.PIT = s.VM.PIT[1:] }, vmm.ErrState},
		{"clock", func(s *vmm.State) { s.VM.Clock = append(s.VM.Clock, 0) }, vmm.ErrState},
		{"PIC for IOAPIC", func(s *vmm.State) { s.VM.IOAPIC = s.VM.PICSlave }, vmm.ErrState},
		{"IOAPIC short", func(s *vmm.State) { s.VM.IOAPIC = s.VM.IOAPIC[:100] }, vmm.ErrState},
		{"LAPIC", func(s *vmm.State) { s.VCPUs[0].LAPIC = nil }, vmm.ErrState},
		{"events", func(s *vmm.State) { s.VCPUs[0].Events = s.VCPUs[0].Events[:10] }, vmm.ErrState},
		{"XCRs", func(s *vmm.State) { s.VCPUs[0].XCRs = s.VCPUs[0].XCRs[:10] }, vmm.ErrState},
		{"debug registers", func(s *vmm.State) { s.VCPUs[0].DebugRegs = nil }, vmm.ErrState},
		{"impossible run state", func(s *vmm.State) { s.VCPUs[0].MPState = 99 }, vmm.ErrState},
		{"impossible XCR0", func(s *vmm.State) { s.VCPUs[0].XCRs[16] = 2 }, vmm.ErrState},
		{"impossible control register", func(s *vmm.State) { s.VCPUs[0].Sregs.CR0 = 1 << 31 }, vmm.ErrState},
		{"unknown MSR", func(s *vmm.State) {
			s.VCPUs[0].MSRs = append(s.VCPUs[0].MSRs, vmm.MSR{Index: 0x12345678, Value: 1})
		}, vmm.ErrCapability},
		{"no serial port", func(s *vmm.State) { s.Devices = nil }, vmm.ErrState},
		{"unknown device", func(s *vmm.State) { s.Devices = append(s.Devices, vmm.DeviceState{Name: "tpm0", Version: 1}) }, vmm.ErrState},
		{"device's state", func(s *vmm.State) { s.Devices[0].Data = s.Devices[0].Data[1:] }, vmm.ErrState},
		{"newer device", func(s *vmm.State) { s.Devices[0].Version = 2 }, vmm.ErrStateVersion},
		{"newer encoding of a device", func(s *vmm.State) { s.Devices[0].Data[0] = 2 }, vmm.ErrStateVersion},
	} {
		t.Run(tc.name, func(t *testing.T) {
			state := encoded(t, vm)
			tc.change(state)
			restoreFails(t, state, vmm.Hardware{}, tc.want)
		})
	}
	if after := countResources(t); after != before {
		t.Errorf("%+v, before %+v", after, before)
	}
	// None of it has harmed the machine.
	must(t, vm.Resume())
	g.check(t, vm)
}

// restoredAs makes a machine of the state of another, changed, and returns its state: before it has run, and after.
func restoredAs(t *testing.T, change func(*vmm.State)) (wanted, before, after *vmm.State) {
	t.Helper()
	g := newWorker(t, testvm.WorkerConfig{Every: 8, VCPUs: 2})
	vm := g.boot(t, testvm.NoLimit)
	must(t, vm.Start())
	g.work(t, vm, 4)
	pause(t, vm)
	wanted = encoded(t, vm)
	change(wanted)
	moved, err := vmm.Restore(wanted, copyMemory(t, vm.Memory()), g.hardware(testvm.NoLimit))
	must(t, err)
	t.Cleanup(func() { closeVM(t, moved) })
	before = encoded(t, moved)
	must(t, moved.Resume())
	g.work(t, moved, 4)
	pause(t, moved)
	after = encoded(t, moved)
	must(t, moved.Resume())
	g.check(t, moved)
	return wanted, before, after
}

// TestDebugRegistersStay: what a debugger in the guest has set is there after a resume, on each vCPU. (The test guest leaves these
// registers alone.)
func TestDebugRegistersStay(t *testing.T) {
	wanted, before, after := restoredAs(t, func(s *vmm.State) {
		for i := range s.VCPUs {
			// struct kvm_debugregs: DR0 to DR3 are addresses that the guest does not touch; DR6 says that the breakpoint of
			// DR1 was met; DR7 has one for writes to each of them.
			cpu := uint64(i) << 16
			for at, v := range []uint64{
				0x7f1000001000 + cpu, 0x7f1000002008 + cpu, 0x7f1000003004 + cpu, 0x7f1000004002 + cpu, 0xffff0ff2, 0x11110455,
			} {
				binary.LittleEndian.PutUint64(s.VCPUs[i].DebugRegs[8*at:], v)
			}
		}
	})
	for i := range wanted.VCPUs {
		want := wanted.VCPUs[i].DebugRegs
		if got := before.VCPUs[i].DebugRegs; !bytes.Equal(got, want) {
			t.Errorf("vCPU %d: debug registers % x, want % x", i, got, want)
		}
		if got := after.VCPUs[i].DebugRegs; !bytes.Equal(got, want) {
			t.Errorf("vCPU %d: debug registers % x after it has run, want % x", i, got, want)
		}
	}
}

// TestTSCFrequencyStays: a guest's time stamp counter runs as it did where the guest was booted, on a host with another frequency
// too; a host that can't do that refuses, and does not blame the state. A KVM that can't scale makes a guest's faster, by catching
// up, and never slower; it reports the frequency that it was asked for even then.
func TestTSCFrequencyStays(t *testing.T) {
	g := newWorker(t, testvm.WorkerConfig{Every: 8, VCPUs: 2})
	vm := g.boot(t, testvm.NoLimit)
	must(t, vm.Start())
	g.work(t, vm, 4)
	pause(t, vm)
	host := encoded(t, vm).VCPUs[0].TSCKHz
	if host == 0 {
		t.Fatal("the state has no frequency")
	}
	scales := scalesTSC(t)
	for _, tc := range []struct {
		khz  uint32
		near bool // enough for the host's own to do
	}{
		{host, true},
		{host - host/10000, true},
		{host + host/10000, true},
		{host + host/10, false},
		{host - host/10, false},
		{host / 2, false},
	} {
		t.Run(fmt.Sprintf("%d of %d", tc.khz, host), func(t *testing.T) {
			state := encoded(t, vm)
			for i := range state.VCPUs {
				state.VCPUs[i].TSCKHz = tc.khz
			}
			moved, err := vmm.Restore(state, copyMemory(t, vm.Memory()), g.hardware(testvm.NoLimit))
			if tc.khz < host && !tc.near && !scales {
				if err == nil {
					must(t, moved.Close())
				}
				if !errors.Is(err, vmm.ErrCPU) || errors.Is(err, vmm.ErrState) {
					t.Errorf("%v, want %v alone", err, vmm.ErrCPU)
				}
				return
			}
			must(t, err)
			defer closeVM(t, moved)
			for i, v := range encoded(t, moved).VCPUs {
				if v.TSCKHz != tc.khz && (!tc.near || v.TSCKHz != host) {
					t.Errorf("vCPU %d: %d kHz", i, v.TSCKHz)
				}
			}
		})
	}
}

// scalesTSC says whether a guest's time stamp counter may be slower than the host's here.
func scalesTSC(t *testing.T) bool {
	t.Helper()
	sys, err := kvm.Open(kvm.DevicePath)
	must(t, err)
	defer sys.Close()
	n, err := sys.CheckExtension(kvm.CapTSCControl)
	must(t, err)
	return n != 0
}

func TestRestoreTakesALargerXSaveArea(t *testing.T) {
	g := newWorker(t, testvm.WorkerConfig{Every: 8})
	vm := g.boot(t, testvm.NoLimit)
	must(t, vm.Start())
	g.work(t, vm, 4)
	pause(t, vm)
	state := encoded(t, vm)
	state.VCPUs[0].XSave = append(state.VCPUs[0].XSave, make([]byte, 8192)...)
	other, err := vmm.Restore(state, copyMemory(t, vm.Memory()), g.hardware(testvm.NoLimit))
	must(t, err)
	defer closeVM(t, other)
	must(t, other.Resume())
	g.check(t, other)
}

func TestCheckHost(t *testing.T) {
	host := needKVM(t)
	vm := spinning(t, 1)
	must(t, vm.Start())
	pause(t, vm)
	state := encoded(t, vm)
	must(t, vmm.CheckHost(state, vmm.Hardware{}))
	state.Machine.MemoryBytes = host.MemoryBytes + 4096
	err := vmm.CheckHost(state, vmm.Hardware{})
	if hostErr, ok := errors.AsType[*vmm.HostError](err); !ok || !errors.Is(err, vmm.ErrHostMemory) || hostErr.Do == "" {
		t.Errorf("%v, want a HostError of kind ErrHostMemory", err)
	}
	must(t, vmm.CheckHost(state, vmm.Hardware{AllowOvercommit: true}))
}
