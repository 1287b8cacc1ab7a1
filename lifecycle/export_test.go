package lifecycle

import (
	"io"

	"github.com/cryovisor/cryovisor/blockdev"
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
