package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"filippo.io/age"

	"github.com/cryovisor/cryovisor/internal/catalog"
	"github.com/cryovisor/cryovisor/snapshot"
	"github.com/cryovisor/cryovisor/vmm"
)

// maxName bounds names of templates and owners, in bytes.
const maxName = 256

// TemplateInfo describes a template or a checkpoint.
type TemplateInfo struct {
	ID          string            `json:"id"`
	Name        string            `json:"name,omitempty"`
	Owner       string            `json:"owner,omitempty"`  // empty: everybody's
	Source      string            `json:"source,omitempty"` // a checkpoint's: the id of the sandbox
	Created     time.Time         `json:"created"`
	VCPUs       int               `json:"vcpus"`
	MemoryBytes uint64            `json:"memory_bytes"`
	DiskBytes   uint64            `json:"disk_bytes"`
	StoredBytes uint64            `json:"stored_bytes"`
	Labels      map[string]string `json:"labels,omitempty"` // the embedder's; checkpoints have their template's
}

// TemplateConfig describes a template to be made.
type TemplateConfig struct {
	Name   string // among those of its owner, not in use
	Owner  string // empty: for all
	VM     vmm.Config
	Disks  []Disk
	Labels map[string]string
	// Ready, if not nil, waits until the guest has come so far that it is to be kept.
	Ready func(ctx context.Context, m *Machine) error
}

// maxOpen is how many templates stay open when nothing is being made of them. Each holds what has been fetched of its memory, and a few files.
const maxOpen = 16

// template is a template as a Manager has it. It is opened when the first sandbox is made of it, and stays so for a while: its sandboxes share its memory.
type template struct {
	id string
	// turn holds a value while somebody opens the template, or changes or deletes its record. That asks the KeyProvider, the store and
	// the catalog, which may take long: so it is done without mu, for which others wait with the Manager's mu held.
	turn chan struct{}

	mu      sync.Mutex
	row     catalog.Template
	opened  *Template
	making  int // sandboxes that are being made of it
	used    time.Time
	deleted bool
}

func newTemplate(row catalog.Template) *template {
	return &template{id: row.ID, turn: make(chan struct{}, 1), row: row}
}

// enter waits for the turn.
func (t *template) enter(ctx context.Context) error {
	select {
	case t.turn <- struct{}{}:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("wait for what is being done with template %s: %w", t.id, context.Cause(ctx))
	}
}

func (t *template) leave() { <-t.turn }

func (t *template) info() TemplateInfo {
	t.mu.Lock()
	defer t.mu.Unlock()
	r := &t.row
	return TemplateInfo{
		ID: r.ID, Name: r.Name, Owner: r.Owner, Source: r.Source, Created: r.Created, VCPUs: r.VCPUs, MemoryBytes: r.MemoryBytes,
		DiskBytes: r.DiskBytes, StoredBytes: r.StoredBytes, Labels: clone(r.Labels),
	}
}

// explain is why a sandbox could not be made: whatever the error is, there may be no such template any more.
func (t *template) explain(err error) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.deleted {
		return ErrNotFound
	}
	return err
}

// close gives up what is opened. Machines go on.
func (t *template) close() error {
	t.mu.Lock()
	opened := t.opened
	t.opened = nil
	t.mu.Unlock()
	if opened == nil {
		return nil
	}
	return opened.Close()
}

// findTemplate returns the template with an id or a name that an owner may use: their own before everybody's. An empty owner may use all.
func (m *Manager) findTemplate(idOrName, owner string) (*template, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return nil, ErrManagerClosed
	}
	var found *template
	for _, t := range m.templates {
		info := t.info()
		if info.ID != idOrName && (info.Name != idOrName || idOrName == "") || owner != "" && info.Owner != "" && info.Owner != owner {
			continue
		}
		if found == nil || info.Owner != "" {
			found = t
		}
	}
	if found == nil {
		return nil, fmt.Errorf("template %q: %w", idOrName, ErrNotFound)
	}
	return found, nil
}

// templateOf is the template that a sandbox began as, or what is still known of it.
func (m *Manager) templateOf(e *entry) TemplateInfo {
	m.mu.Lock()
	defer m.mu.Unlock()
	if t := m.templates[e.info().Template]; t != nil {
		return t.info()
	}
	return TemplateInfo{ID: e.row.Template}
}

// fromTemplate is a template as what a machine is made of. Without an error, doneWith must be called.
func (m *Manager) fromTemplate(ctx context.Context, t *template) (origin, error) {
	opened, err := m.openTemplate(ctx, t)
	if err != nil {
		return origin{}, err
	}
	from := origin{template: t.info(), snapshot: opened.origin.Header().ID, resume: opened.Resume}
	t.mu.Lock()
	record := t.row.WorkingSet
	t.mu.Unlock()
	if record == nil {
		from.record = t
		return from, nil
	}
	from.resume = func(ctx context.Context, opts ResumeOptions) (*Machine, error) {
		opts.WorkingSet = record
		return opened.Resume(ctx, opts)
	}
	return from, nil
}

