package vmm_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"os"

	"github.com/cryovisor/cryovisor/memory"
	"github.com/cryovisor/cryovisor/vmm"
)

// Probe says what a host lacks, and what to do about it.
func ExampleProbe() {
	host, err := vmm.Probe()
	switch {
	case errors.Is(err, vmm.ErrNotSupported):
		log.Fatal("snapshots can be inspected here, and no machine can run")
	case err != nil:
		log.Fatal(err)
	}
	if host.Lazy != nil {
		fmt.Println("only eager resumes:", host.Lazy)
	}
}

// A flat image of the embedder's runs with its console on the terminal until it switches itself off.
func ExampleNew() {
	image, err := os.Open("unikernel.bin")
	if err != nil {
		log.Fatal(err)
	}
	defer image.Close()
	info, err := image.Stat()
	if err != nil {
		log.Fatal(err)
	}
	vm, err := vmm.New(vmm.Config{
		MemoryBytes: 64 << 20,
		Boot:        vmm.Flat{Image: vmm.File{ReaderAt: image, Size: info.Size()}, Base: 1 << 20, Entry: 1 << 20},
		Hardware:    vmm.Hardware{Console: vmm.Console{In: os.Stdin, Out: os.Stdout}},
	})
	if err != nil {
		log.Fatal(err)
	}
	defer vm.Close()
	if err := vm.Start(); err != nil {
		log.Fatal(err)
	}
	if err := vm.Wait(context.Background()); !errors.Is(err, vmm.ErrPowerOff) {
		log.Fatal(err)
	}
}

// A state is plain data in named sections; together with the guest's memory it is the machine. Package
// lifecycle keeps both in an encrypted snapshot.
func ExampleRestore() {
	freeze := func(ctx context.Context, vm *vmm.VM) ([]vmm.Section, error) {
		if err := vm.Pause(ctx); err != nil {
			return nil, err
		}
		state, err := vm.State()
		if err != nil {
			return nil, err
		}
		return state.Sections(), nil
	}
	thaw := func(sections []vmm.Section, mem *memory.Memory) (*vmm.VM, error) {
		state, err := vmm.ParseState(sections)
		if err != nil {
			return nil, errors.Join(err, mem.Close())
		}
		vm, err := vmm.Restore(state, mem, vmm.Hardware{})
		if err != nil {
			return nil, err // Restore has closed mem
		}
		return vm, vm.Resume()
	}
	_, _ = freeze, thaw
}
