package lifecycle

import (
	"context"
	"errors"
	"time"
)

// plan sets a sandbox's alarm: for its timeout, for the preparation of a pause before that, for another look at its guest, or for the end
// of its retention.
func (m *Manager) plan(e *entry) {
	e.mu.Lock()
	defer e.mu.Unlock()
	m.alarms.set(e, m.next(e))
}

// next is when something is to be done with a sandbox; zero: never. The caller holds e.mu.
func (m *Manager) next(e *entry) time.Time {
	switch {
	case e.deleted:
		return time.Time{}
	case e.state == StatePaused:
		return later(e.row.Paused.Add(e.retention), e.retry)
	case e.state != StateRunning:
		return time.Time{} // who is at it plans anew
	}
	at, _ := e.end()
	if e.row.OnTimeout == string(ActionPause) && m.opts.PrepareAhead >= 0 && !e.prepared.Equal(at) {
		at = at.Add(-m.ahead(e.row.MemoryBytes))
		if now := m.clock.Now(); !e.prepared.IsZero() && at.After(now) {
			at = now // what was prepared for another end is to be given up
		}
	}
	if m.watches(e) {
		at = earlier(at, e.live.watched.at.Add(watchEvery(e.row.IdleTimeout)))
	}
	return later(at, e.retry)
}

func earlier(a, b time.Time) time.Time {
	if b.Before(a) {
		return b
	}
	return a
}

func later(a, b time.Time) time.Time {
	if b.After(a) {
		return b
	}
	return a
}

// ahead is how long before a pause by timeout its preparation begins: as long as it takes on a slow machine, some seconds for a GiB.
func (m *Manager) ahead(memory uint64) time.Duration {
	if m.opts.PrepareAhead != 0 {
		return max(m.opts.PrepareAhead, 0)
	}
	return time.Second + time.Duration(memory>>20)*2*time.Millisecond
}

// alarm does what is due, not in the caller's goroutine.
func (m *Manager) alarm(e *entry) {
	m.work.Go(func() {
		if err := e.enter(m.ctx); err != nil {
			return
		}
		m.act(m.ctx, e)
		e.leave()
		m.plan(e)
	})
}

// act does what is due for a sandbox whose turn the caller has.
func (m *Manager) act(ctx context.Context, e *entry) {
	if e.live == nil {
		if m.expired(e) {
			if err := m.delete(ctx, e, ReasonExpired); err != nil {
				m.failed(e, err)
			} else {
				m.meter.expire()
			}
		}
		return
	}
	now := m.clock.Now()
	if m.watches(e) {
		m.look(e, now)
	}
	e.mu.Lock()
	end, _ := e.end()
	prepare := e.row.OnTimeout == string(ActionPause) && m.opts.PrepareAhead >= 0 && !now.Before(end.Add(-m.ahead(e.row.MemoryBytes)))
	tried := e.prepared.Equal(end)
	e.mu.Unlock()
	switch {
	case !now.Before(end):
		m.timeout(ctx, e)
	case !prepare: // activity has returned
		e.mu.Lock()
		e.prepared = time.Time{}
		e.mu.Unlock()
		_ = e.live.dropPreparation()
	case !tried:
		m.prepare(ctx, e, end)
	}
}

// timeout pauses or kills a sandbox whose timeout is reached, unless it has been extended at the last moment.
func (m *Manager) timeout(ctx context.Context, e *entry) {
	reason, up := e.timeUp(m.clock.Now())
	if !up {
		return
	}
	var err error
	if e.row.OnTimeout == string(ActionPause) {
		_, err = m.pause(ctx, e, reason)
	} else {
		err = m.delete(ctx, e, reason)
	}
	if err != nil && !errors.Is(err, ErrResumed) {
		m.failed(e, err)
	}
}

// The first wait after a pause by timeout has failed, and the longest; each is twice the one before.
const (
	firstRetry   = 2 * time.Second
	longestRetry = 5 * time.Minute
)

// failed has what was due be tried again, later and later, and says when.
func (m *Manager) failed(e *entry, err error) (again time.Time) {
	e.mu.Lock()
	defer e.mu.Unlock()
	wait := min(firstRetry<<min(e.failures, 10), longestRetry)
	e.failures++
	e.ending = false
	e.retry = m.clock.Now().Add(wait)
	e.row.LastError = err.Error()
	return e.retry
}

// prepare begins to store what a pause at end would have to.
func (m *Manager) prepare(ctx context.Context, e *entry, end time.Time) {
	ctx, done := e.begin(ctx)
	defer done()
	e.mu.Lock()
	e.prepared, e.preparing = end, true
	e.mu.Unlock()
	if err := m.needIdentity(ctx, e); err != nil {
		return // the pause will say so
	}
	l := e.live
	if l.preparation != nil {
		if l.preparation.Update(ctx) != nil {
			l.preparation = nil
		}
		return
	}
	if p, err := l.machine.Prepare(ctx, m.store, l.pauseOptions()); err == nil {
		l.preparation = p
	}
}

// stopPreparing ends a preparation that has become too early. The caller holds mu.
func (e *entry) stopPreparing(now time.Time, ahead time.Duration) {
	end, _ := e.end()
	if e.preparing && now.Before(end.Add(-ahead)) {
		e.cancel(ErrResumed)
	}
}
