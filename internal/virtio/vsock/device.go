package vsock

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cryovisor/cryovisor/internal/virtio"
)

// featureStream is VIRTIO_VSOCK_F_STREAM (section 5.10.3). A driver that does not know it means the same.
const featureStream virtio.Feature = 1 << 0

// The queues (section 5.10.2), named as the driver sees them, and their size.
const (
	queueRX    = 0
	queueTX    = 1
	queueEvent = 2

	queueSize = 256
)

// Config says who the guest is and where its host programs are.
type Config struct {
	// CID is the guest's address: 3 to 0xfffffffe. No other machine needs to know it.
	CID uint64
	// Path is the unix socket on which host programs connect to the guest. Those that the guest connects to listen
	// on "<Path>_<port>". At most 88 bytes.
	Path string
}

// limits bound what a guest and host programs can make the device hold.
type limits struct {
	connections int           // at once, those included that have ended but have bytes for the host
	waiting     int           // clients that have not sent their CONNECT line; the next ones wait in the kernel
	line        time.Duration // for a client to send it
	window      int           // bytes under way in each direction of a connection
	resets      int           // not yet taken by the guest; with more of them, nothing is taken from it
	drain       time.Duration // for host programs to take what they were sent before Close
}

var defaultLimits = limits{
	connections: 1024, waiting: 64, line: 5 * time.Second, window: 64 << 10, resets: 256, drain: time.Second,
}

// Device is a socket device. See virtio.Device for its methods.
type Device struct {
	cfg      Config
	limits   limits
	listener *listener
	host     virtio.Host
	packets  atomic.Uint64 // exchanged with the guest, in both directions
	waiting  chan struct{} // has an element for each client that has not sent its line
	stop     chan struct{} // closed by Close
	running  sync.WaitGroup

	mu     sync.Mutex
	all    map[*conn]struct{} // that use anything
	asking []*conn            // of host programs, not known to the worker yet
	ready  []*conn            // that may have a packet for the guest
	closed bool

	// The worker's, or the transport's while there is none.
	rx, tx, event *virtio.Queue
	conns         map[key]*conn
	resets        []header // for the guest, in answer to packets of no connection
	owesReset     bool     // the guest has to be told that all connections are gone
	told          bool     // it was, and is not known to have done what it has to; see settled
	eventsLeft    int      // in the event queue when it was told
	nextPort      uint32   // to try for the next connection from the host
}

// key is what identifies a connection: there is one guest and one host.
type key struct {
	guestPort, hostPort uint32
}

// New listens on cfg.Path, where a socket that nobody listens on is replaced. Close ends that.
func New(cfg Config) (*Device, error) { return newDevice(cfg, defaultLimits) }

func newDevice(cfg Config, l limits) (*Device, error) {
	if cfg.CID < firstCID || cfg.CID > lastCID {
		return nil, fmt.Errorf("%w: CID %d: choose one from %d to %d", ErrConfig, cfg.CID, firstCID, uint32(lastCID))
	}
	if cfg.Path == "" || len(cfg.Path) > maxPath {
		return nil, fmt.Errorf("%w: path %q of %d bytes: choose one of 1 to %d", ErrConfig, cfg.Path, len(cfg.Path), maxPath)
	}
	socket, err := listen(cfg.Path)
	if err != nil {
		return nil, err
	}
	return &Device{
		cfg: cfg, limits: l, listener: socket,
		waiting: make(chan struct{}, l.waiting), stop: make(chan struct{}),
		all: map[*conn]struct{}{}, conns: map[key]*conn{}, nextPort: firstHostPort,
	}, nil
}

// Packets is how many packets were exchanged with the guest. It may be called at any time.
func (d *Device) Packets() uint64 { return d.packets.Load() }

// Type implements virtio.Device.
func (d *Device) Type() virtio.DeviceType { return virtio.TypeVsock }

// Features implements virtio.Device.
func (d *Device) Features() virtio.Feature { return featureStream }

// QueueSizes implements virtio.Device.
func (d *Device) QueueSizes() []uint16 { return []uint16{queueSize, queueSize, queueSize} }

// Attach implements virtio.Device.
func (d *Device) Attach(h virtio.Host) {
	d.host = h
	d.running.Go(d.acceptClients)
}

// ReadConfig implements virtio.Device: the config space is the guest's CID (section 5.10.4).
func (d *Device) ReadConfig(off uint64, p []byte) {
	clear(p)
	if config := binary.LittleEndian.AppendUint64(nil, d.cfg.CID); off < uint64(len(config)) {
		copy(p, config[off:])
	}
}

// WriteConfig implements virtio.Device: nothing is writable.
func (d *Device) WriteConfig(uint64, []byte) {}

// Start implements virtio.Device.
func (d *Device) Start(_ virtio.Feature, queues []*virtio.Queue) {
	d.rx, d.tx, d.event = queues[queueRX], queues[queueTX], queues[queueEvent]
}

// Stop implements virtio.Device. Nothing but Serve uses a queue, and it keeps no request.
func (d *Device) Stop(context.Context) error {
	d.rx, d.tx, d.event = nil, nil, nil
	return nil
}

// Reset implements virtio.Device. Clients that the guest has not been told of wait for the next driver.
func (d *Device) Reset() {
	for _, c := range d.conns {
		d.drop(c)
	}
	d.resets, d.owesReset, d.told = nil, false, false
}

// Close implements virtio.Device. Host programs get what the guest has sent them, if they take it soon.
func (d *Device) Close() error {
	close(d.stop)
	d.mu.Lock()
	d.closed = true
	var open []*conn
	for c := range d.all {
		open = append(open, c)
	}
	d.mu.Unlock()
	err := d.listener.Close()
	until := time.Now().Add(d.limits.drain)
	for _, c := range open {
		c.hangUp()
		err = errors.Join(err, c.endWrites(until))
	}
	d.running.Wait()
	return err
}
