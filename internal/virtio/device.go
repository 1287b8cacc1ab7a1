package virtio

import "context"

// Memory is guest memory, addressed by guest physical address. Both methods move all of p or fail, fetch what
// is missing, and are full memory barriers; an aligned access of 2, 4 or 8 bytes is one load or store.
// memory.Memory is one.
type Memory interface {
	ReadAt(p []byte, gpa int64) (int, error)
	WriteAt(p []byte, gpa int64) (int, error)
}

// Feature is a set of feature bits (section 6).
type Feature uint64

// Features that the transport negotiates by itself; bits 0 to 23 and from 50 are the devices'.
const (
	FeatureIndirect Feature = 1 << 28 // VIRTIO_F_INDIRECT_DESC
	FeatureEventIdx Feature = 1 << 29 // VIRTIO_F_EVENT_IDX
	FeatureVersion1 Feature = 1 << 32 // VIRTIO_F_VERSION_1

	transportFeatures = FeatureIndirect | FeatureEventIdx | FeatureVersion1
)

// DeviceType is a device ID (section 5).
type DeviceType uint32

// Device types that the project has.
const (
	TypeNet     DeviceType = 1
	TypeBlock   DeviceType = 2
	TypeEntropy DeviceType = 4
	TypeBalloon DeviceType = 5
	TypeVsock   DeviceType = 19
)

// Device is what a device type adds to the transport. The transport calls Start, Serve, Stop, Reset, Save,
// Restore and Close one at a time, and the config methods at any time, from any vCPU.
//
// A device that has no goroutine of its own does everything in Serve, and its Stop and Close have nothing to do.
type Device interface {
	// Type, Features and QueueSizes are constant. Features are those of the device type only; QueueSizes has the
	// largest size of each queue, a power of two up to MaxQueueSize.
	Type() DeviceType
	Features() Feature
	QueueSizes() []uint16

	// Attach gives the device its host side. It is called once, before anything else.
	Attach(Host)

	// ReadConfig copies the config space at off to p, and zeroes what is beyond its end.
	ReadConfig(off uint64, p []byte)
	// WriteConfig is a driver's write to the config space; a device ignores what isn't writable.
	WriteConfig(off uint64, p []byte)

	// Start begins work, when the driver is ready and again after each Stop that is not followed by a Reset.
	// queues has a nil for each queue that the driver does not use. The device may use them until Stop returns.
	Start(features Feature, queues []*Queue)
	// Serve looks at every queue and does what can be done: Queue.Pop until it returns nil. It is called at
	// least once after Start and after each ring of the bell, by the worker. An error that wraps ErrProtocol is
	// the driver's fault; any error ends the device's work until it is reset.
	Serve() error
	// Stop completes every request that was taken from a queue. Serve is not running and won't before the next
	// Start. When Stop returns nil, no goroutine of the device uses a queue. The only error is the cause of ctx's
	// end, with requests unfinished. Then the device goes on as before the call, and Serve will be called
	// again without a Start.
	Stop(ctx context.Context) error

	// Reset forgets everything that the driver told the device. The device is stopped.
	Reset()
	// Save returns what the device has to remember besides the queues, nil for nothing. The device is stopped.
	Save() ([]byte, error)
	// Restore puts what Save returned in place of the device's state. Errors wrap ErrState. The device has
	// not been started.
	Restore(state []byte) error
	// Close gives back what the device holds. The device is stopped and not used again.
	Close() error
}

// Flusher is a Device that buffers what its driver believes to be stored.
type Flusher interface {
	// Flush makes all completed requests last. The device is stopped, for a snapshot.
	Flush(ctx context.Context) error
}

// Host is the transport as its device sees it. Its methods may be called from any goroutine.
type Host interface {
	// Wake has Serve called soon, if the device has been started.
	Wake()
	// ConfigChanged tells the driver that the config space has changed, after it has.
	ConfigChanged()
	// Fail ends the device's work until it is reset, as an error of Serve does.
	Fail(err error)
}
