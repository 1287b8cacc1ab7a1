package lifecycle

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"time"

	"github.com/cryovisor/cryovisor/internal/catalog"
	"github.com/cryovisor/cryovisor/snapshot"
)

// origin is what a sandbox's machine is made of.
type origin struct {
	template TemplateInfo
	snapshot snapshot.ID
	record   *template // whose working set is to be learned; nil if it needs none
	resume   func(context.Context, ResumeOptions) (*Machine, error)
}

// launch makes the machine of a sandbox that has none, and lets it run. row is what the catalog is to have then, and is on stable storage before the guest
// goes on. The caller has the turn; with an error the sandbox is as it was.
func (m *Manager) launch(ctx context.Context, e *entry, from origin, row catalog.Sandbox) error {
	if err := m.takeSlot(); err != nil {
		return err
	}
	if m.opts.Connect != nil { // whose sockets and taps the last machine may still have
		e.connected.Wait()
	}
	if err := m.stored.hold(from.snapshot); err != nil {
		m.returnSlot()
		return err
	}
	l := &live{pins: []snapshot.ID{from.snapshot}, template: from.record}
	err := m.assemble(ctx, e, l, from)
	if err == nil {
		err = m.enliven(ctx, e, l, row)
	}
	if err != nil {
		m.returnSlot()
		return errors.Join(err, m.dismantle(l, (*Machine).Discard))
	}
	m.work.Go(func() { m.watchEnd(e, l) })
	return nil
}

// assemble makes the machine.
func (m *Manager) assemble(ctx context.Context, e *entry, l *live, from origin) error {
	if m.opts.Connect != nil {
		var err error
		if l.connection, err = m.opts.Connect(ctx, Start{Sandbox: e.info(), Template: from.template}); err != nil {
			return fmt.Errorf("connect sandbox %s: %w", e.id, err)
		}
	}
	l.console = &console{next: l.connection.Hardware.Console.Out}
	hardware := l.connection.Hardware
	hardware.AdvanceClock = true
	hardware.Console.Out = l.console
	var err error
	l.machine, err = from.resume(ctx, ResumeOptions{
		Hardware: hardware,
		Disks:    Disks{Dir: m.disks()},
		Prefetch: m.opts.Prefetch,
		Pool:     m.shelf.pool(e.row.MemoryBytes),
	})
	if err == nil {
		l.console.restore(l.machine.Section)
	}
	return err
}

// enliven records that the sandbox runs, and lets it.
func (m *Manager) enliven(ctx context.Context, e *entry, l *live, row catalog.Sandbox) error {
	if err := m.catalog.PutSandbox(ctx, row, nil); err != nil {
		return err
	}
	now := m.clock.Now()
	e.mu.Lock()
	before := e.row
	e.row, e.live = row, l
	e.deadline, e.active = now.Add(row.Timeout), now
	e.retry, e.failures, e.prepared = time.Time{}, 0, time.Time{}
	l.watched = watched{at: now}
	e.mu.Unlock()
	err := l.machine.Resume()
	e.mu.Lock()
	defer e.mu.Unlock()
	if err == nil {
		e.state = StateRunning
		return nil
	}
	e.row, e.live = before, nil
	if before.Snapshot == "" {
		return errors.Join(err, m.catalog.DeleteSandbox(context.WithoutCancel(ctx), e.id))
	}
	return errors.Join(err, m.catalog.PutSandbox(context.WithoutCancel(ctx), before, nil))
}

// takeSlot reserves a place for a sandbox that runs.
func (m *Manager) takeSlot() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return ErrManagerClosed
	}
	if limit := m.opts.Limits.Running; limit > 0 && m.running >= limit {
		return &LimitError{What: "running sandboxes", Limit: uint64(limit)}
	}
	m.running++
	return nil
}

func (m *Manager) returnSlot() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.running--
}

// discardMachine ends the machine of a sandbox, whose turn the caller has, with all that it has changed since its last pause.
func (m *Manager) discardMachine(e *entry) error { return m.dismantle(m.detach(e), (*Machine).Discard) }

