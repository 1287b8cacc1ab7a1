package lifecycle

import (
	"github.com/cryovisor/cryovisor/blockdev"
	"github.com/cryovisor/cryovisor/snapshot"
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

// Greeting is what a process says that has, or wants, an image.
func Greeting(id snapshot.ID, size uint64) []byte { return greeting{id, size}.marshal() }

// ParseGreeting parses one and makes it again.
func ParseGreeting(b []byte) ([]byte, error) {
	g, err := parseGreeting(b)
	return g.marshal(), err
}
