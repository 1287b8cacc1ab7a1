// Package rng is a virtio entropy device (virtio 1.2, section 5.4): the guest's source of random bytes. It has no
// state, so that machines that resume from one snapshot get different bytes from the first request on.
package rng

import (
	"context"
	"crypto/rand"
	"fmt"
	"io"

	"github.com/cryovisor/cryovisor/internal/virtio"
)

const (
	queueSize = 64

	// maxFill is the most that one request gets, so that a driver can't keep the device busy for long with one. A
	// device may fill less than the whole buffer (section 5.4.6.2).
	maxFill = 64 << 10
	// piece is how much is read from the source at once.
	piece = 4 << 10
)

// Config says where the bytes come from.
type Config struct {
	// Source gives random bytes without blocking for long. Nil means crypto/rand.
	Source io.Reader
}

// Device is an entropy device.
type Device struct {
	source io.Reader
	queue  *virtio.Queue
	buf    [piece]byte
}

// New returns an entropy device.
func New(cfg Config) *Device {
	d := &Device{source: cfg.Source}
	if d.source == nil {
		d.source = rand.Reader
	}
	return d
}

// Type implements virtio.Device.
func (d *Device) Type() virtio.DeviceType { return virtio.TypeEntropy }

// Features implements virtio.Device: there are none (section 5.4.3).
func (d *Device) Features() virtio.Feature { return 0 }

// QueueSizes implements virtio.Device: requestq (section 5.4.2).
func (d *Device) QueueSizes() []uint16 { return []uint16{queueSize} }

// Attach implements virtio.Device.
func (d *Device) Attach(virtio.Host) {}

// ReadConfig implements virtio.Device: the device has no config space (section 5.4.4).
func (d *Device) ReadConfig(_ uint64, p []byte) { clear(p) }

// WriteConfig implements virtio.Device.
func (d *Device) WriteConfig(uint64, []byte) {}

// Start implements virtio.Device.
func (d *Device) Start(_ virtio.Feature, queues []*virtio.Queue) { d.queue = queues[0] }

// Serve implements virtio.Device.
func (d *Device) Serve() error {
	if d.queue == nil {
		return nil
	}
	for {
		c, err := d.queue.Pop()
		if c == nil || err != nil {
			return err
		}
		n, err := d.fill(c)
		// Pushed in any case: a chain that is kept could not be given back later.
		if perr := d.queue.Push(c, n); err == nil {
			err = perr
		}
		if err == nil {
			err = d.queue.Notify()
		}
		if err != nil {
			return err
		}
	}
}

// fill writes random bytes to a request's buffer, and returns how many.
func (d *Device) fill(c *virtio.Chain) (uint32, error) {
	if c.Readable.Len() != 0 || c.Writable.Len() == 0 {
		return 0, virtio.ProtocolErrorf("a request for entropy with %d bytes to read and %d to write (section 5.4.6.1)",
			c.Readable.Len(), c.Writable.Len())
	}
	n := min(c.Writable.Len(), maxFill)
	for off := int64(0); off < n; off += piece {
		p := d.buf[:min(piece, n-off)]
		if _, err := io.ReadFull(d.source, p); err != nil {
			return uint32(off), fmt.Errorf("virtio: entropy source: %w", err)
		}
		if err := c.Writable.WriteAt(p, off); err != nil {
			return uint32(off), err
		}
	}
	return uint32(n), nil
}

// Stop implements virtio.Device: Serve leaves nothing under way.
func (d *Device) Stop(context.Context) error { return nil }

// Reset implements virtio.Device.
func (d *Device) Reset() { d.queue = nil }

// Save implements virtio.Device.
func (d *Device) Save() ([]byte, error) { return nil, nil }

// Restore implements virtio.Device.
func (d *Device) Restore(state []byte) error {
	if len(state) != 0 {
		return virtio.StateErrorf("%d bytes of an entropy device, which has none", len(state))
	}
	return nil
}

// Close implements virtio.Device. The source stays the caller's.
func (d *Device) Close() error { return nil }