// openTemplate opens a template if it is not.
func (m *Manager) openTemplate(ctx context.Context, t *template) (*Template, error) {
	if opened, err := t.use(nil); opened != nil || err != nil {
		return opened, err
	}
	if err := t.enter(ctx); err != nil {
		return nil, err
	}
	defer t.leave()
	if opened, err := t.use(nil); opened != nil || err != nil { // whose turn it was before has opened it
		return opened, err
	}
	identity, err := m.identity(ctx, t.id)
	if err != nil {
		return nil, err
	}
	id, err := snapshot.ParseID(t.row.Snapshot)
	if err != nil {
		return nil, err
	}
	opened, err := Open(ctx, m.store, id, identity)
	if err != nil {
		return nil, err
	}
	if m.opts.ImageLimit > 0 {
		opened.LimitImage(m.opts.ImageLimit)
	}
	return t.use(opened)
}

// use notes that a sandbox is being made of a template that is open, be it just now. It is nil if it is not.
func (t *template) use(opened *Template) (*Template, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.deleted {
		return nil, fmt.Errorf("template %q: %w", t.id, ErrNotFound)
	}
	if opened != nil {
		t.opened = opened
	}
	if t.opened != nil {
		t.making++
	}
	return t.opened, nil
}

// doneWith notes that a sandbox of a template is made, or could not be, and closes templates of which nothing was made for longest.
func (m *Manager) doneWith(t *template) {
	t.mu.Lock()
	t.making--
	t.used = time.Now()
	t.mu.Unlock()
	m.mu.Lock()
	var idle []*template
	for _, t := range m.templates {
		t.mu.Lock()
		if t.opened != nil && t.making == 0 {
			idle = append(idle, t)
		}
		t.mu.Unlock()
	}
	m.mu.Unlock()
	if len(idle) <= maxOpen {
		return
	}
	oldest := slices.MinFunc(idle, func(a, b *template) int { return a.lastUsed().Compare(b.lastUsed()) })
	oldest.mu.Lock()
	var unused *Template
	if oldest.making == 0 {
		unused, oldest.opened = oldest.opened, nil
	}
	oldest.mu.Unlock()
	if unused != nil {
		_ = unused.Close() // it was read from only
	}
}

func (t *template) lastUsed() time.Time {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.used
}

// learn records what a template's first sandbox has touched, for the next ones.
func (m *Manager) learn(ctx context.Context, l *live) {
	t := l.template
	if t == nil {
		return
	}
	l.template = nil
	record, err := l.machine.WorkingSet(ctx)
	if err != nil || record == nil {
		return
	}
	if t.enter(ctx) != nil {
		return
	}
	defer t.leave()
	t.mu.Lock()
	row, deleted := t.row, t.deleted
	t.mu.Unlock()
	if row.WorkingSet != nil || deleted {
		return
	}
	row.WorkingSet = record
	if m.catalog.PutTemplate(ctx, row, nil) == nil {
		t.mu.Lock()
		t.row = row
		t.mu.Unlock()
	}
}

// CreateTemplate boots a machine, waits until it is ready, and keeps it as a template. Errors: ErrExists; those of Boot and Machine.Pause.
func (m *Manager) CreateTemplate(ctx context.Context, cfg TemplateConfig) (TemplateInfo, error) {
	if err := m.checkTemplate(cfg); err != nil {
		return TemplateInfo{}, err
	}
	ctx, done, err := m.call(ctx)
	if err != nil {
		return TemplateInfo{}, err
	}
	defer done()
	l := &live{console: &console{next: cfg.VM.Console.Out}}
	cfg.VM.Console.Out = l.console
	if l.machine, err = Boot(ctx, cfg.VM, Disks{Dir: m.disks(), Boot: cfg.Disks}); err != nil {
		return TemplateInfo{}, fmt.Errorf("template %q: %w", cfg.Name, err)
	}
	info, err := m.keepTemplate(ctx, cfg, l)
	if err != nil {
		err = fmt.Errorf("template %q: %w", cfg.Name, err)
	}
	return info, errors.Join(err, l.machine.Close()) // which leaves an overlay of the caller's if it is not stored
}

func (m *Manager) checkTemplate(cfg TemplateConfig) error {
	if err := checkPairs("labels", cfg.Labels); err != nil {
		return err
	}
	if cfg.Name == "" || len(cfg.Owner) > maxName || !utf8.ValidString(cfg.Owner) {
		return fmt.Errorf("%w: a template needs a name, and an owner is UTF-8 text of at most %d bytes", ErrInvalid, maxName)
	}
	return m.checkName(cfg.Name, cfg.Owner)
}

// checkName says whether a name can be given to a template.
func (m *Manager) checkName(name, owner string) error {
	if len(name) > maxName || !utf8.ValidString(name) || strings.ContainsFunc(name, func(r rune) bool { return r <= ' ' || r == 0x7f }) {
		return fmt.Errorf("%w: a template's name is UTF-8 text of at most %d bytes without spaces", ErrInvalid, maxName)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return ErrManagerClosed
	}
	return m.nameFree(name, owner)
}

