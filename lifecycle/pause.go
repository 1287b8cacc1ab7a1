package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"time"

	"filippo.io/age"

	"github.com/cryovisor/cryovisor/snapshot"
	"github.com/cryovisor/cryovisor/vmm"
)

// PauseOptions are the choices of a pause.
type PauseOptions struct {
	// Recipients are who can open the snapshot; at least one.
	Recipients []age.Recipient
	// Full stores all of the memory even if the machine was resumed from a
	// snapshot of the same store, so that the new one depends on no other.
	Full bool
	// Workers is how many goroutines compress and encrypt; 0 lets the snapshot
	// package choose.
	Workers int
	// Progress, if not nil, is told how many bytes of guest memory and of disks, of
	// those that are looked at, are done. It is called from one goroutine at a time. Each pass of a Prepare begins anew.
	Progress func(done, total uint64)
	// Extra, if not nil, is called when the machine stands still, and returns
	// sections to be stored with the snapshot: what the caller's own devices have
	// to remember, say. Their names must not begin with "vmm/", nor be "disks".
	Extra func() ([]snapshot.Section, error)
}

// Paused says what a pause did.
type Paused struct {
	snapshot.Info
	// Parent is the snapshot that this one is a diff of, zero for a full one.
	Parent snapshot.ID
	// CandidateBytes is the guest memory that was looked at: all that the machine
	// ever touched, or what it wrote since its resume, the last checkpoint, or the preparation.
	CandidateBytes uint64
	// DiskBytes is what was looked at of the copy-on-write disks.
	DiskBytes uint64
	// PreparedBytes is what of both was written before, by Prepare, while the machine ran.
	PreparedBytes uint64
	// Freeze is how long it took to stop the machine and take everything but its
	// memory; a checkpoint lets it run on then. Total is the time until the snapshot was durable. In a pause, the
	// machine stands still for all of it.
	Freeze, Total time.Duration
}

// ErrResumed is the error of a Pause that was given up because somebody wanted the machine to run on.
var ErrResumed = errors.New("lifecycle: the machine was resumed while it was being stored")

// attempt is a Pause, a Checkpoint or a preparation under way.
type attempt struct {
	ctx    context.Context // of the call
	cancel context.CancelCauseFunc
	// live says that the machine runs meanwhile: there is nothing that Resume would have to take back.
	live bool
	// released is closed when a Pause does nothing more to the VM. It has set it going again if resumed says so.
	released chan struct{}
	resumed  bool
	err      error // of that
}

// Pause stops the machine and stores it. When it returns without an error the
// snapshot is durable and the machine is paused: Close it, or let it run on with
// Resume. With an error nothing is stored, and the machine runs on if it ran
// before (unless the guest has ended: then the error says how). It runs before Pause
// has cleared away what it wrote.
//
// Pauses, checkpoints and preparations wait for each other. Resume, Close or the end of ctx gives one up.
//
// A machine that was resumed from a snapshot is stored as a diff: what it has
// written since, or since the last Checkpoint. store must then be the store of that snapshot, or opts.Full set.
func (m *Machine) Pause(ctx context.Context, store *snapshot.Store, opts PauseOptions) (Paused, error) {
	p, err := m.try(ctx, false, func(ctx context.Context, a *attempt) (Paused, error) {
		began := time.Now()
		s, err := m.newStoring(ctx, store, opts)
		if err != nil {
			close(a.released)
			return Paused{}, err
		}
		return s.pause(ctx, a, began)
	})
	if err != nil {
		return Paused{}, fmt.Errorf("pause: %w", err)
	}
	return p, nil
}

// try makes an attempt, when the one before it has ended.
func (m *Machine) try(ctx context.Context, live bool, do func(context.Context, *attempt) (Paused, error)) (Paused, error) {
	m.pausing.Lock()
	defer m.pausing.Unlock()
	if m.closed {
		return Paused{}, vmm.ErrClosed
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	a := &attempt{ctx: ctx, cancel: cancel, live: live, released: make(chan struct{})}
	m.setAttempt(a)
	defer m.setAttempt(nil)
	p, err := do(ctx, a)
	if cause := context.Cause(ctx); err != nil && cause != nil && !errors.Is(err, cause) {
		err = fmt.Errorf("%w: %w", cause, err)
	}
	return p, err
}

func (m *Machine) setAttempt(a *attempt) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.attempt = a
}

// Resume lets a machine that stands still run: one that Resume, the function, has made, or that was paused. If a Pause
// is under way, that is given up: it returns ErrResumed and leaves no snapshot. Resume does not wait for it to clear away what it
// wrote. Errors: those of VM.Resume.
func (m *Machine) Resume() error {
	a := m.giveUp(ErrResumed)
	if a == nil || a.live {
		return m.VM.Resume()
	}
	<-a.released
	if a.resumed {
		return a.err
	}
	return m.VM.Resume()
}

// giveUp has the attempt under way end with an error, and returns it: nil if there is none. A live one ends only when the
// machine is closed.
func (m *Machine) giveUp(because error) *attempt {
	m.mu.Lock()
	defer m.mu.Unlock()
	if a := m.attempt; a != nil && (!a.live || errors.Is(because, vmm.ErrClosed)) {
		a.cancel(because)
	}
	return m.attempt
}

// pause stops the machine and writes what is still to be written. began is when the caller began.
func (s *storing) pause(ctx context.Context, a *attempt, began time.Time) (Paused, error) {
	vm := s.m.VM
	ran := !vm.Paused()
	if ran {
		if err := vm.Pause(ctx); err != nil {
			a.resumed = ctx.Err() != nil // else it may not have run at all
			close(a.released)
			return Paused{}, errors.Join(err, s.clear())
		}
	}
	err := s.writeStopped(ctx, began)
	if err == nil {
		err = s.commit(ctx)
	}
	if err == nil {
		s.paused.Total = time.Since(began)
		close(a.released)
		s.m.ledger.end(s.since)
		return s.paused, nil
	}
	if ran {
		a.resumed, a.err = true, vm.Resume()
	}
	close(a.released)
	// Whoever waits for that goes first. To free what was written takes long system calls, and the scheduler notices only
	// after 10 to 20 ms that a processor is in one.
	runtime.Gosched()
	return Paused{}, errors.Join(err, a.err, s.clear())
}

// writeStopped writes what is still to be written of a machine that stands still.
func (s *storing) writeStopped(ctx context.Context, began time.Time) error {
	launches := s.m.VM.Launches()
	contents, err := s.stop(ctx)
	if err != nil {
		return err
	}
	s.paused.Freeze = time.Since(began)
	if !s.shared {
		contents.Memory.View = s.m.VM.Memory().View
	}
	if err := s.writer.Write(ctx, contents); err != nil {
		return err
	}
	if s.m.VM.Launches() != launches {
		return ErrResumed // by VM.Resume, and what was read is of no moment
	}
	return nil
}
