//go:build linux && amd64

package kvm

import (
	"errors"
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// VCPU is a virtual processor and its kvm_run page. Its methods belong to the
// goroutine that runs it, locked to its thread; only Kick and SetImmediateExit
// may be called by others.
type VCPU struct {
	f         file
	id        int
	xsaveSize int

	// mu is between Close, which unmaps page, and calls of other goroutines
	// that write to it. The owner reads page without mu: it makes Close.
	mu   sync.Mutex
	page []byte // the mapping of kvm_run; nil after Close
}

// ID returns the id that CreateVCPU was given.
func (v *VCPU) ID() int { return v.id }

// Close unmaps the kvm_run page and releases the descriptor. It must not be
// called during Run; slices that an Exit returned are invalid after it.
func (v *VCPU) Close() error {
	v.mu.Lock()
	page := v.page
	v.page = nil
	v.mu.Unlock()
	var err error
	if page != nil {
		if e := unix.Munmap(page); e != nil {
			err = &Error{Op: "munmap kvm_run", Err: e}
		}
	}
	return errors.Join(err, v.f.close("vCPU"))
}

// Run enters the guest and returns when it needs something, or with the reason
// ExitIntr when a signal, a kick or SetImmediateExit ended it, or when KVM asks
// to be called again. The runtime's own signals end it too, so ExitIntr alone
// does not mean that someone asked for the vCPU: look at your own flag, and run
// on. The Exit is valid until the next Run.
//
// The result of an ExitIO or ExitMMIO read reaches the guest's registers at the
// beginning of the next Run, also of one that SetImmediateExit ends at once:
// make that Run before reading state.
func (v *VCPU) Run() (Exit, error) {
	if v.page == nil {
		return Exit{}, &Error{Op: "KVM_RUN", Err: ErrClosed}
	}
	e := Exit{page: v.page}
	// Old kernels leave the reason of the last exit in place when KVM_RUN fails.
	e.run().ExitReason = uint32(ExitUnknown)
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, v.f.get(), reqRun, 0)
	e.Reason = ExitReason(e.run().ExitReason)
	switch {
	case errno == 0:
		return e, nil
	case errno == unix.EINTR || errno == unix.EAGAIN:
		e.Reason = ExitIntr
		return e, nil
	case (errno == unix.EFAULT || errno == unix.EHWPOISON) && e.Reason == ExitMemoryFault:
		return e, nil
	}
	return e, &Error{Op: "KVM_RUN", Err: errno}
}

// immediateExit is kvm_run.immediate_exit within the first word of the page.
// There is no atomic store of a byte in Go; or-ing and and-ing the word is one,
// and leaves its neighbour, request_interrupt_window, alone.
const immediateExit = uint32(1) << 8

// SetImmediateExit makes every Run return ExitIntr at once, without entering
// the guest but after completing pending I/O, until it is set to false. It does
// not end a Run that is under way: that is Kick's task.
func (v *VCPU) SetImmediateExit(on bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.setImmediateExit(on)
}

func (v *VCPU) setImmediateExit(on bool) {
	if v.page == nil {
		return
	}
	word := (*uint32)(unsafe.Pointer(unsafe.SliceData(v.page)))
	if on {
		atomic.OrUint32(word, immediateExit)
	} else {
		atomic.AndUint32(word, ^immediateExit)
	}
}

// Kick gets the vCPU out of the guest: it sets immediate_exit, and then signals
// the thread with the given id, the owner's unix.Gettid. A thread that is in
// KVM_RUN leaves it because a signal is pending; one that has not reached
// KVM_RUN finds immediate_exit set. So no kick is lost between the two.
//
// The kicker first stores what it wants in a place of its own, then kicks. The
// owner, when it will run on, first clears with SetImmediateExit(false) and then
// looks at that place: the other way round it would clear a kick unseen.
//
// The signal is SIGURG because a Go program always handles it and never acts on
// it: the runtime preempts goroutines with it, and so must take any number of
// spurious ones (runtime/signal_unix.go, sigPreempt). The handler is installed
// whether or not the program uses os/signal, and nothing has to be blocked,
// registered or restored. Should the thread have ended and its id belong to
// another of this process, the signal is as harmless there.
func (v *VCPU) Kick(tid int) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.page == nil {
		return &Error{Op: "kick", Err: ErrClosed}
	}
	v.setImmediateExit(true)
	if err := unix.Tgkill(unix.Getpid(), tid, unix.SIGURG); err != nil {
		return &Error{Op: "kick: tgkill", Err: err}
	}
	return nil
}
