package lifecycle

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"time"

	"filippo.io/age"

	"github.com/cryovisor/cryovisor/internal/catalog"
	"github.com/cryovisor/cryovisor/snapshot"
)

// Pause stores a sandbox that runs, and ends its machine. With an error it runs on. Errors: a *StateError for one that is paused; *LimitError.
func (m *Manager) Pause(ctx context.Context, id string) (SandboxInfo, error) {
	e, err := m.transition(ctx, id)
	if err != nil {
		return SandboxInfo{}, err
	}
	defer e.leave()
	if e.live == nil {
		return e.info(), &StateError{ID: id, Op: "pause", State: e.info().State}
	}
	return m.pause(ctx, e, ReasonRequest)
}

// pause is Pause for who has the turn, of a sandbox that runs.
func (m *Manager) pause(ctx context.Context, e *entry, reason Reason) (SandboxInfo, error) {
	began := time.Now()
	if reason == ReasonRequest {
		if err := m.mayPause(); err != nil {
			return e.info(), err
		}
	}
	ctx, end := e.begin(ctx)
	defer end()
	e.mu.Lock()
	e.state, e.yields = StatePausing, reason == ReasonTimeout || reason == ReasonIdle
	e.mu.Unlock()
	row, err := m.storePause(ctx, e)
	m.meter.pause(time.Since(began), reason, err)
	if err != nil {
		e.setState(StateRunning)
		err = fmt.Errorf("sandbox %s: %w", e.id, because(ctx, err))
		m.tell(e, StateRunning, reason, time.Since(began), err)
		m.plan(e)
		return e.info(), err
	}
	old := e.row.Snapshot
	e.become(StatePaused, row)
	m.closeMachine(e)
	err = m.letGo(context.WithoutCancel(ctx), old)
	m.tell(e, StateRunning, reason, time.Since(began), err)
	m.plan(e)
	return e.info(), nil
}

// mayPause says whether there is room for one more paused sandbox.
func (m *Manager) mayPause() error {
	if err := m.mayStore(); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if limit := m.opts.Limits.Paused; limit > 0 && len(m.sandboxes.order)-m.running >= limit {
		return &LimitError{What: "paused sandboxes", Limit: uint64(limit)}
	}
	return nil
}

// mayStore says whether there is room for one more snapshot.
func (m *Manager) mayStore() error {
	if limit := m.opts.Limits.StoredBytes; limit > 0 && m.stored.total() >= limit {
		return &LimitError{What: "stored bytes", Limit: limit}
	}
	return nil
}

// storePause makes a snapshot and records it. Until the record is on stable storage, the sandbox runs; with an error it still does.
func (m *Manager) storePause(ctx context.Context, e *entry) (catalog.Sandbox, error) {
	l := e.live
	if err := m.needIdentity(ctx, e); err != nil {
		return catalog.Sandbox{}, err
	}
	m.learn(ctx, l)
	paused, err := l.pause(ctx, m.store)
	if err != nil {
		return catalog.Sandbox{}, err
	}
	row := e.row
	row.Running, row.Paused, row.Snapshot = false, m.clock.Now().UTC(), paused.ID.String()
	row.StoredBytes, row.LastError = paused.StoredBytes, ""
	row.Pauses++
	if err = m.stored.hold(paused.ID); err == nil {
		err = m.recordPause(context.WithoutCancel(ctx), e, row, paused.ID)
	}
	if err != nil && l.machine.VM.Paused() {
		err = errors.Join(err, l.machine.Resume())
	}
	return row, err
}

// recordPause writes the record of a pause. With an error the snapshot is deleted, unless it may be what the record says.
func (m *Manager) recordPause(ctx context.Context, e *entry, row catalog.Sandbox, id snapshot.ID) error {
	err := e.commit()
	if err != nil {
		return errors.Join(err, m.stored.letGo(ctx, id))
	}
	if err = m.put(ctx, e, row); err == nil {
		e.live.fresh = false
		return nil
	}
	if undo := m.catalog.PutSandbox(ctx, e.row, nil); undo != nil {
		return errors.Join(err, undo)
	}
	return errors.Join(err, m.stored.letGo(ctx, id))
}

// commit ends the time in which a pause can be taken back: ErrResumed if it was.
func (e *entry) commit() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.takenBack {
		return ErrResumed
	}
	e.yields = false
	return nil
}