// closeMachine ends the machine of a sandbox, whose turn the caller has and of which a snapshot has everything, behind the caller's back: KVM takes
// some 20 ms to destroy a VM. The sandbox's next machine waits for the sockets and taps only, which are free before. What can't be given back is when the
// process ends, or the directory is opened again.
func (m *Manager) closeMachine(e *entry) {
	l := m.detach(e)
	e.endings.Add(1)
	e.connected.Add(1)
	m.work.Go(func() {
		defer e.endings.Done()
		_ = m.disconnect(l)
		e.connected.Done()
		_ = m.dismantle(l, (*Machine).Close)
	})
}

// disconnect is the first part of dismantle, for a machine that is complete: what the embedder has given it is free.
func (m *Manager) disconnect(l *live) error {
	err := errors.Join(l.dropPreparation(), l.machine.disconnect())
	if l.connection.Close != nil {
		err = errors.Join(err, l.connection.Close())
		l.connection.Close = nil
	}
	return err
}

// detach takes the machine from a sandbox, which does not run any more.
func (m *Manager) detach(e *entry) *live {
	defer m.returnSlot()
	e.mu.Lock()
	defer e.mu.Unlock()
	l := e.live
	e.live = nil
	return l
}

// dismantle gives back all that a machine, which may be half made, has taken.
func (m *Manager) dismantle(l *live, how func(*Machine) error) error {
	errs := []error{l.dropPreparation()}
	if l.machine != nil {
		errs = append(errs, how(l.machine))
	}
	if l.connection.Close != nil {
		errs = append(errs, l.connection.Close())
	}
	errs = append(errs, m.stored.letGo(context.WithoutCancel(m.ctx), l.pins...))
	return errors.Join(errs...)
}

// watchEnd waits until a guest has ended, by itself or because its machine is no longer needed, and sees to it that this is recorded.
func (m *Manager) watchEnd(e *entry, l *live) {
	<-l.machine.VM.Ended()
	for again := m.noteEnd(e, l); !again.IsZero(); again = m.noteEnd(e, l) {
		rings, stop := m.clock.NewTimer(again)
		select {
		case <-rings:
		case <-m.ctx.Done():
		}
		stop()
	}
}

// noteEnd does what is due when a guest has ended, and says when to try again; zero: no more.
func (m *Manager) noteEnd(e *entry, l *live) (again time.Time) {
	if m.ctx.Err() != nil || e.enter(m.ctx) != nil {
		return time.Time{}
	}
	defer e.leave()
	if e.live != l {
		return time.Time{} // it was ended
	}
	how := l.machine.VM.Wait(m.ctx)
	if err := m.guestEnded(context.WithoutCancel(m.ctx), e, how); err != nil {
		return m.failed(e, err)
	}
	m.plan(e)
	return time.Time{}
}

// guestEnded brings a sandbox whose guest has ended back to its last pause, from where it can be connected to, or deletes it if there was none.
func (m *Manager) guestEnded(ctx context.Context, e *entry, how error) error {
	if e.row.Snapshot == "" {
		return m.delete(ctx, e, ReasonEnded)
	}
	row := e.row
	row.Running, row.Paused, row.LastError = false, m.clock.Now().UTC(), "the guest has ended: "+how.Error()
	if err := m.catalog.PutSandbox(ctx, row, nil); err != nil {
		return err
	}
	from := e.become(StatePaused, row)
	err := m.discardMachine(e)
	m.tell(e, from, ReasonEnded, 0, err)
	return nil
}

// become changes the state and the record together.
func (e *entry) become(s State, row catalog.Sandbox) (from State) {
	e.mu.Lock()
	defer e.mu.Unlock()
	from, e.state, e.row = e.state, s, row
	return from
}

// newID returns 20 lower-case letters and digits, of 100 random bits.
func newID() string {
	const letters = "abcdefghijklmnopqrstuvwxyz234567"
	b := make([]byte, 20)
	_, _ = rand.Read(b) // never fails, by its documentation
	for i := range b {
		b[i] = letters[b[i]%32]
	}
	return string(b)
}
