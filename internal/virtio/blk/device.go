// Package blk is the virtio block device (virtio 1.2, section 5.2; section numbers below are that document's) on a
// blockdev.Device.
package blk

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"sync/atomic"

	"github.com/cryovisor/cryovisor/blockdev"
	"github.com/cryovisor/cryovisor/internal/virtio"
)

// Feature bits (section 5.2.3).
const (
	FeatureSegMax      virtio.Feature = 1 << 2  // VIRTIO_BLK_F_SEG_MAX
	FeatureReadOnly    virtio.Feature = 1 << 5  // VIRTIO_BLK_F_RO
	FeatureBlockSize   virtio.Feature = 1 << 6  // VIRTIO_BLK_F_BLK_SIZE
	FeatureFlush       virtio.Feature = 1 << 9  // VIRTIO_BLK_F_FLUSH
	FeatureDiscard     virtio.Feature = 1 << 13 // VIRTIO_BLK_F_DISCARD
	FeatureWriteZeroes virtio.Feature = 1 << 14 // VIRTIO_BLK_F_WRITE_ZEROES
)

const (
	sectorSize = 512 // the unit of every address and length of the protocol
	queueSize  = 256
	// segMax leaves room for the header and the status in a chain as long as the queue.
	segMax = queueSize - 2
	// serialSize is the length of the serial number, padded with zeros (section 5.2.6).
	serialSize = 20
	// maxZeroSectors is the most that one segment of a discard or a write of zeros may cover: 128 MiB, which
	// may have to be written.
	maxZeroSectors = 1 << 18
	// maxZeroSegments is the most segments that such a request may have.
	maxZeroSegments = 8

	defaultWorkers = 8
)

// Config is what a block device has behind it.
type Config struct {
	// Disk stays the caller's, who closes it after the device.
	Disk blockdev.Device
	// Serial is the serial number, at most 20 bytes.
	Serial string
	// Workers is how many requests are worked on at the same time; 0 means 8.
	Workers int
	// OnError, if not nil, is told of every operation of the disk that failed; the guest is told only that. It
	// is called from several goroutines.
	OnError func(error)
	// Captured says that what is on the disk is stored with the machine, so that it need not be durable when the device
	// is stopped for a snapshot.
	Captured bool
}

// ErrConfig is wrapped by errors about a Config.
var ErrConfig = errors.New("blk: invalid configuration")

// Device is a block device. Use New.
type Device struct {
	cfg   Config
	host  virtio.Host
	slots chan struct{} // one is taken for each request under way
	// full says that Serve found no slot, so that the next request to end wakes the worker.
	full atomic.Bool

	// Of the worker, and of the transport while the device is stopped.
	queue    *virtio.Queue
	features virtio.Feature // that were negotiated
}

// New makes a device.
func New(cfg Config) (*Device, error) {
	if cfg.Workers == 0 {
		cfg.Workers = defaultWorkers
	}
	if cfg.Disk == nil {
		return nil, fmt.Errorf("%w: no disk", ErrConfig)
	}
	switch bs := cfg.Disk.BlockSize(); {
	case len(cfg.Serial) > serialSize:
		return nil, fmt.Errorf("%w: serial number %q has more than %d bytes", ErrConfig, cfg.Serial, serialSize)
	case cfg.Workers < 0 || cfg.Workers > queueSize:
		return nil, fmt.Errorf("%w: %d workers; give 1 to %d", ErrConfig, cfg.Workers, queueSize)
	case bs < sectorSize || bs&(bs-1) != 0 || cfg.Disk.Size()%int64(bs) != 0 || cfg.Disk.Size() <= 0:
		return nil, fmt.Errorf("%w: a disk of %d bytes in blocks of %d", ErrConfig, cfg.Disk.Size(), bs)
	}
	return &Device{cfg: cfg, slots: make(chan struct{}, cfg.Workers)}, nil
}

// Type implements virtio.Device.
func (d *Device) Type() virtio.DeviceType { return virtio.TypeBlock }

// Features implements virtio.Device.
func (d *Device) Features() virtio.Feature {
	f := FeatureSegMax | FeatureBlockSize | FeatureFlush
	if d.cfg.Disk.ReadOnly() {
		return f | FeatureReadOnly
	}
	return f | FeatureDiscard | FeatureWriteZeroes
}

// QueueSizes implements virtio.Device.
func (d *Device) QueueSizes() []uint16 { return []uint16{queueSize} }

// Attach implements virtio.Device.
func (d *Device) Attach(h virtio.Host) { d.host = h }

