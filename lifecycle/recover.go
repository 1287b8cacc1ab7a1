package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/cryovisor/cryovisor/internal/catalog"
	"github.com/cryovisor/cryovisor/snapshot"
)

// disks is where what guests write to disks is kept while they run.
func (m *Manager) disks() string { return filepath.Join(m.dir, disksDir) }

// recover reads the catalog, and brings what a crash has left into order: sandboxes that ran are as they were at their last pause, or gone if there was
// none; what no record names is deleted. Damage to one snapshot is left for who wants to use that, and for Fsck; nothing is deleted then.
func (m *Manager) recover(ctx context.Context) error {
	templates, err := m.catalog.Templates(ctx)
	if err != nil {
		return err
	}
	for _, row := range templates {
		_ = m.holdNamed(row.Snapshot)
		m.templates[row.ID] = newTemplate(row)
	}
	rows, err := m.catalog.Sandboxes(ctx)
	if err != nil {
		return err
	}
	for _, row := range rows {
		if err := m.recoverSandbox(ctx, row); err != nil {
			return fmt.Errorf("sandbox %s: %w", row.ID, err)
		}
	}
	if err := m.collect(ctx); err != nil {
		return err
	}
	for _, e := range m.sandboxes.order {
		m.plan(e)
	}
	return nil
}

// holdNamed holds the snapshot that a record names. If that can't be read, it is not known which packs it needs.
func (m *Manager) holdNamed(id string) error {
	parsed, err := snapshot.ParseID(id)
	if err == nil {
		err = m.stored.hold(parsed)
	}
	if err != nil {
		m.stored.careful()
	}
	return err
}

// recoverSandbox makes a sandbox of its record.
func (m *Manager) recoverSandbox(ctx context.Context, row catalog.Sandbox) error {
	if row.Snapshot == "" {
		return m.catalog.DeleteSandbox(ctx, row.ID)
	}
	if row.Running {
		// It was not forgotten while it ran: its retention begins now.
		row.Running, row.Paused = false, m.clock.Now().UTC()
		row.LastError = "the process in which it ran ended; it is as it was at its last pause"
		if err := m.catalog.PutSandbox(ctx, row, nil); err != nil {
			return err
		}
	}
	if err := m.holdNamed(row.Snapshot); err != nil {
		row.LastError = err.Error()
	}
	m.sandboxes.add(newEntry(row, StatePaused, m.opts.Retention))
	return nil
}

// collect deletes what no record names: snapshots, packs, files of disks, keys.
func (m *Manager) collect(ctx context.Context) error {
	if err := m.collectSnapshots(ctx); err != nil {
		return err
	}
	if _, err := m.catalog.PruneSecrets(ctx); err != nil {
		return err
	}
	if err := m.catalog.Forget(ctx); err != nil {
		return err
	}
	return removeOverlays(m.disks())
}

func (m *Manager) collectSnapshots(ctx context.Context) error {
	entries, err := m.store.List()
	if err != nil || m.stored.cautious {
		m.stored.careful()
		return nil
	}
	for _, entry := range entries {
		if m.stored.has(entry.ID) {
			continue
		}
		if err := m.store.DeleteKeeping(ctx, entry.ID, m.stored.needed); err != nil {
			return err
		}
	}
	_, err = m.store.Collect(ctx)
	return err
}

// removeOverlays removes what guests have written to disks that are no longer theirs.
func removeOverlays(dir string) error {
	files, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, f := range files {
		if filepath.Ext(f.Name()) == overlayExt {
			if err := os.Remove(filepath.Join(dir, f.Name())); err != nil {
				return err
			}
		}
	}
	return nil
}
