package lifecycle

import (
	"context"
	"io"
	"path/filepath"
	"time"

	"github.com/cryovisor/cryovisor/blockdev"
	"github.com/cryovisor/cryovisor/internal/catalog"
	"github.com/cryovisor/cryovisor/snapshot"
	"github.com/cryovisor/cryovisor/vmm"
)

// ParseDisks is what reads the section of disks.
var ParseDisks = parseDisks

// DiskDevice is a copy-on-write disk of the machine, as the machine sees it.
func (m *Machine) DiskDevice(name string) blockdev.Device {
	for _, d := range m.disks {
		if d.info.Name == name {
			return d.overlay
		}
	}
	return nil
}

// GivenUp is closed when the pause under way is given up.
func (m *Machine) GivenUp() <-chan struct{} {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.attempt.ctx.Done()
}

// What encodes and reads records of working sets.
var (
	MarshalWorkingSet = marshalWorkingSet
	ParseWorkingSet   = parseWorkingSet
)

// Console is where the output of a sandbox that runs goes.
func Console(m *Manager, id string) io.Writer { return m.sandboxes.byID[id].live.console }

// SnapshotOf is the snapshot of a sandbox in a directory that no Manager has; zero if there is none.
func SnapshotOf(ctx context.Context, dir, sandbox string) (id snapshot.ID, err error) {
	c, err := catalog.Open(filepath.Join(dir, catalogFile))
	if err != nil {
		return id, err
	}
	defer c.Close()
	rows, err := c.Sandboxes(ctx)
	for _, row := range rows {
		if row.ID == sandbox {
			return snapshot.ParseID(row.Snapshot)
		}
	}
	return id, err
}

// Failures is how often what was due for a sandbox has failed, since it succeeded.
func Failures(m *Manager, id string) int {
	m.mu.Lock()
	e := m.sandboxes.byID[id]
	m.mu.Unlock()
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.failures
}

// Watched is when the guest of a sandbox that runs was last looked at.
func Watched(m *Manager, id string) time.Time {
	e := m.sandboxes.byID[id]
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.live.watched.at
}

// Prepared says whether the pause of a sandbox that runs is prepared.
func Prepared(m *Manager, id string) bool {
	e := m.sandboxes.byID[id]
	e.turn <- struct{}{}
	defer e.leave()
	return e.live.preparation != nil
}

// Greeting is what a process says that has, or wants, an image.
func Greeting(id snapshot.ID, size uint64) []byte { return greeting{id, size}.marshal() }

// ParseGreeting parses one and makes it again.
func ParseGreeting(b []byte) ([]byte, error) {
	g, err := parseGreeting(b)
	return g.marshal(), err
}

// OpenTemplates is how many templates of a Manager are open.
func OpenTemplates(m *Manager) (n int) {
	for _, t := range m.templates {
		if t.opened != nil {
			n++
		}
	}
	return n
}

// FailPool has the VMs that a Manager makes in advance fail; with nil, they are made again.
func FailPool(m *Manager, err error) {
	m.shelf.mu.Lock()
	defer m.shelf.mu.Unlock()
	m.shelf.build = reserveShell
	if err != nil {
		m.shelf.build = func(uint64) (*vmm.Shell, error) { return nil, err }
	}
}
