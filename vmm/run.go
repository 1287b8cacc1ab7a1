//go:build linux && amd64

package vmm

import (
	"context"
	"fmt"
	"sync"
)

// phase is where a VM is in the diagram of the package comment.
type phase int

const (
	phaseCreated phase = iota
	phaseRunning
	phasePaused
	phaseClosed
)

func (p phase) String() string {
	return [...]string{"created", "running", "paused", "closed"}[p]
}

// Start runs a VM that New made. It returns at once.
func (vm *VM) Start() error { return vm.launchFrom(phaseCreated) }

// Resume lets a paused VM, or one that Restore made, run on. It returns at once.
func (vm *VM) Resume() error { return vm.launchFrom(phasePaused) }

// Launches is how many times the VM was set going: by Start and Resume, and by a Pause that failed. As long as it stays the
// same, the memory and the disks of a paused VM do not change by its doing.
func (vm *VM) Launches() uint64 {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	return vm.launches
}

func (vm *VM) launchFrom(want phase) error {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	if err := vm.require(want); err != nil {
		return err
	}
	vm.launch()
	return nil
}

// require fails unless the VM is in the phase wanted and has not ended.
func (vm *VM) require(want phase) error {
	if vm.phase == phaseClosed {
		return ErrClosed
	}
	if vm.hasEnded() {
		return fmt.Errorf("%w: it has ended: %w", ErrRunState, vm.exit)
	}
	if vm.phase != want {
		return fmt.Errorf("%w: it is %v, not %v", ErrRunState, vm.phase, want)
	}
	return nil
}

func (vm *VM) hasEnded() bool {
	select {
	case <-vm.ended:
		return true
	default:
		return false
	}
}

// launch sets every vCPU running. The caller holds mu; no vCPU runs.
func (vm *VM) launch() {
	vm.launches++
	vm.startInput()
	if err := vm.resumeDevices(); err != nil {
		vm.end(&ExitError{Kind: ErrRun, VCPU: -1, Cause: err})
	}
	for _, c := range vm.vcpus {
		c.arm()
	}
	var wg sync.WaitGroup
	for _, c := range vm.vcpus {
		wg.Add(1)
		c.cmds <- func() {
			defer wg.Done()
			if err := c.run(); err != nil {
				vm.end(err)
			}
		}
	}
	stopped := make(chan struct{})
	go func() {
		wg.Wait()
		close(stopped)
	}()
	vm.stopped = stopped
	vm.phase = phaseRunning
	// The kicks of an end that came before the arming above are lost; those of one
	// that comes after this test are not.
	if vm.hasEnded() {
		vm.halt()
	}
}

// halt tells every vCPU to stop between two instructions; stopped is closed
// when all have.
func (vm *VM) halt() {
	for _, c := range vm.vcpus {
		c.kick()
	}
}

// Pause stops the VM between two instructions of each vCPU, with no access to a
// device half done. When ctx ends first, Pause returns its error and the VM runs
// on. A VM that ends while it is being paused stays ended, and Pause says so: the
// error is an ErrRunState and what Wait returns.
func (vm *VM) Pause(ctx context.Context) error {
	vm.mu.Lock()
	if err := vm.require(phaseRunning); err != nil {
		vm.mu.Unlock()
		return err
	}
	if err := ctx.Err(); err != nil {
		vm.mu.Unlock()
		return err
	}
	vm.halt()
	if err := vm.awaitStopped(ctx); err != nil {
		// A vCPU can be held by guest memory that is still being fetched. The
		// lock is handed on to whoever sets the others going again.
		go func() {
			defer vm.mu.Unlock()
			<-vm.stopped
			if !vm.hasEnded() {
				vm.launch()
			}
		}()
		return err
	}
	defer vm.mu.Unlock()
	if err := vm.quiesce(ctx); err != nil {
		if !vm.hasEnded() {
			vm.launch()
		}
		return err
	}
	vm.endInput()
	vm.phase = phasePaused
	if err := vm.require(phasePaused); err != nil {
		return err
	}
	for _, c := range vm.vcpus {
		if err := c.do(c.tellStopped); err != nil {
			vm.launch()
			return err
		}
	}
	return nil
}

// Paused says whether the VM is paused: by Pause, or since Restore.
func (vm *VM) Paused() bool {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	return vm.phase == phasePaused
}

// awaitStopped waits until no vCPU runs and the console has taken what they
// wrote, which is no part of the machine's state.
func (vm *VM) awaitStopped(ctx context.Context) error {
	select {
	case <-vm.stopped:
	case <-ctx.Done():
		return ctx.Err()
	}
	flush, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(vm.life, cancel)()
	// Its other errors are about a console that failed, which holds no guest up.
	_ = vm.serial.Flush(flush)
	return ctx.Err()
}

// end records how the guest ended, the first time, and halts the vCPUs. It is
// called on vCPU threads too, so it waits for nothing and takes no lock.
func (vm *VM) end(err error) {
	vm.endOnce.Do(func() {
		vm.exit = err
		close(vm.ended)
	})
	vm.halt()
}

// Wait returns when the guest has ended, with the reason: an ExitError or
// EmulationError, found with errors.Is as ErrPowerOff, ErrReset, ErrTripleFault,
// ErrEmulation, ErrGuestMemory or ErrRun; ErrClosed when the VM was closed
// before; or ctx's error.
func (vm *VM) Wait(ctx context.Context) error {
	select {
	case <-vm.ended:
	case <-ctx.Done():
		if !vm.hasEnded() {
			return ctx.Err()
		}
	}
	return vm.exit
}

// Ended is closed when the guest has ended; Wait then returns at once.
func (vm *VM) Ended() <-chan struct{} { return vm.ended }