// put records a sandbox, with its key if that is new.
func (m *Manager) put(ctx context.Context, e *entry, row catalog.Sandbox) error {
	if !e.live.fresh {
		return m.catalog.PutSandbox(ctx, row, nil)
	}
	return m.withSealed(ctx, e.id, e.live.identity, func(sealed []byte) error {
		return m.catalog.PutSandbox(ctx, row, sealed)
	})
}

// needIdentity sees to it that a sandbox that runs has a key for its snapshots.
func (m *Manager) needIdentity(ctx context.Context, e *entry) (err error) {
	l := e.live
	if l.identity != nil {
		return nil
	}
	if e.row.Snapshot != "" {
		if l.identity, err = m.identity(ctx, e.id); !errors.Is(err, errNoSecret) {
			return err
		}
	}
	l.identity, err = age.GenerateX25519Identity()
	l.fresh = err == nil
	return err
}

// letGo deletes a snapshot that a record no longer names; "" is none.
func (m *Manager) letGo(ctx context.Context, id string) error {
	if id == "" {
		return nil
	}
	parsed, err := snapshot.ParseID(id)
	if err != nil {
		return err
	}
	return m.stored.letGo(ctx, parsed)
}

// Connect has a sandbox run: one that does gets a longer timeout, never a shorter one; one that is paused is resumed; for one that is being
// paused it waits, or, if that is because of a timeout, takes the pause back. resumed says whether it was paused.
func (m *Manager) Connect(ctx context.Context, id string, opts ConnectOptions) (info SandboxInfo, resumed bool, err error) {
	if opts.Timeout < 0 {
		return SandboxInfo{}, false, fmt.Errorf("%w: a timeout of %v", ErrInvalid, opts.Timeout)
	}
	for {
		e, err := m.find(id)
		if err != nil {
			return SandboxInfo{}, false, err
		}
		if m.keepRunning(e, opts.Timeout) {
			m.plan(e)
			return e.info(), false, nil
		}
		if e, err = m.transition(ctx, id); err != nil {
			return SandboxInfo{}, false, err
		}
		if e.live != nil { // somebody else was first, or a pause has failed
			e.leave()
			continue
		}
		info, err := m.resume(ctx, e, opts.Timeout)
		e.leave()
		return info, err == nil, err
	}
}

// keepRunning extends the timeout of a sandbox that runs, and takes a pause by timeout back. It says whether it runs.
func (m *Manager) keepRunning(e *entry, timeout time.Duration) bool {
	now := m.clock.Now()
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.over() != nil || e.state != StateRunning && (e.state != StatePausing || !e.yields) {
		return false
	}
	e.extend(now.Add(cmp.Or(timeout, e.row.Timeout)), false)
	e.active = now
	e.stopPreparing(now, m.ahead(e.row.MemoryBytes))
	if e.state == StateRunning {
		return true
	}
	// A pause that has not begun, or is just through, sees takenBack. One that is under way is given up within a millisecond; mu is held for
	// that so that it can't be another's. The caller waits until what it wrote is cleared away.
	e.takenBack = true
	_ = e.live.machine.Resume()
	return false
}

// resume has a paused sandbox, whose turn the caller has, run.
func (m *Manager) resume(ctx context.Context, e *entry, timeout time.Duration) (SandboxInfo, error) {
	began := time.Now()
	ctx, end := e.begin(ctx)
	defer end()
	e.setState(StateResuming)
	row := e.row
	row.Running, row.Started, row.LastError = true, m.clock.Now().UTC(), ""
	row.Timeout = cmp.Or(timeout, row.Timeout)
	from, err := m.fromPause(ctx, e)
	if err == nil {
		err = m.launch(ctx, e, from, row)
	}
	m.meter.resume(time.Since(began), err)
	if err != nil {
		e.setState(StatePaused)
		err = fmt.Errorf("resume sandbox %s: %w", e.id, because(ctx, err))
	}
	m.tell(e, StatePaused, ReasonRequest, time.Since(began), err)
	m.plan(e)
	return e.info(), err
}

// fromPause is a sandbox's last pause.
func (m *Manager) fromPause(ctx context.Context, e *entry) (origin, error) {
	id, err := snapshot.ParseID(e.row.Snapshot)
	if err != nil {
		return origin{}, err
	}
	identity, err := m.identity(ctx, e.id)
	if err != nil {
		return origin{}, err
	}
	return origin{template: m.templateOf(e), snapshot: id, resume: func(ctx context.Context, opts ResumeOptions) (*Machine, error) {
		opts.Identities = []age.Identity{identity}
		return Resume(ctx, m.store, id, opts)
	}}, nil
}

