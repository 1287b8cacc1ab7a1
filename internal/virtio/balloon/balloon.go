// Package balloon is a virtio memory balloon (virtio 1.2, section 5.5): the guest gives pages back to the host, as
// many as the host asks for by SetTarget, and reports its free pages without being asked.
//
// Not offered are MUST_TELL_HOST, since a page of the balloon comes back by being touched; the statistics
// queue; free page hints, which are for migration; and PAGE_POISON, since a discarded page may read as
// anything (zeros, or what a snapshot had there). A Linux guest that poisons or zeroes its freed pages therefore
// switches reporting off by itself: it would rely on finding them as it left them.
package balloon

import (
	"context"
	"sync"

	"github.com/cryovisor/cryovisor/internal/virtio"
)

// Features (section 5.5.3).
const (
	FeatureDeflateOnOOM virtio.Feature = 1 << 2 // VIRTIO_BALLOON_F_DEFLATE_ON_OOM
	FeatureReporting    virtio.Feature = 1 << 5 // VIRTIO_BALLOON_F_PAGE_REPORTING
)

// PageSize is the unit in bytes of the balloon (section 5.5.6), whatever the guest's page size is.
const PageSize = 4096

// Queues (section 5.5.2). The specification numbers the reporting queue 4, after the queues for statistics and hints.
// Drivers, Linux among them, number only the queues that exist, so that without those two it is 2. Neither of
// the two is offered, hence every queue from 2 on can only be meant for reports and is served as such.
const (
	inflateQueue = 0
	deflateQueue = 1
	reportQueue  = 2
	queues       = 5

	queueSize = 128 // Linux reports nothing on a queue of fewer than 32
)

// Memory is guest memory. Discard drops the contents of the whole pages in a range, and fails for what isn't RAM.
type Memory interface {
	Discard(gpa, n uint64) error
}

// Config says what the device works on.
type Config struct {
	Memory Memory
}

// Device is a memory balloon. SetTarget and Actual may be called from any goroutine.
type Device struct {
	mem  Memory
	host virtio.Host

	// Set while the device is stopped.
	queues    []*virtio.Queue
	reporting bool

	mu        sync.Mutex
	target    uint32 // num_pages
	announced uint32 // num_pages when the driver was last told of a change
	actual    uint32
}

// New returns a balloon that is to be empty.
func New(cfg Config) *Device { return &Device{mem: cfg.Memory} }

// SetTarget asks the driver for a balloon of so many pages. It does what it can in its own time; see Actual.
func (d *Device) SetTarget(pages uint32) {
	d.mu.Lock()
	d.target = pages
	host := d.host
	d.mu.Unlock()
	if host != nil {
		host.Wake() // Serve tells the driver, so that a saved state knows whether it was told
	}
}

// Actual is how many pages the driver says are in the balloon.
func (d *Device) Actual() uint32 {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.actual
}

// Type implements virtio.Device.
func (d *Device) Type() virtio.DeviceType { return virtio.TypeBalloon }

// Features implements virtio.Device.
func (d *Device) Features() virtio.Feature { return FeatureDeflateOnOOM | FeatureReporting }

// QueueSizes implements virtio.Device.
func (d *Device) QueueSizes() []uint16 {
	sizes := make([]uint16, queues)
	for i := range sizes {
		sizes[i] = queueSize
	}
	return sizes
}

// Attach implements virtio.Device.
func (d *Device) Attach(h virtio.Host) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.host = h
}

// Start implements virtio.Device.
func (d *Device) Start(features virtio.Feature, queues []*virtio.Queue) {
	d.queues = queues
	d.reporting = features&FeatureReporting != 0
}

// Serve implements virtio.Device.
func (d *Device) Serve() error {
	d.announce()
	for i, q := range d.queues {
		if q == nil || i >= reportQueue && !d.reporting {
			continue
		}
		if err := d.serve(i, q); err != nil {
			return err
		}
	}
	return nil
}

// announce tells the driver of a new target.
func (d *Device) announce() {
	d.mu.Lock()
	changed := d.target != d.announced
	d.announced = d.target
	d.mu.Unlock()
	if changed {
		d.host.ConfigChanged()
	}
}

func (d *Device) serve(index int, q *virtio.Queue) error {
	for {
		c, err := q.Pop()
		if c == nil || err != nil {
			return err
		}
		err = d.handle(index, c)
		// Pushed in any case: a chain that is kept could not be given back later. Nothing was written to it.
		if perr := q.Push(c, 0); err == nil {
			err = perr
		}
		if err == nil {
			err = q.Notify()
		}
		if err != nil {
			return err
		}
	}
}

// handle does one request. A deflated page needs nothing: it is there when it is touched.
func (d *Device) handle(index int, c *virtio.Chain) error {
	switch index {
	case inflateQueue:
		return d.inflate(c)
	case deflateQueue:
		return nil
	}
	return d.report(c)
}

// Stop implements virtio.Device: Serve leaves nothing under way.
func (d *Device) Stop(context.Context) error { return nil }

// Reset implements virtio.Device: the balloon of a driver that starts anew is empty. The target is the host's.
func (d *Device) Reset() {
	d.queues, d.reporting = nil, false
	d.mu.Lock()
	defer d.mu.Unlock()
	d.actual = 0
}

// Close implements virtio.Device.
func (d *Device) Close() error { return nil }
