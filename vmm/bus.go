//go:build linux && amd64

package vmm

import (
	"fmt"
	"sort"
)

// ioDevice is a device behind a range of I/O ports or guest physical addresses.
// off is relative to the range. Both methods may be called by several vCPUs at
// once. write returns an error to end the VM (a reset, a power-off).
type ioDevice interface {
	read(off uint64, data []byte)
	write(off uint64, data []byte) error
}

type busRange struct {
	first, last uint64
	name        string
	dev         ioDevice
}

// bus maps addresses to devices. It is built before the vCPUs run and not
// changed afterwards, so that lookups need no lock.
type bus struct {
	ranges []busRange // ascending, disjoint
}

func (b *bus) add(name string, first, last uint64, dev ioDevice) error {
	if first > last {
		return fmt.Errorf("%w: %s: range %#x-%#x", ErrConfig, name, first, last)
	}
	i := sort.Search(len(b.ranges), func(i int) bool { return b.ranges[i].last >= first })
	if i < len(b.ranges) && b.ranges[i].first <= last {
		return fmt.Errorf("%w: %s at %#x-%#x overlaps %s", ErrConfig, name, first, last, b.ranges[i].name)
	}
	b.ranges = append(b.ranges, busRange{})
	copy(b.ranges[i+1:], b.ranges[i:])
	b.ranges[i] = busRange{first, last, name, dev}
	return nil
}

// find returns the device at addr if all n bytes are within its range. An access
// that straddles the end of a range reaches no device.
func (b *bus) find(addr uint64, n int) (ioDevice, uint64) {
	i := sort.Search(len(b.ranges), func(i int) bool { return b.ranges[i].last >= addr })
	if i == len(b.ranges) || addr < b.ranges[i].first || uint64(n)-1 > b.ranges[i].last-addr {
		return nil, 0
	}
	return b.ranges[i].dev, addr - b.ranges[i].first
}

// read fills data from the device at addr; where nothing answers, all bits are
// set, as on a real bus.
func (b *bus) read(addr uint64, data []byte) {
	if dev, off := b.find(addr, len(data)); dev != nil {
		dev.read(off, data)
		return
	}
	for i := range data {
		data[i] = 0xff
	}
}

// write gives data to the device at addr; where nothing listens it is dropped.
func (b *bus) write(addr uint64, data []byte) error {
	if dev, off := b.find(addr, len(data)); dev != nil {
		return dev.write(off, data)
	}
	return nil
}