// config is the config space (section 5.2.4); fields of features that are not offered are zero.
func (d *Device) config() []byte {
	c := make([]byte, 60)
	le := binary.LittleEndian
	block := uint32(d.cfg.Disk.BlockSize())
	le.PutUint64(c[0:], uint64(d.cfg.Disk.Size()/sectorSize))
	le.PutUint32(c[12:], segMax)
	le.PutUint32(c[20:], block)
	if !d.cfg.Disk.ReadOnly() {
		le.PutUint32(c[36:], maxZeroSectors)   // max_discard_sectors
		le.PutUint32(c[40:], maxZeroSegments)  // max_discard_seg
		le.PutUint32(c[44:], block/sectorSize) // discard_sector_alignment
		le.PutUint32(c[48:], maxZeroSectors)   // max_write_zeroes_sectors
		le.PutUint32(c[52:], maxZeroSegments)  // max_write_zeroes_seg
		c[56] = 1                              // write_zeroes_may_unmap
	}
	return c
}

// ReadConfig implements virtio.Device.
func (d *Device) ReadConfig(off uint64, p []byte) {
	clear(p)
	if c := d.config(); off < uint64(len(c)) {
		copy(p, c[off:])
	}
}

// WriteConfig implements virtio.Device: nothing is writable without VIRTIO_BLK_F_CONFIG_WCE.
func (d *Device) WriteConfig(uint64, []byte) {}

// Start implements virtio.Device.
func (d *Device) Start(features virtio.Feature, queues []*virtio.Queue) {
	d.queue, d.features = queues[0], features
}

// Serve implements virtio.Device. A request is taken only when there is a slot for it: the others stay in the
// ring, for a snapshot too, and Serve never waits for the disk.
func (d *Device) Serve() error {
	for d.queue != nil && d.takeSlot() {
		c, err := d.queue.Pop()
		if c == nil || err != nil {
			<-d.slots
			return err
		}
		go d.work(d.queue, c, d.features)
	}
	return nil
}

func (d *Device) takeSlot() bool {
	for range 2 {
		select {
		case d.slots <- struct{}{}:
			return true
		default:
			// A request may have ended just before this was set, so look again.
			d.full.Store(true)
		}
	}
	return false
}

func (d *Device) work(q *virtio.Queue, c *virtio.Chain, features virtio.Feature) {
	if err := d.serve(q, c, features); err != nil {
		d.host.Fail(err)
	}
	<-d.slots
	if d.full.Swap(false) {
		d.host.Wake()
	}
}

// Stop implements virtio.Device: it takes every slot, so that no request has one. A disk that never answers
// holds it up until ctx ends.
func (d *Device) Stop(ctx context.Context) error {
	taken := 0
	defer func() {
		for range taken {
			<-d.slots
		}
	}()
	for ; taken < cap(d.slots); taken++ {
		select {
		case d.slots <- struct{}{}:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return nil
}

// Flush implements virtio.Flusher. When ctx ends first, the disk's own flush is left to end by itself, and may still be
// at it when the device is closed.
func (d *Device) Flush(ctx context.Context) error {
	if d.cfg.Captured {
		return nil
	}
	done := make(chan error, 1)
	go func() { done <- d.cfg.Disk.Flush() }()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// Reset implements virtio.Device.
func (d *Device) Reset() { d.queue = nil }

// stateVersion is the first byte of a saved state. The disk's size (8 bytes) and block size (4) follow, little-endian.
const (
	stateVersion = 1
	stateSize    = 1 + 8 + 4
)

// Save implements virtio.Device. The size is saved so that the guest does not go on with another disk.
func (d *Device) Save() ([]byte, error) {
	b := binary.LittleEndian.AppendUint64([]byte{stateVersion}, uint64(d.cfg.Disk.Size()))
	return binary.LittleEndian.AppendUint32(b, uint32(d.cfg.Disk.BlockSize())), nil
}

// Restore implements virtio.Device.
func (d *Device) Restore(b []byte) error {
	if len(b) != stateSize || b[0] != stateVersion {
		return virtio.StateErrorf("%d bytes of a block device that begin with %x: want version %d, %d bytes",
			len(b), b[:min(1, len(b))], stateVersion, stateSize)
	}
	size, block := binary.LittleEndian.Uint64(b[1:]), binary.LittleEndian.Uint32(b[9:])
	if size != uint64(d.cfg.Disk.Size()) || block != uint32(d.cfg.Disk.BlockSize()) {
		return virtio.StateErrorf("the disk had %d bytes in blocks of %d, the one here has %d in blocks of %d",
			size, block, d.cfg.Disk.Size(), d.cfg.Disk.BlockSize())
	}
	return nil
}

// Close implements virtio.Device. The disk stays open.
func (d *Device) Close() error { return nil }
