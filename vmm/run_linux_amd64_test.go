package vmm_test

import (
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/cryovisor/cryovisor/internal/testvm"
	"github.com/cryovisor/cryovisor/vmm"
)

// spinning is a machine that runs for ever.
func spinning(t testing.TB, vcpus int) *vmm.VM {
	t.Helper()
	needKVM(t)
	return newVM(t, crash(t, testvm.CrashConfig{Kind: testvm.CrashSpin, User: true, VCPUs: vcpus}, vmm.Hardware{}))
}

// calls are the methods whose result depends on the phase.
var calls = []struct {
	name string
	do   func(context.Context, *vmm.VM) error
}{
	{"Start", func(_ context.Context, vm *vmm.VM) error { return vm.Start() }},
	{"Resume", func(_ context.Context, vm *vmm.VM) error { return vm.Resume() }},
	{"Pause", func(ctx context.Context, vm *vmm.VM) error { return vm.Pause(ctx) }},
	{"State", func(_ context.Context, vm *vmm.VM) error { _, err := vm.State(); return err }},
}

// TestPhases calls every method in every phase of the package comment's diagram.
func TestPhases(t *testing.T) {
	ctx := testContext(t)
	created := func(t *testing.T) *vmm.VM { return spinning(t, 2) }
	running := func(t *testing.T) *vmm.VM { vm := created(t); must(t, vm.Start()); return vm }
	paused := func(t *testing.T) *vmm.VM { vm := running(t); must(t, vm.Pause(ctx)); return vm }
	restored := func(t *testing.T) *vmm.VM { return move(t, paused(t), vmm.Hardware{}) }
	ended := func(t *testing.T) *vmm.VM {
		vm := newVM(t, crash(t, testvm.CrashConfig{Kind: testvm.CrashTripleFault}, vmm.Hardware{}))
		must(t, vm.Start())
		<-vm.Ended()
		return vm
	}
	closed := func(t *testing.T) *vmm.VM { vm := running(t); must(t, vm.Close()); return vm }
	disconnected := func(t *testing.T) *vmm.VM { vm := running(t); must(t, vm.Disconnect()); return vm }
	for _, phase := range []struct {
		name  string
		make  func(*testing.T) *vmm.VM
		fails map[string]error
	}{
		{"created", created, map[string]error{"Resume": vmm.ErrRunState, "Pause": vmm.ErrRunState, "State": vmm.ErrRunState}},
		{"running", running, map[string]error{"Start": vmm.ErrRunState, "Resume": vmm.ErrRunState, "State": vmm.ErrRunState}},
		{"paused", paused, map[string]error{"Start": vmm.ErrRunState, "Pause": vmm.ErrRunState}},
		{"restored", restored, map[string]error{"Start": vmm.ErrRunState, "Pause": vmm.ErrRunState}},
		{"ended", ended, map[string]error{"Start": vmm.ErrTripleFault, "Resume": vmm.ErrTripleFault, "Pause": vmm.ErrTripleFault, "State": vmm.ErrTripleFault}},
		{"closed", closed, map[string]error{"Start": vmm.ErrClosed, "Resume": vmm.ErrClosed, "Pause": vmm.ErrClosed, "State": vmm.ErrClosed}},
		{"disconnected", disconnected, map[string]error{"Start": vmm.ErrClosed, "Resume": vmm.ErrClosed, "Pause": vmm.ErrClosed, "State": vmm.ErrClosed}},
	} {
		for _, call := range calls {
			t.Run(phase.name+"/"+call.name, func(t *testing.T) {
				vm := phase.make(t)
				if err := call.do(ctx, vm); !errors.Is(err, phase.fails[call.name]) {
					t.Errorf("%v, want %v", err, phase.fails[call.name])
				}
				if want := phase.name == "ended"; want && !errors.Is(call.do(ctx, vm), vmm.ErrRunState) {
					t.Error("the error of a machine that ended is no ErrRunState")
				}
				for range 2 {
					must(t, vm.Close())
				}
			})
		}
	}
}

func TestPaused(t *testing.T) {
	vm := spinning(t, 1)
	for _, step := range []struct {
		do   func() error
		want bool
	}{
		{func() error { return nil }, false},
		{vm.Start, false},
		{func() error { return vm.Pause(testContext(t)) }, true},
		{vm.Resume, false},
		{vm.Close, false},
	} {
		must(t, step.do())
		if vm.Paused() != step.want {
			t.Errorf("Paused is %v", vm.Paused())
		}
	}
}

