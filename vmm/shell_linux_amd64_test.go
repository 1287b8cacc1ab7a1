package vmm_test

import (
	"errors"
	"testing"

	"github.com/cryovisor/cryovisor/internal/testvm"
	"github.com/cryovisor/cryovisor/memory"
	"github.com/cryovisor/cryovisor/vmm"
)

// TestShell restores into shells that were made before the guest was known: each is of use once, and leaves nothing behind.
func TestShell(t *testing.T) {
	needKVM(t)
	before := countResources(t)
	unused, err := vmm.NewShell()
	must(t, err)
	must(t, unused.Close())
	must(t, unused.Close())
	if after := countResources(t); after != before {
		t.Errorf("a shell that was not used leaves %+v, there were %+v", after, before)
	}

	shells := make([]*vmm.Shell, 2)
	for i := range shells {
		shells[i], err = vmm.NewShell()
		must(t, err)
		defer shells[i].Close()
	}
	g := newWorker(t, testvm.WorkerConfig{VCPUs: 2, Every: 8})
	vm := g.boot(t, testvm.NoLimit)
	must(t, vm.Start())
	for _, shell := range shells {
		g.work(t, vm, 4)
		pause(t, vm)
		state, mem := encoded(t, vm), copyMemory(t, vm.Memory())
		must(t, vm.Close())
		must(t, shell.CheckHost(state, g.more))
		vm, err = shell.Restore(state, mem, g.hardware(testvm.NoLimit))
		must(t, err)
		must(t, shell.Close()) // it is the VM's now
		must(t, vm.Resume())
	}
	g.check(t, vm)
	must(t, vm.Close())
	if after := countResources(t); after != before {
		t.Errorf("left are %+v, there were %+v", after, before)
	}
}

func TestShellRefuses(t *testing.T) {
	host := needKVM(t)
	vm := spinning(t, 1)
	must(t, vm.Start())
	pause(t, vm)
	state := encoded(t, vm)
	before := countResources(t)
	shell, err := vmm.NewShell()
	must(t, err)
	state.Machine.MemoryBytes = host.MemoryBytes + memory.PageSize
	if err := shell.CheckHost(state, vmm.Hardware{}); !errors.Is(err, vmm.ErrHostMemory) {
		t.Errorf("%v, want ErrHostMemory", err)
	}
	state.VCPUs[0].CPUID[0].EBX++ // the vendor
	if err := shell.CheckHost(state, vmm.Hardware{AllowOvercommit: true}); !errors.Is(err, vmm.ErrCPU) {
		t.Errorf("%v, want ErrCPU", err)
	}
	// The first is refused for its memory's size; the second because the shell is gone.
	for _, want := range []error{vmm.ErrState, vmm.ErrClosed} {
		mem, err := memory.New(4*mib, memory.Options{})
		must(t, err)
		if _, err := shell.Restore(state, mem, vmm.Hardware{}); !errors.Is(err, want) {
			t.Errorf("%v, want %v", err, want)
		}
		if _, err := mem.ReadAt(make([]byte, 1), 0); !errors.Is(err, memory.ErrClosed) {
			t.Errorf("the memory is not closed: %v", err)
		}
	}
	if after := countResources(t); after != before {
		t.Errorf("left are %+v, there were %+v", after, before)
	}
}

// TestShellReserved: a shell whose memory KVM knows in advance takes memory that lies there, and no other.
func TestShellReserved(t *testing.T) {
	needKVM(t)
	g := newWorker(t, testvm.WorkerConfig{})
	vm := g.boot(t, testvm.NoLimit)
	must(t, vm.Start())
	g.work(t, vm, 4)
	pause(t, vm)
	state, mem := encoded(t, vm), copyMemory(t, vm.Memory())
	must(t, vm.Close())
	before := countResources(t)
	shell, err := vmm.NewShell()
	must(t, err)
	must(t, shell.Reserve(state.Machine.MemoryBytes))
	if err := shell.Reserve(state.Machine.MemoryBytes); !errors.Is(err, vmm.ErrClosed) {
		t.Errorf("reserved again: %v", err)
	}
	if p := shell.Reservation(); p.Size() != state.Machine.MemoryBytes || p.HostAddr(0) == 0 {
		t.Errorf("reservation %+v", p)
	}
	if _, err := shell.Restore(state, mem, g.hardware(testvm.NoLimit)); !errors.Is(err, vmm.ErrConfig) {
		t.Errorf("memory that lies elsewhere: %v", err)
	}
	if after := countResources(t); after != before {
		t.Errorf("left are %+v, there were %+v", after, before)
	}
}
