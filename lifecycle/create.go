package lifecycle

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"time"
	"unicode/utf8"

	"github.com/cryovisor/cryovisor/internal/catalog"
)

// Create makes a sandbox of a template, and lets it run. Errors: ErrNotFound if there is no such template, *LimitError, ErrInvalid; host errors as
// those of Template.Resume.
func (m *Manager) Create(ctx context.Context, opts CreateOptions) (*Sandbox, error) {
	began := time.Now()
	if err := checkCreate(&opts); err != nil {
		return nil, err
	}
	ctx, done, err := m.call(ctx)
	if err != nil {
		return nil, err
	}
	defer done()
	t, err := m.findTemplate(opts.Template, opts.Owner)
	if err != nil {
		return nil, err
	}
	from, err := m.fromTemplate(ctx, t)
	if err != nil {
		return nil, fmt.Errorf("create a sandbox of template %s: %w", t.id, err)
	}
	defer m.doneWith(t)
	e, err := m.create(ctx, from, catalog.Sandbox{
		Template: t.id, Owner: opts.Owner, Timeout: opts.Timeout, IdleTimeout: opts.IdleTimeout, OnTimeout: string(opts.OnTimeout),
		AutoResume: opts.AutoResume, Metadata: clone(opts.Metadata),
	}, began)
	if err != nil {
		return nil, fmt.Errorf("create a sandbox of template %s: %w", t.id, t.explain(err))
	}
	return &Sandbox{manager: m, id: e.id}, nil
}

func checkCreate(o *CreateOptions) error {
	o.Timeout, o.OnTimeout = cmp.Or(o.Timeout, DefaultTimeout), cmp.Or(o.OnTimeout, ActionKill)
	if o.Timeout < 0 || o.IdleTimeout < 0 {
		return fmt.Errorf("%w: a timeout of %v, of inactivity %v", ErrInvalid, o.Timeout, o.IdleTimeout)
	}
	if err := checkAction(o.OnTimeout); err != nil {
		return err
	}
	if !utf8.ValidString(o.Owner) || len(o.Owner) > maxName {
		return fmt.Errorf("%w: an owner is UTF-8 text of at most %d bytes", ErrInvalid, maxName)
	}
	return checkPairs("metadata", o.Metadata)
}

func checkAction(a Action) error {
	if a != ActionKill && a != ActionPause {
		return fmt.Errorf("%w: action %q; it is %q or %q", ErrInvalid, a, ActionKill, ActionPause)
	}
	return nil
}

func checkPairs(what string, pairs map[string]string) error {
	n := 0
	for k, v := range pairs {
		if n += len(k) + len(v); n > MaxMetadata {
			return fmt.Errorf("%w: %s of more than %d bytes", ErrInvalid, what, MaxMetadata)
		}
		if !utf8.ValidString(k) || !utf8.ValidString(v) {
			return fmt.Errorf("%w: %s is UTF-8 text", ErrInvalid, what)
		}
	}
	return nil
}

// create makes a new sandbox; row has what is not the machine's.
func (m *Manager) create(ctx context.Context, from origin, row catalog.Sandbox, began time.Time) (*entry, error) {
	now := m.clock.Now().UTC()
	row.ID, row.Running, row.Created, row.Started = newID(), true, now, now
	row.VCPUs, row.MemoryBytes, row.DiskBytes = from.template.VCPUs, from.template.MemoryBytes, from.template.DiskBytes
	e := newEntry(row, StateResuming, m.opts.Retention)
	e.turn <- struct{}{} // the guest may end before it is known
	defer e.leave()
	err := m.launch(ctx, e, from, row)
	m.meter.create(time.Since(began), err)
	if err != nil {
		return nil, err
	}
	if err := m.add(e); err != nil {
		return nil, errors.Join(err, m.delete(context.WithoutCancel(ctx), e, ReasonClose))
	}
	m.tell(e, "", ReasonRequest, time.Since(began), nil)
	m.plan(e)
	return e, nil
}

// add makes a sandbox known.
func (m *Manager) add(e *entry) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return ErrManagerClosed
	}
	m.sandboxes.add(e)
	return nil
}
