package virtiotest

import (
	"sync"

	"github.com/cryovisor/cryovisor/internal/virtio"
)

// Bell is a Doorbell that knows when its worker has nothing to do.
type Bell struct {
	mu            sync.Mutex
	changed       *sync.Cond
	rung, waiting bool
	closed        bool
}

// NewBell returns a Bell that has not been rung.
func NewBell() *Bell {
	b := &Bell{}
	b.changed = sync.NewCond(&b.mu)
	return b
}

// Ring implements virtio.Doorbell.
func (b *Bell) Ring() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.rung = true
	b.changed.Broadcast()
	return nil
}

// Wait implements virtio.Doorbell.
func (b *Bell) Wait() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.waiting = true
	b.changed.Broadcast()
	for !b.rung && !b.closed {
		b.changed.Wait()
	}
	b.rung, b.waiting = false, false
	if b.closed {
		return virtio.ErrClosed
	}
	return nil
}

// Idle waits until the worker has heard every ring so far and waits for the next. There must be a worker.
func (b *Bell) Idle() {
	b.mu.Lock()
	defer b.mu.Unlock()
	for b.rung || !b.waiting {
		b.changed.Wait()
	}
}

// Close implements virtio.Doorbell.
func (b *Bell) Close() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.closed = true
	b.changed.Broadcast()
	return nil
}
