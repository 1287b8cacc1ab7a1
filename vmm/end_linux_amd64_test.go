package vmm_test

import (
	"context"
	"errors"
	"testing"

	"github.com/cryovisor/cryovisor/internal/testvm"
	"github.com/cryovisor/cryovisor/memory"
	"github.com/cryovisor/cryovisor/vmm"
)

// endOf runs a machine to its end.
func endOf(t testing.TB, vm *vmm.VM) error {
	t.Helper()
	ctx := testContext(t)
	err := vm.Wait(ctx)
	if ctx.Err() != nil {
		t.Fatal(context.Cause(ctx))
	}
	return err
}

// TestEnds lets a guest end in every way, in kernel and user mode, with one vCPU and two. A machine that
// has ended says why, whatever is asked of it.
func TestEnds(t *testing.T) {
	needKVM(t)
	for _, tc := range []struct {
		name string
		cfg  testvm.CrashConfig
		want error
	}{
		{"triple fault", testvm.CrashConfig{Kind: testvm.CrashTripleFault}, vmm.ErrTripleFault},
		{"power-off", testvm.CrashConfig{Kind: testvm.CrashWrite, Write: testvm.PortWrite{Port: 0x600, Width: 1, Value: 0x34}}, vmm.ErrPowerOff},
		{"reset by the keyboard controller", testvm.CrashConfig{Kind: testvm.CrashWrite, Write: testvm.PortWrite{Port: 0x64, Width: 1, Value: 0xfe}}, vmm.ErrReset},
		{"reset by the chipset", testvm.CrashConfig{Kind: testvm.CrashWrite, Write: testvm.PortWrite{Port: 0xcf9, Width: 1, Value: 6}}, vmm.ErrReset},
	} {
		for _, user := range []bool{false, true} {
			for _, vcpus := range []int{1, 2} {
				tc.cfg.User, tc.cfg.VCPUs = user, vcpus
				t.Run(tc.name, func(t *testing.T) {
					vm := newVM(t, crash(t, tc.cfg, vmm.Hardware{}))
					must(t, vm.Start())
					err := endOf(t, vm)
					exit, ok := errors.AsType[*vmm.ExitError](err)
					if !ok || !errors.Is(err, tc.want) || exit.VCPU < 0 || exit.VCPU >= vcpus {
						t.Fatalf("%v, want an ExitError of kind %v", err, tc.want)
					}
					if !errors.Is(tc.want, vmm.ErrTripleFault) && (exit.RIP < 0x10000 || exit.RIP > 0x10200) {
						t.Errorf("%v: the guest's code is elsewhere", err)
					}
					if err := vm.Resume(); !errors.Is(err, vmm.ErrRunState) || !errors.Is(err, tc.want) {
						t.Errorf("Resume: %v", err)
					}
				})
			}
		}
	}
}

// TestWritesThatEndNothing makes writes beside those of TestEnds: the guest goes on, as a pause that
// succeeds shows.
func TestWritesThatEndNothing(t *testing.T) {
	needKVM(t)
	for _, w := range []testvm.PortWrite{
		{Port: 0x600, Width: 1, Value: 0x30}, // S4
		{Port: 0x600, Width: 1, Value: 0x14}, // not enabled
		{Port: 0x601, Width: 1, Value: 0x34},
		{Port: 0x64, Width: 1, Value: 0xff},
		{Port: 0x60, Width: 1, Value: 0xfe},
		{Port: 0xcf9, Width: 1, Value: 2},
		{Port: 0x80, Width: 4, Value: 0xfefefefe}, // nothing is there
	} {
		vm := newVM(t, crash(t, testvm.CrashConfig{Kind: testvm.CrashWrite, Write: w}, vmm.Hardware{}))
		must(t, vm.Start())
		waitFor(t, vm, func() bool {
			pause(t, vm)
			state, err := vm.State()
			must(t, err)
			must(t, vm.Resume())
			return state.VCPUs[0].Regs.RIP == 0x10100 // of CrashSpin, where it goes after the write
		})
		must(t, vm.Close())
	}
}

// TestUnemulatable executes an instruction that an interpreting KVM does not know: the error has its
// address and, where KVM gives them, its bytes. On a processor it simply runs.
func TestUnemulatable(t *testing.T) {
	host := needKVM(t)
	off := testvm.PortWrite{Port: 0x600, Width: 1, Value: 0x34}
	vm := newVM(t, crash(t, testvm.CrashConfig{Kind: testvm.CrashUnemulatable, Write: off}, vmm.Hardware{}))
	must(t, vm.Start())
	err := endOf(t, vm)
	if host.Interpreted == nil {
		if !errors.Is(err, vmm.ErrPowerOff) {
			t.Errorf("%v, want ErrPowerOff", err)
		}
		return
	}
	e, ok := errors.AsType[*vmm.EmulationError](err)
	if !ok || !errors.Is(err, vmm.ErrEmulation) {
		t.Fatalf("%v, want an EmulationError", err)
	}
	if e.RIP != 0x10040 || e.Suberror != 1 || len(e.Insn) == 0 || e.Insn[0] != 0xf3 { // popcnt
		t.Errorf("%+v", e)
	}
}