// Resume is Connect for a sandbox that must be paused: a *StateError for one that runs.
func (m *Manager) Resume(ctx context.Context, id string, opts ConnectOptions) (SandboxInfo, error) {
	if opts.Timeout < 0 {
		return SandboxInfo{}, fmt.Errorf("%w: a timeout of %v", ErrInvalid, opts.Timeout)
	}
	e, err := m.transition(ctx, id)
	if err != nil {
		return SandboxInfo{}, err
	}
	defer e.leave()
	if e.live != nil {
		return e.info(), &StateError{ID: id, Op: "resume", State: e.info().State}
	}
	return m.resume(ctx, e, opts.Timeout)
}

// Kill ends a sandbox and deletes all that there is of it, its keys first. What forks and checkpoints of it need stays. A transition under way is given up.
func (m *Manager) Kill(ctx context.Context, id string) error {
	began := time.Now()
	ctx, done, err := m.call(ctx)
	if err != nil {
		return err
	}
	defer done()
	e, err := m.find(id)
	if err != nil {
		return err
	}
	e.interrupt(fmt.Errorf("it was killed: %w", ErrNotFound))
	if err := e.enter(ctx); err != nil {
		return err
	}
	defer e.leave()
	err = because(ctx, m.delete(ctx, e, ReasonRequest))
	m.meter.kill(time.Since(began), err)
	return err
}

// delete deletes a sandbox, whose turn the caller has. With an error it is as it was; what is left behind when it is gone from the catalog is collected when
// the directory is opened again, and said in the event.
func (m *Manager) delete(ctx context.Context, e *entry, reason Reason) error {
	if err := m.catalog.DeleteSandbox(ctx, e.id); err != nil {
		if e.live != nil {
			e.live.fresh = e.live.identity != nil // the catalog may not have it any more
		}
		return err
	}
	ctx = context.WithoutCancel(ctx)
	m.mu.Lock()
	m.sandboxes.remove(e)
	m.mu.Unlock()
	e.mu.Lock()
	from, snapshotID := e.state, e.row.Snapshot
	e.state, e.deleted = StateKilled, true
	e.mu.Unlock()
	m.alarms.set(e, time.Time{})
	var errs []error
	e.endings.Wait()
	if e.live != nil {
		errs = append(errs, m.discardMachine(e))
	}
	if snapshotID != "" {
		errs = append(errs, m.catalog.Forget(ctx), m.letGo(ctx, snapshotID))
	}
	m.tell(e, from, reason, 0, errors.Join(errs...))
	return nil
}

// SetTimeout sets the timeout of a sandbox that runs, from now, longer or shorter. Errors: a *StateError for one that is paused.
func (m *Manager) SetTimeout(id string, d time.Duration) error { return m.changeTimeout(id, d, true) }

// Extend has the timeout of a sandbox that runs be at least d from now. Errors: a *StateError for one that is paused.
func (m *Manager) Extend(id string, d time.Duration) error { return m.changeTimeout(id, d, false) }

func (m *Manager) changeTimeout(id string, d time.Duration, shorten bool) error {
	if d < 0 {
		return fmt.Errorf("%w: a timeout of %v", ErrInvalid, d)
	}
	e, err := m.find(id)
	if err != nil {
		return err
	}
	now := m.clock.Now()
	e.mu.Lock()
	if err := e.over(); err != nil {
		e.mu.Unlock()
		return err
	}
	if e.state != StateRunning && e.state != StatePausing {
		defer e.mu.Unlock()
		return &StateError{ID: id, Op: "change the timeout of", State: e.state}
	}
	e.extend(now.Add(d), shorten)
	e.active = now
	e.stopPreparing(now, m.ahead(e.row.MemoryBytes))
	e.mu.Unlock()
	m.plan(e)
	return nil
}

// Touch reports activity of a sandbox: its IdleTimeout begins anew. For one that is paused it does nothing.
func (m *Manager) Touch(id string) error {
	e, err := m.find(id)
	if err != nil {
		return err
	}
	now := m.clock.Now()
	e.mu.Lock()
	if err := e.over(); err != nil {
		e.mu.Unlock()
		return err
	}
	e.active = now
	e.stopPreparing(now, m.ahead(e.row.MemoryBytes))
	e.mu.Unlock()
	m.plan(e)
	return nil
}
