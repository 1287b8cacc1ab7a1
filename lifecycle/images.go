package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/cryovisor/cryovisor/snapshot"
)

// Images returns the paths of the disk images that templates and sandboxes lie on, sorted: what a process reads outside of
// its data directory. Later templates, which are checkpoints, and sandboxes have no others, but for those of
// CreateTemplate. It opens the snapshot of each template that has disks, and of each paused sandbox whose template is gone. With
// an error, which joins those of snapshots that can't be read, it returns the images of the others.
func (m *Manager) Images(ctx context.Context) ([]string, error) {
	type owner struct{ id, snapshot string }
	var owners []owner
	m.mu.Lock()
	for _, t := range m.templates {
		t.mu.Lock()
		if t.row.DiskBytes > 0 {
			owners = append(owners, owner{t.id, t.row.Snapshot})
		}
		t.mu.Unlock()
	}
	for _, e := range m.sandboxes.all() {
		e.mu.Lock()
		if m.templates[e.row.Template] == nil && e.row.DiskBytes > 0 && e.row.Snapshot != "" {
			owners = append(owners, owner{e.id, e.row.Snapshot})
		}
		e.mu.Unlock()
	}
	m.mu.Unlock()
	paths := make(map[string]bool)
	var errs []error
	for _, o := range owners {
		disks, err := m.disksOf(ctx, o.id, o.snapshot)
		if err != nil {
			errs = append(errs, fmt.Errorf("images of %s: %w", o.id, err))
		}
		for _, d := range disks {
			if d.Base != nil {
				paths[d.Base.Path] = true
			}
		}
	}
	return slices.Sorted(maps.Keys(paths)), errors.Join(errs...)
}

// disksOf reads what a snapshot of a template or a sandbox says of its disks.
func (m *Manager) disksOf(ctx context.Context, id, of string) (disks []DiskInfo, err error) {
	identity, err := m.identity(ctx, id)
	if err != nil {
		return nil, err
	}
	snap, err := snapshot.ParseID(of)
	if err != nil {
		return nil, err
	}
	r, err := m.store.Open(ctx, snap, identity)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	return DisksOf(r)
}