// nameFree says whether no template of an owner has a name, nor has it as its id. The caller holds mu.
func (m *Manager) nameFree(name, owner string) error {
	for _, t := range m.templates {
		if info := t.info(); name != "" && (info.Name == name && info.Owner == owner || info.ID == name) {
			return fmt.Errorf("template %q: %w", name, ErrExists)
		}
	}
	return nil
}

// keepTemplate runs a machine until it is ready, and stores it.
func (m *Manager) keepTemplate(ctx context.Context, cfg TemplateConfig, l *live) (TemplateInfo, error) {
	if err := l.machine.VM.Start(); err != nil {
		return TemplateInfo{}, err
	}
	if cfg.Ready != nil {
		if err := cfg.Ready(ctx, l.machine); err != nil {
			return TemplateInfo{}, err
		}
	}
	var err error
	if l.identity, err = age.GenerateX25519Identity(); err != nil {
		return TemplateInfo{}, err
	}
	paused, err := l.pause(ctx, m.store)
	if err != nil {
		return TemplateInfo{}, err
	}
	row := catalog.Template{
		Name: cfg.Name, Owner: cfg.Owner, VCPUs: l.machine.VM.VCPUs(), MemoryBytes: cfg.VM.MemoryBytes, DiskBytes: l.machine.diskBytes(),
		Labels: clone(cfg.Labels), StoredBytes: paused.StoredBytes,
	}
	return m.addTemplate(ctx, row, paused.ID, l.identity)
}

func (m *Machine) diskBytes() (n uint64) {
	for _, d := range m.disks {
		n += uint64(d.info.Size)
	}
	return n
}

// addTemplate makes a template of a snapshot, which is deleted if that fails, unless others need it.
func (m *Manager) addTemplate(ctx context.Context, row catalog.Template, id snapshot.ID, identity *age.X25519Identity) (TemplateInfo, error) {
	if err := m.stored.hold(id); err != nil {
		return TemplateInfo{}, err
	}
	row.ID, row.Snapshot, row.Created = newID(), id.String(), m.clock.Now().UTC()
	t := newTemplate(row)
	err := m.withSealed(ctx, row.ID, identity, func(sealed []byte) error { return m.catalog.PutTemplate(ctx, row, sealed) })
	if err == nil {
		m.mu.Lock()
		if err = m.nameFree(row.Name, row.Owner); err == nil {
			m.templates[t.id] = t
		}
		m.mu.Unlock()
		if err != nil {
			err = errors.Join(err, m.catalog.DeleteTemplate(context.WithoutCancel(ctx), t.id))
		}
	}
	if err != nil {
		return TemplateInfo{}, errors.Join(err, m.stored.letGo(context.WithoutCancel(ctx), id))
	}
	return t.info(), nil
}

// Template describes the template or checkpoint with an id or a name.
func (m *Manager) Template(idOrName string) (TemplateInfo, error) {
	t, err := m.findTemplate(idOrName, "")
	if err != nil {
		return TemplateInfo{}, err
	}
	return t.info(), nil
}

// Templates lists templates and checkpoints, the newest first.
func (m *Manager) Templates() []TemplateInfo {
	m.mu.Lock()
	defer m.mu.Unlock()
	all := make([]TemplateInfo, 0, len(m.templates))
	for _, t := range m.templates {
		all = append(all, t.info())
	}
	slices.SortFunc(all, func(a, b TemplateInfo) int {
		return position{b.Created.UnixNano(), b.ID}.compare(position{a.Created.UnixNano(), a.ID})
	})
	return all
}

// DeleteTemplate deletes a template or checkpoint, its keys first. Sandboxes that were made of it stay.
func (m *Manager) DeleteTemplate(ctx context.Context, id string) error {
	ctx, done, err := m.call(ctx)
	if err != nil {
		return err
	}
	defer done()
	m.mu.Lock()
	t := m.templates[id]
	m.mu.Unlock()
	if t == nil {
		return fmt.Errorf("template %q: %w", id, ErrNotFound)
	}
	if err := t.enter(ctx); err != nil {
		return err
	}
	defer t.leave()
	m.mu.Lock()
	gone := m.templates[id] == nil
	m.mu.Unlock()
	if gone { // somebody else was first
		return fmt.Errorf("template %q: %w", id, ErrNotFound)
	}
	if err := m.catalog.DeleteTemplate(ctx, id); err != nil {
		return err
	}
	t.mu.Lock()
	t.deleted = true
	t.mu.Unlock()
	m.mu.Lock()
	delete(m.templates, id)
	m.mu.Unlock()
	ctx = context.WithoutCancel(ctx)
	return errors.Join(m.catalog.Forget(ctx), t.close(), m.letGo(ctx, t.row.Snapshot))
}
