package lifecycle

import (
	"context"
	"fmt"

	"github.com/cryovisor/cryovisor/snapshot"
)

// Logs returns the end of what the sandbox's guest has written to its console, at most 64 KiB, and the
// offset of its first byte in all that it has written. Snapshots keep it, encrypted, so that it outlives pauses; of a paused sandbox it is read from there.
func (m *Manager) Logs(ctx context.Context, id string) (offset int64, text []byte, err error) {
	e, err := m.find(id)
	if err != nil {
		return 0, nil, err
	}
	if offset, text, ok := e.logs(); ok { // also in the midst of a transition
		return offset, text, nil
	}
	if err := e.enter(ctx); err != nil {
		return 0, nil, err
	}
	defer e.leave()
	if offset, text, ok := e.logs(); ok {
		return offset, text, nil
	}
	return m.storedLogs(ctx, e)
}

// logs are those of a sandbox that has a machine.
func (e *entry) logs() (offset int64, text []byte, ok bool) {
	e.mu.Lock()
	l := e.live
	e.mu.Unlock()
	if l == nil {
		return 0, nil, false
	}
	offset, text = l.console.end()
	return offset, text, true
}

// storedLogs reads the logs of a paused sandbox, whose turn the caller has.
func (m *Manager) storedLogs(ctx context.Context, e *entry) (offset int64, text []byte, err error) {
	identity, err := m.identity(ctx, e.id)
	if err != nil {
		return 0, nil, err
	}
	id, err := snapshot.ParseID(e.row.Snapshot)
	if err != nil {
		return 0, nil, err
	}
	r, err := m.store.Open(ctx, id, identity)
	if err != nil {
		return 0, nil, fmt.Errorf("logs of sandbox %s: %w", e.id, err)
	}
	defer r.Close()
	c := &console{}
	c.restore(r.ReadSection)
	offset, text = c.end()
	return offset, text, nil
}
