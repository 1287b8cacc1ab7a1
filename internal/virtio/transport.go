package virtio

import (
	"context"
	"fmt"
)

// Config connects a Transport to its machine.
type Config struct {
	Memory Memory
	// Doorbell wakes the worker. It belongs to the Transport from New on, which closes it. With KVM it is an
	// EventFD that a 4-byte write of any value to NotifyOffset signals.
	Doorbell Doorbell
	// Interrupt sends one edge on the interrupt line of the device. It is called from any goroutine, one call at a
	// time, and must not call the Transport.
	Interrupt func() error
}

// Transport is a Device behind MMIO registers. Its methods may be called from any goroutine; those that change
// its lifecycle wait for each other.
type Transport struct {
	dev    Device
	bell   Doorbell
	queues []*Queue
	line   line
	config configSpace

	mu       lock // of all below; held while the device is started and stopped
	selected selectors
	features Feature // that the driver accepted
	quiesced bool
	closed   bool
	started  bool // the device is, between Start and Stop
	worker   *worker
}

// selectors are registers that say what others mean.
type selectors struct {
	deviceFeatures, driverFeatures, queue uint32
}

// New puts dev behind registers, in the state that a reset leaves. The Transport takes dev and the doorbell, also
// when it fails, and Close gives them back.
func New(dev Device, cfg Config) (*Transport, error) {
	t := &Transport{dev: dev, bell: cfg.Doorbell, config: configSpace{dev: dev}, mu: newLock()}
	t.line.send = cfg.Interrupt
	for i, max := range dev.QueueSizes() {
		if !validSize(max) || max > MaxQueueSize {
			_ = dev.Close() // nothing was asked of it
			_ = t.bell.Close()
			return nil, fmt.Errorf("virtio: queue %d of device type %d: size %d is no power of two up to %d", i, dev.Type(), max, MaxQueueSize)
		}
		q := &Queue{mem: cfg.Memory, interrupt: t.line.used, index: i, max: max}
		q.reset()
		t.queues = append(t.queues, q)
	}
	dev.Attach(host{t})
	return t, nil
}

// host is the Transport as the device sees it.
type host struct{ t *Transport }

func (h host) Wake()          { h.t.ring() }
func (h host) ConfigChanged() { h.t.line.configChanged() }
func (h host) Fail(err error) { h.t.line.fail(err) }

// Err returns why the device last needed a reset (most often an error that wraps ErrProtocol), or the first
// failure of the interrupt line, or nil.
func (t *Transport) Err() error { return t.line.reason() }

// ring wakes the worker. A bell that can't be rung is a device that can't work.
func (t *Transport) ring() {
	if err := t.bell.Ring(); err != nil {
		t.line.fail(err)
	}
}

// halt makes Pop return nothing, or lets it again.
func (t *Transport) halt(stop bool) {
	for _, q := range t.queues {
		q.halted.Store(stop)
	}
}

// start lets the device work, if the driver is ready and the machine not quiesced. t.mu is held.
func (t *Transport) start() {
	status, _ := t.line.get()
	if t.started || t.quiesced || t.closed || status&(statusDriverOK|statusNeedsReset) != statusDriverOK {
		return
	}
	queues := make([]*Queue, len(t.queues))
	for i, q := range t.queues {
		q.eventIdx = t.features&FeatureEventIdx != 0
		q.indirect = t.features&FeatureIndirect != 0
		if q.ready {
			queues[i] = q
		}
	}
	t.halt(false)
	t.started = true
	t.dev.Start(t.features, queues)
	t.work()
}

// stop is the opposite of start: when it returns nil, no chain is taken from a queue. If it fails, the device goes
// on working. t.mu is held.
func (t *Transport) stop(ctx context.Context) error {
	if !t.started {
		return nil
	}
	t.halt(true)
	err := t.worker.end(ctx, t.bell)
	if err == nil {
		err = t.dev.Stop(ctx)
	}
	if err != nil {
		t.halt(false)
		t.work()
		return fmt.Errorf("virtio: stop device type %d: %w", t.dev.Type(), err)
	}
	t.started = false
	return nil
}

// reset is a driver's reset. A request under way can't be abandoned, since it would write to memory that the
// driver puts to other use, so this takes as long as the slowest. t.mu is held.
func (t *Transport) reset() {
	// The error would be the context's.
	_ = t.stop(context.Background())
	t.dev.Reset()
	t.features = 0
	t.selected = selectors{}
	for _, q := range t.queues {
		q.reset()
	}
	t.line.reset()
}

// Quiesce stops the device: every request that it has taken is completed, it takes no more, and what it has
// written is on stable storage. The driver may still be interrupted until Quiesce returns. The
// vCPUs may run, but a driver's reset then waits for Quiesce, and Quiesce for a reset. Quiescing again does nothing.
// If ctx ends first, or the device fails to finish its work, the device goes on working.
func (t *Transport) Quiesce(ctx context.Context) error {
	if err := t.mu.LockContext(ctx); err != nil {
		return fmt.Errorf("virtio: stop device type %d, which its driver is resetting: %w", t.dev.Type(), err)
	}
	defer t.mu.Unlock()
	if t.closed {
		return ErrClosed
	}
	if err := t.stop(ctx); err != nil {
		return err
	}
	if f, ok := t.dev.(Flusher); ok && !t.quiesced {
		if err := f.Flush(ctx); err != nil {
			t.start()
			return fmt.Errorf("virtio: flush device type %d: %w", t.dev.Type(), err)
		}
	}
	t.quiesced = true
	return nil
}

// Resume lets a quiesced or restored device work again. It looks at every queue, and repeats an interrupt that
// the driver has not acknowledged: the edge may have been on its way to the interrupt controller when
// the state of that was saved. Resuming again does nothing.
func (t *Transport) Resume() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return ErrClosed
	}
	if !t.quiesced {
		return nil
	}
	t.quiesced = false
	t.start()
	t.line.again()
	return nil
}

// Close stops the device, when what it is doing is done, and gives back all that it and the Transport hold. Registers
// still answer, and do nothing. Closing again does nothing.
func (t *Transport) Close() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return nil
	}
	err := t.stop(context.Background())
	t.closed = true
	t.line.close()
	if err != nil {
		// The device can't finish, so end at least the worker.
		_ = t.worker.end(context.Background(), t.bell)
	}
	for _, e := range []error{t.dev.Close(), t.bell.Close()} {
		if err == nil {
			err = e
		}
	}
	return err
}
