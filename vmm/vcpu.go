//go:build linux && amd64

package vmm

import (
	"runtime"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/cryovisor/cryovisor/internal/kvm"
)

// vcpu is a virtual processor and the goroutine, locked to its thread, that
// makes all of its system calls: KVM wants a vCPU's ioctls from one thread.
type vcpu struct {
	id   int
	vm   *VM
	cpu  *kvm.VCPU
	tid  int           // the thread's id
	cmds chan func()   // run on the vCPU's thread, one at a time
	dead chan struct{} // closed when the thread has ended
	stop atomic.Bool

	// Of the vCPU's thread only.
	cpuid []CPUIDEntry // as it was set
	msrs  []uint32     // registers to save; nil until they are known
}

// newVCPU creates vCPU id and its thread.
func (vm *VM) newVCPU(id int) (*vcpu, error) {
	c := &vcpu{id: id, vm: vm, cmds: make(chan func()), dead: make(chan struct{})}
	created := make(chan error)
	go c.serve(created)
	if err := <-created; err != nil {
		return nil, err
	}
	return c, nil
}

func (c *vcpu) serve(created chan<- error) {
	defer close(c.dead)
	// Never unlocked: the thread ends with the goroutine, so that no other
	// goroutine inherits a thread which a late kick may still signal.
	runtime.LockOSThread()
	c.tid = unix.Gettid()
	var err error
	c.cpu, err = c.vm.kvm.CreateVCPU(c.id)
	created <- err
	if err != nil {
		return
	}
	for f := range c.cmds {
		f()
	}
	c.cpu.Close()
}

// do runs f on the vCPU's thread and returns its result. The vCPU must not be
// running the guest.
func (c *vcpu) do(f func() error) error {
	done := make(chan error, 1)
	c.cmds <- func() { done <- f() }
	return <-done
}

// arm takes back an earlier kick. No vCPU may be running: a kick that comes
// after arm is not lost, whether the vCPU has entered the guest by then or not.
func (c *vcpu) arm() {
	c.stop.Store(false)
	c.cpu.SetImmediateExit(false)
}

// kick makes run return soon.
func (c *vcpu) kick() {
	c.stop.Store(true)
	// It fails only when the vCPU has been closed, which is stopped enough.
	_ = c.cpu.Kick(c.tid)
}

// run runs the guest until a kick (nil) or its end (the reason).
func (c *vcpu) run() error {
	for !c.stop.Load() {
		if _, err := c.enter(); err != nil {
			return err
		}
	}
	return c.settle()
}

// settle finishes an access to a device that the guest is in the middle of: its
// result reaches the registers only on the next KVM_RUN, which returns at once
// because the kick has set immediate_exit. A string instruction can ask for
// several accesses.
func (c *vcpu) settle() error {
	for {
		interrupted, err := c.enter()
		if interrupted || err != nil {
			return err
		}
	}
}

// enter runs the guest once and serves what it stopped for.
func (c *vcpu) enter() (interrupted bool, err error) {
	exit, err := c.cpu.Run()
	if err != nil {
		return false, c.failed(&ExitError{Kind: ErrRun, Cause: err})
	}
	if exit.Reason == kvm.ExitIntr {
		return true, nil
	}
	return false, c.serveExit(exit)
}
