package nic

import "sync"

// backlogFrames is how many frames wait for buffers of the driver before the tap is read no more.
const backlogFrames = 64

// backlog is the frames, each behind its header, that were read from the tap and not delivered, in order. One
// goroutine adds to it and one takes from it. The slots in between belong to neither's lock: a slot is the
// reader's until it has added it, and then the worker's until that has taken it.
type backlog struct {
	mu      sync.Mutex
	changed *sync.Cond // there is room, or the reader is to end
	ending  bool       // the reader is to end

	slots        [backlogFrames][]byte // made when they are first needed
	lens         [backlogFrames]int
	first, count int
}

// begin lets a reader work.
func (b *backlog) begin() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.ending = false
}

// end lets reserve return nil.
func (b *backlog) end() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.ending = true
	b.changed.Broadcast()
}

func (b *backlog) isEnding() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.ending
}

// reserve waits for room and returns a slot of size bytes, or nil if the reader is to end.
func (b *backlog) reserve(size int) []byte {
	b.mu.Lock()
	defer b.mu.Unlock()
	for b.count == backlogFrames && !b.ending {
		b.changed.Wait()
	}
	if b.ending {
		return nil
	}
	slot := &b.slots[(b.first+b.count)%backlogFrames]
	if len(*slot) != size {
		*slot = make([]byte, size)
	}
	return *slot
}

// add appends the first n bytes of the slot that was reserved. It reports whether there was no frame before.
func (b *backlog) add(n int) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.lens[(b.first+b.count)%backlogFrames] = n
	b.count++
	return b.count == 1
}

// head returns the oldest frame, nil if there is none.
func (b *backlog) head() []byte {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.count == 0 {
		return nil
	}
	return b.slots[b.first][:b.lens[b.first]]
}

// take removes the oldest frame.
func (b *backlog) take() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.first = (b.first + 1) % backlogFrames
	b.count--
	b.changed.Broadcast()
}
