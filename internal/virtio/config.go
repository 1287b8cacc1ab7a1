package virtio

import (
	"bytes"
	"sync"
)

// configMax is the room for a config space behind the registers.
const configMax = RegionSize - regConfig

// configSpace is the device's config space as its driver sees it, with its generation (section 4.2.2). A driver that reads
// a field in parts looks at the generation before and after. Therefore the generation changes together with
// what the driver sees: when it is looked at, or the config space is, and the device has changed it since the last look.
// Were it to change when the device says so, a driver could get both parts and the old generation in between.
type configSpace struct {
	dev Device

	mu         sync.Mutex
	seen       []byte // at the last look; nil before the first one of this process
	generation uint32
}

// look brings seen and the generation up to date. What a driver saw before a snapshot is not known, so that the first
// look after it counts as a change. c.mu is held.
func (c *configSpace) look() {
	now := make([]byte, configMax)
	c.dev.ReadConfig(0, now)
	if c.seen == nil || !bytes.Equal(now, c.seen) {
		c.seen = now
		c.generation++
	}
}

// read copies what is at off to p, and zeros for what is beyond the end.
func (c *configSpace) read(off uint64, p []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.look()
	clear(p)
	if off < configMax {
		copy(p, c.seen[off:])
	}
}

// current is the generation for a driver that asks.
func (c *configSpace) current() uint32 {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.look()
	return c.generation
}

// last is the generation that the driver may have seen.
func (c *configSpace) last() uint32 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.generation
}

// restore makes generation the one that the driver saw last.
func (c *configSpace) restore(generation uint32) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.seen, c.generation = nil, generation
}
