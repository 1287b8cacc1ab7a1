package nic

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cryovisor/cryovisor/internal/virtio"
)

// ErrConfig is wrapped by errors about a Config or a tap that can't be used as it is.
var ErrConfig = errors.New("nic: invalid configuration")

// Feature bits (section 5.1.3).
const (
	FeatureMTU      virtio.Feature = 1 << 3  // VIRTIO_NET_F_MTU
	FeatureMAC      virtio.Feature = 1 << 5  // VIRTIO_NET_F_MAC
	FeatureStatus   virtio.Feature = 1 << 16 // VIRTIO_NET_F_STATUS
	FeatureCtrlVQ   virtio.Feature = 1 << 17 // VIRTIO_NET_F_CTRL_VQ
	FeatureAnnounce virtio.Feature = 1 << 21 // VIRTIO_NET_F_GUEST_ANNOUNCE

	announceFeatures = FeatureStatus | FeatureCtrlVQ | FeatureAnnounce
	offered          = FeatureMTU | FeatureMAC | announceFeatures
)

// The queues, by index (section 5.1.2), and their sizes.
const (
	rxQueue, txQueue, ctrlQueue = 0, 1, 2

	dataQueueSize = 256
	ctrlQueueSize = 16
)

// DefaultMTU is the MTU of a Config that has none: Ethernet's.
const DefaultMTU = 1500

// minMTU is the least that a device may have (section 5.1.4.1).
const minMTU = 68

// Config is what a network device has behind it, and what it tells its driver.
type Config struct {
	// Tap belongs to the device from New on, if that succeeds, and Close closes it.
	Tap Tap
	// MAC is the address that the driver is to use: not zero, not a group's. A restored device has the one that
	// its driver knows instead.
	MAC [6]byte
	// MTU is the longest packet in an Ethernet frame, at least 68; 0 is DefaultMTU. It should be that of the tap: longer
	// frames are dropped in both directions. A restored device has the one that its driver knows instead.
	MTU uint16
}

// Stats counts frames since New. A dropped frame was too short, too long for the MTU or for the driver's
// buffer, not whole, or refused by the tap.
type Stats struct {
	RxFrames, RxDropped uint64
	TxFrames, TxDropped uint64
}

// Device is a network device. Use New.
type Device struct {
	tap     Tap
	host    virtio.Host
	backlog backlog
	stats   struct{ rxFrames, rxDropped, txFrames, txDropped atomic.Uint64 }

	// Of the worker, and of the transport while the device is stopped.
	rx, tx, ctrl *virtio.Queue // nil if the driver has none
	out          []byte        // header and frame on the way to the tap
	reader       chan struct{} // closed when the reader has ended; nil if there is none

	mu   sync.Mutex // of what the config space shows
	cfg  settings
	link error // why the link is down
}

// New makes a device that is plugged in. Errors wrap ErrConfig, and leave the tap to the caller.
func New(cfg Config) (*Device, error) {
	if cfg.MTU == 0 {
		cfg.MTU = DefaultMTU
	}
	d := &Device{tap: cfg.Tap, cfg: settings{mac: cfg.MAC, mtu: cfg.MTU}}
	d.backlog.changed = sync.NewCond(&d.backlog.mu)
	if err := d.cfg.check(); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrConfig, err)
	}
	if cfg.Tap == nil {
		return nil, fmt.Errorf("%w: there is no tap", ErrConfig)
	}
	if err := cfg.Tap.SetReadDeadline(time.Time{}); err != nil {
		return nil, fmt.Errorf("%w: the tap's reads can't be ended: %w", ErrConfig, err)
	}
	return d, nil
}

// Type implements virtio.Device, as the methods below do.
func (d *Device) Type() virtio.DeviceType { return virtio.TypeNet }

// Features returns what the device offers.
func (d *Device) Features() virtio.Feature { return offered }

// QueueSizes returns those of the receive, the transmit and the control queue.
func (d *Device) QueueSizes() []uint16 { return []uint16{dataQueueSize, dataQueueSize, ctrlQueueSize} }

// Attach is called once.
func (d *Device) Attach(h virtio.Host) { d.host = h }

// Start begins to read the tap. A driver that has not answered an announcement is told of it again.
func (d *Device) Start(features virtio.Feature, queues []*virtio.Queue) {
	d.rx, d.tx, d.ctrl = queues[rxQueue], queues[txQueue], nil
	if features&FeatureCtrlVQ != 0 {
		d.ctrl = queues[ctrlQueue]
	}
	d.mu.Lock()
	d.cfg.features = features
	size, news, down := bufferSize(d.cfg.mtu), d.cfg.announce, d.link != nil
	d.mu.Unlock()
	if len(d.out) != size {
		d.out = make([]byte, size)
	}
	if news {
		d.host.ConfigChanged()
	}
	if !down {
		d.startReader(size)
	}
}

// Serve moves frames in both directions, in turns, and obeys commands.
func (d *Device) Serve() error {
	for busy := true; busy; {
		busy = false
		for _, turn := range []func() (int, error){d.deliver, d.transmit, d.obey} {
			n, err := turn()
			if err != nil {
				return err
			}
			busy = busy || n > 0
		}
	}
	return nil
}

// Stop ends the reader, which takes no time worth a context. Requests are completed by Serve.
func (d *Device) Stop(context.Context) error {
	d.stopReader()
	return nil
}

// Reset forgets that an announcement was wanted: a new driver comes up with one of its own.
func (d *Device) Reset() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.cfg.announce, d.cfg.features = false, 0
}

// Close closes the tap.
func (d *Device) Close() error {
	d.stopReader()
	if err := d.tap.Close(); err != nil {
		return fmt.Errorf("nic: close the tap: %w", err)
	}
	return nil
}

// Stats may be called at any time.
func (d *Device) Stats() Stats {
	return Stats{
		RxFrames: d.stats.rxFrames.Load(), RxDropped: d.stats.rxDropped.Load(),
		TxFrames: d.stats.txFrames.Load(), TxDropped: d.stats.txDropped.Load(),
	}
}

// LinkErr returns why the link is down, nil while it is up. It goes down when the tap can't be read any more,
// and stays so. LinkErr may be called at any time.
func (d *Device) LinkErr() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.link
}
