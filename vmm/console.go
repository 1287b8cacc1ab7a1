//go:build linux && amd64

package vmm

import (
	"context"
	"io"
	"sync"
	"time"

	"github.com/cryovisor/cryovisor/internal/serial"
)

// readInput gives the console's input to the guest. It may end or fail; the guest
// runs on without it.
func (vm *VM) readInput(ctx context.Context, in io.Reader) { _ = vm.serial.Pump(ctx, in) }

// startBlockingInput reads an input that can't be interrupted as long as the VM
// lives. Nobody can wait for it: it may be in a Read that never returns.
func (vm *VM) startBlockingInput() {
	if in := vm.hw.Console.In; in != nil && !serial.Interruptible(in) {
		go vm.readInput(vm.life, in)
	}
}

// startInput reads any other input while the vCPUs run: what is read while the
// machine is paused would be missing in a state that was taken before. The caller
// holds mu.
func (vm *VM) startInput() {
	in := vm.hw.Console.In
	if in == nil || vm.stopInput != nil || !serial.Interruptible(in) {
		return
	}
	ctx, cancel := context.WithCancel(vm.life)
	use := &inputUse{in: in.(deadlineReader)}
	done := make(chan struct{})
	go func() {
		defer close(done)
		vm.readInput(ctx, use)
	}()
	vm.stopInput = func() {
		cancel()
		<-done
		use.end()
		vm.stopInput = nil
	}
}

// endInput undoes startInput. The caller holds mu.
func (vm *VM) endInput() {
	if vm.stopInput != nil {
		vm.stopInput()
	}
}

// deadlineReader is what serial.Interruptible finds.
type deadlineReader interface {
	io.Reader
	SetReadDeadline(time.Time) error
}

// inputUse is the use of an input by one Pump. A Pump that is cancelled sets the
// deadline that interrupts its Read from another goroutine, and may have returned
// by then; so late, the deadline would interrupt the next user of the input.
type inputUse struct {
	in deadlineReader

	mu    sync.Mutex
	ended bool
}

func (u *inputUse) Read(p []byte) (int, error) { return u.in.Read(p) }

func (u *inputUse) SetReadDeadline(t time.Time) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.ended {
		return nil
	}
	return u.in.SetReadDeadline(t)
}

// end waits for a deadline that is being set, and lets no later one through.
func (u *inputUse) end() {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.ended = true
}
