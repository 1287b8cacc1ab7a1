package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"filippo.io/age"

	"github.com/cryovisor/cryovisor/internal/catalog"
	"github.com/cryovisor/cryovisor/snapshot"
)

// entry is a sandbox as a Manager has it. A transition is made by who has the turn; everybody may look, with mu held. Manager.mu is never
// taken while an entry's is held.
type entry struct {
	id        string
	created   int64 // ns since 1970
	retention time.Duration
	turn      chan struct{} // holds a value while somebody has the turn
	// Machines that are ending behind a pause's back, and those of them that still have sockets and taps. Added to, and waited for, by who
	// has the turn.
	endings, connected sync.WaitGroup

	mu      sync.Mutex
	row     catalog.Sandbox // as the catalog has it
	state   State
	live    *live // what runs; nil if it is paused. Only who has the turn changes it
	deleted bool
	ending  bool // its time is up, and it is about to be killed: nothing extends it any more

	deadline time.Time // when its timeout is reached, while it runs
	active   time.Time // when it was active last
	retry    time.Time // nothing is done by itself before
	failures int       // of pauses by timeout, since one succeeded
	prepared time.Time // the end for which a pause was prepared, or was tried to be

	// Of the transition under way.
	cancel    context.CancelCauseFunc // nil if there is none
	preparing bool                    // it is the preparation of a pause
	yields    bool                    // it is a pause that Connect may take back
	takenBack bool
}

// live is the running part of a sandbox.
type live struct {
	machine     *Machine
	connection  Connection
	console     *console
	identity    *age.X25519Identity // to which its snapshots are encrypted; nil until there is one
	fresh       bool                // the catalog does not have the identity yet
	pins        []snapshot.ID       // snapshots that the machine reads from
	template    *template           // what it was made of, for the working set; nil if that does not need one
	preparation *Preparation
	watched     watched
}

func newEntry(row catalog.Sandbox, state State, retention time.Duration) *entry {
	return &entry{
		id: row.ID, created: row.Created.UnixNano(), retention: retention, turn: make(chan struct{}, 1), row: row, state: state,
	}
}

// enter waits for the turn. Errors: ErrNotFound if the sandbox is deleted by then, or that of ctx.
func (e *entry) enter(ctx context.Context) error {
	select {
	case e.turn <- struct{}{}:
	default:
		select {
		case e.turn <- struct{}{}:
		case <-ctx.Done():
			return fmt.Errorf("wait for what is being done with sandbox %s: %w", e.id, context.Cause(ctx))
		}
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.deleted {
		<-e.turn
		return fmt.Errorf("sandbox %q: %w", e.id, ErrNotFound)
	}
	return nil
}

func (e *entry) leave() { <-e.turn }

// interrupt has the transition under way, if there is one, end with an error.
func (e *entry) interrupt(cause error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.cancel != nil {
		e.cancel(cause)
	}
}

// begin makes ctx one that interrupt ends. end must be called.
func (e *entry) begin(ctx context.Context) (begun context.Context, end func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	e.mu.Lock()
	defer e.mu.Unlock()
	e.cancel = cancel
	return ctx, func() {
		e.mu.Lock()
		defer e.mu.Unlock()
		e.cancel, e.preparing, e.yields, e.takenBack = nil, false, false, false
		cancel(nil)
	}
}

// because has the error of what ctx, of begin, has ended say why: that a sandbox was killed, not that something was canceled.
func because(ctx context.Context, err error) error {
	cause := context.Cause(ctx)
	if err == nil || cause == nil || errors.Is(err, cause) {
		return err
	}
	return fmt.Errorf("%w: %w", cause, err)
}

func (e *entry) setState(s State) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.state = s
}

// end is when the timeout is reached: by its deadline or because nothing happens. idle says that it is the latter. The caller holds mu.
func (e *entry) end() (at time.Time, idle bool) {
	if d := e.row.IdleTimeout; d > 0 {
		if at := e.active.Add(d); at.Before(e.deadline) {
			return at, true
		}
	}
	return e.deadline, false
}

// timeUp says whether the timeout is reached. If so, that is settled: from then on Connect takes a pause back, or finds the sandbox gone.
func (e *entry) timeUp(now time.Time) (reason Reason, up bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	at, idle := e.end()
	if now.Before(at) {
		return "", false
	}
	if e.row.OnTimeout == string(ActionPause) {
		e.state, e.yields = StatePausing, true
	} else {
		e.ending = true
	}
	if idle {
		return ReasonIdle, true
	}
	return ReasonTimeout, true
}

// over is ErrNotFound for a sandbox that is gone, or about to be. The caller holds mu.
func (e *entry) over() error {
	if e.deleted || e.ending {
		return fmt.Errorf("sandbox %q: %w", e.id, ErrNotFound)
	}
	return nil
}

// extend moves the deadline; it is moved forward only, unless back says so. The caller holds mu.
func (e *entry) extend(to time.Time, back bool) {
	if back || to.After(e.deadline) {
		e.deadline = to
	}
	e.retry, e.failures = time.Time{}, 0
}

func (e *entry) info() SandboxInfo {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.infoLocked()
}

func (e *entry) infoLocked() SandboxInfo {
	r := &e.row
	info := SandboxInfo{
		ID: r.ID, Template: r.Template, Owner: r.Owner, State: e.state,
		Created: r.Created, Started: r.Started,
		Timeout: r.Timeout, IdleTimeout: r.IdleTimeout, OnTimeout: Action(r.OnTimeout), AutoResume: r.AutoResume,
		Metadata: clone(r.Metadata),
		VCPUs:    r.VCPUs, MemoryBytes: r.MemoryBytes, DiskBytes: r.DiskBytes, StoredBytes: r.StoredBytes,
		Pauses: r.Pauses, LastError: r.LastError,
	}
	if e.state == StatePaused || e.state == StateResuming {
		info.End, info.Expires = r.Paused, r.Paused.Add(e.retention)
	} else {
		info.End, _ = e.end()
	}
	if e.state == StateResuming {
		info.Expires = time.Time{}
	}
	return info
}

// pause stores the machine, by its preparation if there is one.
func (l *live) pause(ctx context.Context, store *snapshot.Store) (Paused, error) {
	if p := l.preparation; p != nil {
		l.preparation = nil
		paused, err := p.Pause(ctx)
		if err == nil || ctx.Err() != nil || errors.Is(err, ErrResumed) {
			return paused, err
		}
		// What was prepared may be at fault, a full disk's remains for instance.
	}
	return l.machine.Pause(ctx, store, l.pauseOptions())
}

func (l *live) pauseOptions() PauseOptions {
	return PauseOptions{Recipients: []age.Recipient{l.identity.Recipient()}, Extra: l.console.sections}
}

// dropPreparation forgets a preparation.
func (l *live) dropPreparation() error {
	if l.preparation == nil {
		return nil
	}
	p := l.preparation
	l.preparation = nil
	return p.Close()
}
