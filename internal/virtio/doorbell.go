package virtio

import "sync"

// Doorbell is what wakes a worker. Rings collapse: one Wait returns for all of the rings since the one before.
type Doorbell interface {
	// Ring never blocks.
	Ring() error
	// Wait blocks until the bell has been rung since the last Wait returned. It fails once the bell is closed.
	Wait() error
	Close() error
}

// Bell is a Doorbell within this process, for transports without KVM. Use NewBell.
type Bell struct {
	rung   chan struct{}
	closed chan struct{}
	once   sync.Once
}

// NewBell returns a Bell that has not been rung.
func NewBell() *Bell {
	return &Bell{rung: make(chan struct{}, 1), closed: make(chan struct{})}
}

// Ring implements Doorbell; it never fails.
func (b *Bell) Ring() error {
	select {
	case b.rung <- struct{}{}:
	default:
	}
	return nil
}

// Wait implements Doorbell.
func (b *Bell) Wait() error {
	select {
	case <-b.closed:
		return ErrClosed
	default:
	}
	select {
	case <-b.rung:
		return nil
	case <-b.closed:
		return ErrClosed
	}
}

// Close implements Doorbell. It may be called more than once.
func (b *Bell) Close() error {
	b.once.Do(func() { close(b.closed) })
	return nil
}