func TestWait(t *testing.T) {
	vm := spinning(t, 1)
	must(t, vm.Start())
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := vm.Wait(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("%v while the guest runs", err)
	}
	select {
	case <-vm.Ended():
		t.Error("ended")
	default:
	}
	must(t, vm.Close())
	<-vm.Ended()
	// The reason is known, so that it is what Wait says, whatever ctx says.
	for range 100 {
		if err := vm.Wait(ctx); !errors.Is(err, vmm.ErrClosed) {
			t.Fatalf("%v after Close", err)
		}
	}
}

// TestKicksAreNotLost pauses and resumes at once, again and again: a vCPU that misses a kick never stops.
func TestKicksAreNotLost(t *testing.T) {
	for _, vcpus := range []int{1, 2, 4} {
		vm := spinning(t, vcpus)
		must(t, vm.Start())
		ctx := testContext(t)
		for range rounds(3000) {
			must(t, vm.Pause(ctx))
			must(t, vm.Resume())
		}
		must(t, vm.Close())
	}
}

// TestKicksReachSleepers does it with vCPUs that halt for ever, of which some never started.
func TestKicksReachSleepers(t *testing.T) {
	cfg := crash(t, testvm.CrashConfig{Kind: testvm.CrashHalt}, vmm.Hardware{})
	flatCfg := flat(t, "count.bin", vmm.Hardware{})
	flatCfg.VCPUs = 3 // two wait for INIT
	for _, cfg := range []vmm.Config{cfg, flatCfg} {
		vm := newVM(t, cfg)
		must(t, vm.Start())
		ctx := testContext(t)
		for range rounds(1000) {
			must(t, vm.Pause(ctx))
			must(t, vm.Resume())
		}
		must(t, vm.Close())
	}
}

func TestPauseWithACancelledContext(t *testing.T) {
	g := newWorker(t, testvm.WorkerConfig{Every: 4, VCPUs: 2})
	vm := g.boot(t, testvm.NoLimit)
	must(t, vm.Start())
	r := rand.New(rand.NewPCG(1, 1))
	for range rounds(300) {
		ctx, cancel := context.WithCancel(t.Context())
		if r.IntN(2) == 0 {
			cancel()
		} else {
			// At any moment of the pause.
			time.AfterFunc(time.Duration(r.IntN(200))*time.Microsecond, cancel)
		}
		switch err := vm.Pause(ctx); {
		case err == nil:
			must(t, vm.Resume())
		case !errors.Is(err, context.Canceled):
			t.Fatal(err)
		}
		cancel()
		g.work(t, vm, 1) // it runs on
	}
	g.check(t, vm)
}

// TestCallsFromEverywhere calls all methods at random from many goroutines while a worker runs. All come
// back, with an error of the run state at worst, and the guest has noticed nothing.
func TestCallsFromEverywhere(t *testing.T) {
	g := newWorker(t, testvm.WorkerConfig{Every: 4, VCPUs: 2})
	vm := g.boot(t, testvm.NoLimit)
	must(t, vm.Start())
	ctx := testContext(t)
	var wg sync.WaitGroup
	for i := range uint64(8) {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(i, 2))
			for range rounds(400) {
				call := calls[r.IntN(len(calls))]
				if err := call.do(ctx, vm); err != nil && !errors.Is(err, vmm.ErrRunState) {
					t.Errorf("%s: %v", call.name, err)
				}
				vm.Paused()
			}
		})
	}
	wg.Wait()
	if vm.Paused() {
		must(t, vm.Resume())
	}
	g.check(t, vm)
}

// TestCloseFromEverywhere closes a machine, from several goroutines, while others use it.
func TestCloseFromEverywhere(t *testing.T) {
	for i := range rounds(40) {
		vm := spinning(t, 2)
		must(t, vm.Start())
		ctx := testContext(t)
		var wg sync.WaitGroup
		for range 2 {
			wg.Go(func() {
				for {
					if err := vm.Pause(ctx); errors.Is(err, vmm.ErrClosed) {
						return
					} else if err != nil && !errors.Is(err, vmm.ErrRunState) {
						t.Error(err)
					}
					_ = vm.Resume() // the other one may have
				}
			})
		}
		time.Sleep(time.Duration(i) * 50 * time.Microsecond) // at any moment
		for range 2 {
			wg.Go(func() {
				if err := vm.Close(); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Go(func() {
			if err := vm.Disconnect(); err != nil {
				t.Error(err)
			}
		})
		wg.Wait()
	}
}