func TestLinuxNeedsVirtualization(t *testing.T) {
	host := needKVM(t)
	if host.Interpreted == nil {
		t.Skip("this KVM has hardware virtualization")
	}
	before := countResources(t)
	_, err := vmm.New(vmm.Config{MemoryBytes: 64 * mib, Boot: vmm.Linux{}})
	if hostErr, ok := errors.AsType[*vmm.HostError](err); !ok || !errors.Is(err, vmm.ErrInterpreted) || hostErr.Do == "" {
		t.Errorf("%v, want a HostError of kind ErrInterpreted", err)
	}
	if after := countResources(t); after != before {
		t.Errorf("%+v, before %+v", after, before)
	}
}

// badSource is a snapshot of a machine of which one page can't be read, or never comes.
type badSource struct {
	mem   *memory.Memory // what the pages hold
	bad   uint64         // GPA of the page
	stuck chan struct{}  // if not nil: closed when the page is asked for, and Fetch hangs until its end
}

var errDamaged = errors.New("the snapshot is damaged")

func (s *badSource) Lookup(gpa uint64) (start, length uint64, chunk int64) {
	gpa &^= memory.PageSize - 1
	return gpa, memory.PageSize, int64(gpa / memory.PageSize)
}

func (s *badSource) Chunks() int64 { return int64(s.mem.Size() / memory.PageSize) }

func (s *badSource) Fetch(ctx context.Context, chunk int64, install func(uint64, []byte) error) error {
	gpa := uint64(chunk) * memory.PageSize
	if gpa == s.bad {
		if s.stuck == nil {
			return errDamaged
		}
		close(s.stuck)
		<-ctx.Done()
		return ctx.Err()
	}
	page := make([]byte, memory.PageSize)
	if _, err := s.mem.ReadAt(page, int64(gpa)); err != nil {
		return err
	}
	return install(gpa, page)
}

// lazy is a paused worker restored with memory of which the guest's report block is missing.
func lazy(t *testing.T, stuck chan struct{}) (*vmm.VM, *worker) {
	t.Helper()
	g := newWorker(t, testvm.WorkerConfig{Every: 4})
	vm := g.boot(t, testvm.NoLimit)
	must(t, vm.Start())
	g.work(t, vm, 4)
	pause(t, vm)
	state := encoded(t, vm)
	img, err := memory.NewImage(4*mib, &badSource{mem: vm.Memory(), bad: 0x20000, stuck: stuck})
	must(t, err)
	mem, err := img.Map(t.Context(), memory.MapOptions{})
	if errors.Is(err, memory.ErrNotPermitted) || errors.Is(err, memory.ErrKernel) || errors.Is(err, memory.ErrHugeShmem) {
		must(t, img.Close())
		t.Skip(err)
	}
	must(t, errors.Join(err, img.Close()))
	lazy, err := vmm.Restore(state, mem, g.hardware(testvm.NoLimit))
	must(t, err)
	t.Cleanup(func() { closeVM(t, lazy) })
	return lazy, g
}

// TestMemoryThatFails runs a guest on a snapshot that can't be read where the guest writes its reports:
// it ends before it reports anything.
func TestMemoryThatFails(t *testing.T) {
	needKVM(t)
	vm, g := lazy(t, nil)
	reports := g.reports.Load()
	must(t, vm.Resume())
	err := endOf(t, vm)
	if !errors.Is(err, vmm.ErrGuestMemory) || !errors.Is(err, errDamaged) {
		t.Errorf("%v, want ErrGuestMemory and its cause", err)
	}
	if err := vm.Pause(t.Context()); !errors.Is(err, vmm.ErrGuestMemory) {
		t.Errorf("Pause: %v", err)
	}
	// A report that was on its way out is the machine's last word; a new one needs the page.
	if n := g.reports.Load() - reports; n > 1 {
		t.Errorf("%d reports without the page that they are made in", n)
	}
	must(t, vm.Close())
}

// TestCloseGetsAStuckPauseOut closes a machine whose vCPU waits for a page that never comes, alone, under
// a Pause, and after one that was given up.
func TestCloseGetsAStuckPauseOut(t *testing.T) {
	needKVM(t)
	for _, how := range []string{"running", "pausing", "pause given up"} {
		t.Run(how, func(t *testing.T) {
			stuck := make(chan struct{})
			vm, _ := lazy(t, stuck)
			must(t, vm.Resume())
			<-stuck
			paused := make(chan error, 1)
			switch how {
			case "pausing":
				go func() { paused <- vm.Pause(testContext(t)) }()
			case "pause given up":
				ctx, cancel := context.WithCancel(t.Context())
				cancel()
				paused <- vm.Pause(ctx)
			default:
				paused <- nil
			}
			must(t, vm.Close())
			err := <-paused
			if how == "pausing" && !errors.Is(err, vmm.ErrClosed) || how == "pause given up" && !errors.Is(err, context.Canceled) {
				t.Errorf("%v", err)
			}
		})
	}
}
