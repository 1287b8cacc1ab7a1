package vmm_test

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/cpu"

	"github.com/cryovisor/cryovisor/internal/testvm"
	"github.com/cryovisor/cryovisor/memory"
	"github.com/cryovisor/cryovisor/vmm"
)

// limit is far more than any of these tests needs.
const limit = 5 * time.Minute

const mib = 1 << 20

func testContext(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeoutCause(t.Context(), limit, errors.New("it did not happen in time"))
	t.Cleanup(cancel)
	return ctx
}

// rounds is how often a test repeats something: n times, or less with -short (an emulated KVM).
func rounds(n int) int {
	if testing.Short() {
		return max(n/20, 5)
	}
	return n
}

func needKVM(t testing.TB) vmm.Host {
	t.Helper()
	h, err := vmm.Probe()
	if errors.Is(err, vmm.ErrNoKVM) || errors.Is(err, vmm.ErrPermission) {
		t.Skip(err)
	}
	must(t, err)
	return h
}

// newVM makes a VM that is closed at the end of the test.
func newVM(t testing.TB, cfg vmm.Config) *vmm.VM {
	t.Helper()
	needKVM(t)
	vm, err := vmm.New(cfg)
	must(t, err)
	t.Cleanup(func() { closeVM(t, vm) })
	return vm
}

func closeVM(t testing.TB, vm *vmm.VM) {
	t.Helper()
	if err := vm.Close(); err != nil {
		t.Error(err)
	}
}

// pause pauses a VM whose guest is not to end.
func pause(t testing.TB, vm *vmm.VM) {
	t.Helper()
	must(t, vm.Pause(testContext(t)))
}

// move moves a paused VM into a new one, through the encoding, and closes it. The new VM is paused.
func move(t testing.TB, vm *vmm.VM, hw vmm.Hardware) *vmm.VM {
	t.Helper()
	state := encoded(t, vm)
	mem := copyMemory(t, vm.Memory())
	must(t, vm.Close())
	moved, err := vmm.Restore(state, mem, hw)
	must(t, err)
	t.Cleanup(func() { closeVM(t, moved) })
	return moved
}

// encoded is the state of a paused VM as another process would get it.
func encoded(t testing.TB, vm *vmm.VM) *vmm.State {
	t.Helper()
	state, err := vm.State()
	must(t, err)
	state, err = vmm.ParseState(state.Sections())
	must(t, err)
	return state
}

func copyMemory(t testing.TB, from *memory.Memory) *memory.Memory {
	t.Helper()
	to, err := memory.New(from.Size(), memory.Options{})
	must(t, err)
	dirty, err := from.Dirty(t.Context())
	must(t, err)
	buf := make([]byte, mib)
	for _, r := range dirty {
		for gpa := r.GPA; gpa < r.End(); gpa += mib {
			b := buf[:min(mib, r.End()-gpa)]
			_, err := from.ReadAt(b, int64(gpa))
			must(t, err)
			_, err = to.WriteAt(b, int64(gpa))
			must(t, err)
		}
	}
	return to
}

// worker is a worker guest with its model and device, through any number of VMs.
type worker struct {
	more vmm.Hardware // that the machine has besides the guest's device
	*testvm.Worker
	content testvm.Content
	model   *testvm.Model
	device  *testvm.Device
	ins     []atomic.Int64 // accesses to the answers since the last report, for each vCPU
	reports atomic.Int64
	failed  atomic.Pointer[error]
}

func newWorker(t testing.TB, cfg testvm.WorkerConfig) *worker {
	t.Helper()
	cfg.Seed, cfg.AVX2 = 7, cpu.X86.HasAVX2
	if cfg.Memory == 0 {
		cfg.Memory = 4 * mib
	}
	w, err := testvm.NewWorker(cfg)
	must(t, err)
	g := &worker{Worker: w, content: testvm.NewPattern(cfg.Seed), ins: make([]atomic.Int64, w.Config().VCPUs)}
	g.model = testvm.NewModel(w, g.content)
	return g
}

// hardware makes a device that goes on from the last one.
func (g *worker) hardware(limit uint64) vmm.Hardware {
	var saved []testvm.VCPUState
	if g.device != nil {
		saved = g.device.State()
	}
	g.device = testvm.NewDevice(g.Worker, saved, limit, func(testvm.Report) { g.reports.Add(1) })
	ports := g.device.Ports()
	ports.Device = g
	hw := g.more
	hw.Ports = []vmm.Ports{ports}
	return hw
}

// In and Out count accesses: between two reports, a guest that is not told to hold reads one token and
// four words of echo.
func (g *worker) In(port uint16, data []byte) {
	g.device.In(port, data)
	if first, _ := g.PortRange(); port%16 == 4 && data[0]&7 == 0 || port%16 == 8 {
		g.ins[(port-first)/16].Add(1)
	}
}

