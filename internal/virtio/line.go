package virtio

import "sync"

// Bits of the device status (section 2.1).
const (
	statusAcknowledge = 1 << 0
	statusDriver      = 1 << 1
	statusDriverOK    = 1 << 2
	statusFeaturesOK  = 1 << 3
	statusNeedsReset  = 1 << 6
	statusFailed      = 1 << 7

	statusDrivers = statusAcknowledge | statusDriver | statusDriverOK | statusFeaturesOK | statusFailed
	statusAll     = statusDrivers | statusNeedsReset
)

// Bits of the interrupt status (section 4.2.2).
const (
	interruptUsed   = 1 << 0
	interruptConfig = 1 << 1
	interruptAll    = interruptUsed | interruptConfig
)

// line is what the worker and the device change beside the driver: the device status and the interrupt line. It has a
// lock of its own, so that a driver's reset can wait for the worker.
//
// The line is edge-triggered: each event sets its status bit, then sends an edge, even if the bit was set. A
// driver acknowledges the bits before it looks at rings and config space, so an event between its read and
// its acknowledgement is not lost, but for an edge that finds no bit set.
type line struct {
	send func() error

	mu      sync.Mutex
	status  uint32
	pending uint32 // interrupt status
	err     error  // first failure of send, or why the device needs a reset
	closed  bool   // nothing is sent any more
}

func (l *line) get() (status, pending uint32) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.status, l.pending
}

func (l *line) set(status, pending uint32) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.status, l.pending = status, pending
}

// add sets bits of the status for the driver.
func (l *line) add(status uint32) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.status |= status
}

func (l *line) acknowledge(bits uint32) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.pending &^= bits
}

// used tells the driver of used buffers.
func (l *line) used() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.raise(interruptUsed)
}

// configChanged tells the driver of a change of the config space.
func (l *line) configChanged() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.raise(interruptConfig)
}

// fail makes the device need a reset.
func (l *line) fail(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed || l.status&statusNeedsReset != 0 {
		return
	}
	l.err = err
	l.status |= statusNeedsReset
	l.raise(interruptConfig)
}

func (l *line) failed() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.status&statusNeedsReset != 0
}

// again sends an edge if the driver has not acknowledged all there is.
func (l *line) again() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.pending != 0 {
		l.raise(l.pending)
	}
}

// reset is the state after a driver's reset. The reason of the last failure is kept.
func (l *line) reset() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.status, l.pending = 0, 0
}

// close makes later events, of a vCPU that still rings or of the device's host side, go nowhere.
func (l *line) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closed = true
}

func (l *line) reason() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.err
}

// raise sends an interrupt, which a driver only gets once it is ready (section 3.1.1). l.mu is held.
func (l *line) raise(bits uint32) {
	if l.closed || l.status&statusDriverOK == 0 {
		return
	}
	l.pending |= bits
	if err := l.send(); err != nil && l.err == nil {
		l.err = err
	}
}
