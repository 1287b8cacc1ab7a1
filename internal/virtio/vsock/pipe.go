package vsock

import "sync"

// pipe is a bounded buffer of bytes from one producer to one consumer: the worker, which never waits, and a goroutine
// at the host's socket, which does. Each works in place on the part of the ring that is its own; the lock guards
// only where the parts begin.
type pipe struct {
	mu       sync.Mutex
	changed  *sync.Cond
	limit    int
	ring     []byte // of limit bytes; allocated for the first byte
	start, n int    // what is in it
	taken    uint32 // bytes that have left, modulo 2^32
	ended    bool   // the producer adds no more
	gone     bool   // the consumer takes no more: what comes is dropped, and counted as taken
}

func newPipe(limit int) *pipe {
	p := &pipe{limit: limit}
	p.changed = sync.NewCond(&p.mu)
	return p
}

// space is where the producer puts bytes, as many as fit in one piece. It is empty if the pipe is full or the
// consumer gone.
func (p *pipe) space() []byte {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.free()
}

// waitSpace is space when there is some, or nil when the consumer is gone.
func (p *pipe) waitSpace() []byte {
	p.mu.Lock()
	defer p.mu.Unlock()
	for p.n == p.limit && !p.gone {
		p.changed.Wait()
	}
	return p.free()
}

func (p *pipe) free() []byte {
	if p.gone || p.n == p.limit {
		return nil
	}
	if p.ring == nil {
		p.ring = make([]byte, p.limit)
	}
	from := (p.start + p.n) % p.limit
	return p.ring[from:min(p.limit, from+p.limit-p.n)]
}

// commit adds the first n bytes of what space returned, or of what would have been there were the consumer not gone.
func (p *pipe) commit(n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.gone {
		p.taken += uint32(n)
		return
	}
	p.n += n
	p.changed.Broadcast()
}

// end says that the producer adds no more.
func (p *pipe) end() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.ended = true
	p.changed.Broadcast()
}

// data is what the consumer finds, as far as it is in one piece.
func (p *pipe) data() []byte {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.filled()
}

// waitData is data when there is some, or nil when there will be none.
func (p *pipe) waitData() []byte {
	p.mu.Lock()
	defer p.mu.Unlock()
	for p.n == 0 && !p.ended && !p.gone {
		p.changed.Wait()
	}
	return p.filled()
}

func (p *pipe) filled() []byte {
	if p.n == 0 {
		return nil
	}
	return p.ring[p.start:min(p.limit, p.start+p.n)]
}

// consume takes the first n bytes of what data returned.
func (p *pipe) consume(n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.start = (p.start + n) % p.limit
	p.n -= n
	p.taken += uint32(n)
	p.changed.Broadcast()
}

// abandon says that the consumer takes no more, and drops what is in the pipe. The producer may still be filling the
// space that it got; so the ring is left to it.
func (p *pipe) abandon() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.gone = true
	p.taken += uint32(p.n)
	p.n, p.ring = 0, nil
	p.changed.Broadcast()
}

// count is how many bytes have left the pipe, modulo 2^32.
func (p *pipe) count() uint32 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.taken
}

// drained reports whether the producer has ended and everything was taken.
func (p *pipe) drained() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.ended && p.n == 0
}

// abandoned reports whether the consumer is gone.
func (p *pipe) abandoned() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.gone
}