func (g *worker) Out(port uint16, data []byte) {
	before := g.reports.Load()
	g.device.Out(port, data)
	first, _ := g.PortRange()
	if len(g.ins) > 1 || g.reports.Load() == before {
		return
	}
	if n := g.ins[(port-first)/16].Swap(0); n != 5 && g.reports.Load() > 1 {
		err := fmt.Errorf("report %d after %d accesses to the answers, want 5", g.reports.Load(), n)
		g.failed.CompareAndSwap(nil, &err)
	}
}

func (g *worker) boot(t testing.TB, limit uint64) *vmm.VM {
	t.Helper()
	vm := newVM(t, vmm.Config{
		MemoryBytes: g.Config().Memory, VCPUs: g.Config().VCPUs,
		Boot: g.Image().Program(), Hardware: g.hardware(limit),
	})
	must(t, g.Load(g.content, func(gpa uint64, data []byte) error {
		_, err := vm.Memory().WriteAt(data, int64(gpa))
		return err
	}))
	return vm
}

// work waits for n more reports of the running guest.
func (g *worker) work(t testing.TB, vm *vmm.VM, n int64) {
	t.Helper()
	want := g.reports.Load() + n
	waitFor(t, vm, func() bool { return g.reports.Load() >= want })
}

// waitFor waits until done, while vm runs.
func waitFor(t testing.TB, vm *vmm.VM, done func() bool) {
	t.Helper()
	ctx := testContext(t)
	tick := time.NewTicker(100 * time.Microsecond)
	defer tick.Stop()
	for !done() {
		select {
		case <-vm.Ended():
			t.Fatal(vm.Wait(ctx))
		case <-ctx.Done():
			t.Fatal(context.Cause(ctx))
		case <-tick.C:
		}
	}
}

// check lets every vCPU of the running guest come to a report, and compares the reports and every byte
// of memory with the model.
func (g *worker) check(t testing.TB, vm *vmm.VM) {
	t.Helper()
	g.device.SetLimit(0)
	ctx, cancel := context.WithCancelCause(testContext(t))
	defer cancel(nil)
	go func() { cancel(vm.Wait(ctx)) }()
	reports, err := g.device.WaitHeld(ctx)
	must(t, err)
	for _, r := range reports {
		must(t, g.model.Check(r))
	}
	must(t, g.model.Compare(vm.Memory(), vm.Memory().Ranges()))
	if err := g.failed.Load(); err != nil {
		t.Error(*err)
	}
}

// flat is a config for a flat guest of testdata/guests.
func flat(t testing.TB, name string, hw vmm.Hardware) vmm.Config {
	t.Helper()
	image := readTestdata(t, "guests/"+name)
	return vmm.Config{
		MemoryBytes: 2 * mib,
		Boot:        vmm.Flat{Image: vmm.File{ReaderAt: bytes.NewReader(image), Size: int64(len(image))}, Base: mib, Entry: mib},
		Hardware:    hw,
	}
}

func crash(t testing.TB, cfg testvm.CrashConfig, hw vmm.Hardware) vmm.Config {
	t.Helper()
	cfg.Memory = 4 * mib
	im, err := testvm.Crash(cfg)
	must(t, err)
	return vmm.Config{MemoryBytes: cfg.Memory, VCPUs: max(cfg.VCPUs, 1), Boot: im.Program(), Hardware: hw}
}

var record = flag.Bool("record", false, "write what of testdata was recorded and is not there")

// recordFile writes a file of testdata. What was recorded once must stay readable, and is not replaced.
func recordFile(t *testing.T, name string, b []byte) {
	t.Helper()
	f, err := os.OpenFile("testdata/"+name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	must(t, err)
	_, err = f.Write(b)
	must(t, errors.Join(err, f.Close()))
}

// TestRecordState records the golden state, with -record, which only a new version of the format needs.
func TestRecordState(t *testing.T) {
	if !*record {
		t.Skip("only with -record")
	}
	g := newWorker(t, testvm.WorkerConfig{Memory: 16 * mib, VCPUs: 2})
	vm := g.boot(t, testvm.NoLimit)
	must(t, vm.Start())
	g.work(t, vm, 4)
	pause(t, vm)
	state, err := vm.State()
	must(t, err)
	recordFile(t, golden, packSections(state.Sections()))
}

// resources are what a process can leak: descriptors, and mappings that only a VM makes.
type resources struct{ fds, mappings int }

func countResources(t testing.TB) (r resources) {
	t.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	must(t, err)
	r.fds = len(fds)
	maps, err := os.ReadFile("/proc/self/maps")
	must(t, err)
	for line := range strings.Lines(string(maps)) {
		var from, to uint64
		_, err := fmt.Sscanf(line, "%x-%x", &from, &to)
		must(t, err)
		// A gigabyte is the 32-bit hole, which every guest memory has reserved.
		if strings.Contains(line, "kvm-vcpu") || strings.Contains(line, "memfd:") || strings.Contains(line, "---p") && to-from >= 1<<30 {
			r.mappings++
		}
	}
	return r
}
