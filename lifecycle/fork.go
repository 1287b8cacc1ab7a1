package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"time"

	"filippo.io/age"

	"github.com/cryovisor/cryovisor/internal/catalog"
	"github.com/cryovisor/cryovisor/snapshot"
)

// maxForks bounds one call of Fork.
const maxForks = 100

// capture is a sandbox at one moment, as a snapshot: its last pause, or a checkpoint. The caller lets the snapshot go.
type capture struct {
	id          snapshot.ID
	identity    *age.X25519Identity
	storedBytes uint64
}

// capture makes a snapshot of a sandbox, whose turn the caller has, as it is. Its key is one of its own, or the sandbox's for one that is paused.
func (m *Manager) capture(ctx context.Context, e *entry) (capture, error) {
	if e.live == nil {
		return m.capturePaused(ctx, e)
	}
	identity, err := age.GenerateX25519Identity()
	if err != nil {
		return capture{}, err
	}
	ctx, end := e.begin(ctx)
	defer end()
	options := PauseOptions{Recipients: []age.Recipient{identity.Recipient()}, Extra: e.live.console.sections}
	// A checkpoint becomes what the preparation's snapshot would have to be a diff of.
	if err := e.live.dropPreparation(); err != nil {
		return capture{}, err
	}
	p, err := e.live.machine.Checkpoint(ctx, m.store, options)
	if err != nil {
		return capture{}, fmt.Errorf("sandbox %s: %w", e.id, because(ctx, err))
	}
	// Once for the machine, whose next snapshot is a diff of it, and once for the caller.
	for range 2 {
		if err := m.stored.hold(p.ID); err != nil {
			return capture{}, err
		}
	}
	e.live.pins = append(e.live.pins, p.ID)
	return capture{id: p.ID, identity: identity, storedBytes: p.StoredBytes}, nil
}

func (m *Manager) capturePaused(ctx context.Context, e *entry) (capture, error) {
	identity, err := m.identity(ctx, e.id)
	if err != nil {
		return capture{}, err
	}
	id, err := snapshot.ParseID(e.row.Snapshot)
	if err != nil {
		return capture{}, err
	}
	return capture{id: id, identity: identity, storedBytes: e.row.StoredBytes}, m.stored.hold(id)
}

// Checkpoint keeps a sandbox as it is at one moment as a template, for Create. It goes on or stays paused. name may be empty. The checkpoint
// stays until DeleteTemplate, also when the sandbox has been killed. Errors: ErrExists; *LimitError; those of Machine.Checkpoint.
func (m *Manager) Checkpoint(ctx context.Context, id, name string) (TemplateInfo, error) {
	ctx, done, err := m.call(ctx)
	if err != nil {
		return TemplateInfo{}, err
	}
	defer done()
	e, err := m.transition(ctx, id)
	if err != nil {
		return TemplateInfo{}, err
	}
	defer e.leave()
	if err := m.checkName(name, e.row.Owner); err != nil {
		return TemplateInfo{}, err
	}
	if err := m.mayStore(); err != nil {
		return TemplateInfo{}, err
	}
	c, err := m.capture(ctx, e)
	if err != nil {
		return TemplateInfo{}, err
	}
	info, err := m.addTemplate(ctx, catalog.Template{
		Name: name, Owner: e.row.Owner, Source: id, VCPUs: e.row.VCPUs, MemoryBytes: e.row.MemoryBytes, DiskBytes: e.row.DiskBytes,
		StoredBytes: c.storedBytes, Labels: m.templateOf(e).Labels,
	}, c.id, c.identity)
	return info, errors.Join(err, m.stored.letGo(context.WithoutCancel(ctx), c.id))
}

// Fork makes n new sandboxes of one, which goes on or stays paused: they begin as it is at one moment, with its options and metadata.
// The error is that none could be made; a result has an error of its own. A fork that has not been paused yet ends with the process, as every sandbox does.
func (m *Manager) Fork(ctx context.Context, id string, n int, opts ConnectOptions) ([]ForkResult, error) {
	if n < 1 || n > maxForks || opts.Timeout < 0 {
		return nil, fmt.Errorf("%w: %d forks with a timeout of %v; from 1 to %d at once", ErrInvalid, n, opts.Timeout, maxForks)
	}
	ctx, done, err := m.call(ctx)
	if err != nil {
		return nil, err
	}
	defer done()
	e, err := m.transition(ctx, id)
	if err != nil {
		return nil, err
	}
	c, err := m.capture(ctx, e)
	row, parent := e.row, m.templateOf(e)
	e.leave()
	if err != nil {
		return nil, err
	}
	defer m.stored.letGo(context.WithoutCancel(ctx), c.id) //nolint:errcheck // what it leaves is collected when the directory is opened again
	t, err := Open(ctx, m.store, c.id, c.identity)
	if err != nil {
		return nil, err
	}
	defer t.Close()
	row = catalog.Sandbox{
		Template: row.Template, Owner: row.Owner, Timeout: row.Timeout, IdleTimeout: row.IdleTimeout, OnTimeout: row.OnTimeout,
		AutoResume: row.AutoResume, Metadata: row.Metadata,
	}
	if opts.Timeout != 0 {
		row.Timeout = opts.Timeout
	}
	results := make([]ForkResult, n)
	for i := range results {
		f, err := m.create(ctx, origin{template: parent, snapshot: c.id, resume: t.Resume}, row, time.Now())
		if err != nil {
			results[i].Err = fmt.Errorf("fork sandbox %s: %w", id, err)
			continue
		}
		results[i].Sandbox = &Sandbox{manager: m, id: f.id}
	}
	return results, nil
}
