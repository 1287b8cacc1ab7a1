package virtio

import (
	"encoding/binary"
	"fmt"
	"sync"
	"sync/atomic"
)

// MaxQueueSize is the largest size of a queue that a device may offer. The specification's limit is 32768; a
// driver sizes the device's allocations by it.
const MaxQueueSize = 1024

// Offsets and flags in the rings (sections 2.7.6 and 2.7.8). The driver area is the available ring, the
// device area the used ring.
const (
	ringIndex = 2 // offset of the index in both rings, after the flags
	ringStart = 4 // offset of the first element in both rings

	availElement = 2 // bytes
	usedElement  = 8

	availNoInterrupt = 1 // flag of the driver: it polls
)

// Queue is a split virtqueue (section 2.7) as its device sees it. Its methods may be called from any goroutine
// between the Start and the end of the Stop of its device.
type Queue struct {
	mem       Memory
	interrupt func() // tells the driver that there are used buffers
	index     int    // among the queues of its device
	max       uint16 // largest size that the device offers

	// Set by the transport, while the device is stopped.
	ready                bool
	size                 uint16 // a power of two up to max, or 0 while it is invalid
	desc, driver, device uint64 // GPA of the three areas
	eventIdx, indirect   bool   // features

	halted atomic.Bool // Pop returns nothing

	mu       sync.Mutex
	next     uint16 // position in the available ring of the next chain to take
	used     uint16 // position in the used ring of the next element to write
	notified uint16 // value of used when the driver was last told, or did not want to be
	taken    int    // chains taken and not given back
}

// Size is the number of elements in the queue's rings, and the largest number of chains under way.
func (q *Queue) Size() int { return int(q.size) }

// Pop takes the next request, or returns nil if there is none or the device is about to be stopped. When it
// returns nil the driver will ring for what it adds. Errors are about the queue, which can't be used any
// more: return them from Serve.
func (q *Queue) Pop() (*Chain, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.halted.Load() {
		return nil, nil
	}
	waiting, err := q.waiting()
	if err != nil || waiting == 0 {
		return nil, err
	}
	head, err := q.load16(q.driver + ringStart + availElement*uint64(q.next%q.size))
	if err != nil {
		return nil, err
	}
	c, err := q.chain(head)
	if err != nil {
		return nil, err
	}
	q.next++
	q.taken++
	return c, nil
}

// waiting returns how many chains the driver has added and nobody has taken. Before it returns 0 it asks the
// driver to ring for the next one, and looks again, since the driver may not have seen that in time.
func (q *Queue) waiting() (uint16, error) {
	idx, err := q.load16(q.driver + ringIndex)
	if err == nil && idx == q.next && q.eventIdx {
		if err = q.arm(q.next); err == nil {
			idx, err = q.load16(q.driver + ringIndex)
		}
	}
	if err != nil {
		return 0, err
	}
	n := idx - q.next
	if int(n)+q.taken > int(q.size) {
		return 0, ProtocolErrorf("queue %d of size %d: %d chains added while %d are under way", q.index, q.size, n, q.taken)
	}
	return n, nil
}

// Available returns how many requests there are to be taken, and has the driver ring when it adds another. Most devices
// need only Pop.
func (q *Queue) Available() (int, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	idx, err := q.load16(q.driver + ringIndex)
	if err == nil && q.eventIdx {
		if err = q.arm(idx); err == nil {
			idx, err = q.load16(q.driver + ringIndex)
		}
	}
	return int(idx - q.next), err
}

// arm writes avail_event (section 2.7.10), unless it is right: a resumed machine need not get a dirty page for
// each idle queue.
func (q *Queue) arm(position uint16) error {
	at := q.device + ringStart + usedElement*uint64(q.size)
	if event, err := q.load16(at); err != nil || event == position {
		return err
	}
	return q.store16(at, position)
}

// Push gives a chain back, with the number of bytes that were written to its device-writable part. Call Notify
// after the last of a batch. An error says that the rings are not in RAM; the chain is given up even so.
func (q *Queue) Push(c *Chain, written uint32) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.taken--
	var e [usedElement]byte
	binary.LittleEndian.PutUint32(e[:], uint32(c.head))
	binary.LittleEndian.PutUint32(e[4:], written)
	if err := q.write(e[:], q.device+ringStart+usedElement*uint64(q.used%q.size)); err != nil {
		return err
	}
	q.used++
	return q.store16(q.device+ringIndex, q.used)
}

// Notify interrupts the driver if chains were pushed since the last call and the driver wants to know.
func (q *Queue) Notify() error {
	q.mu.Lock()
	defer q.mu.Unlock()
	before := q.notified
	q.notified = q.used
	if before == q.used {
		return nil
	}
	wanted, err := q.wantsInterrupt(before)
	if err == nil && wanted {
		q.interrupt()
	}
	return err
}

func (q *Queue) wantsInterrupt(before uint16) (bool, error) {
	if !q.eventIdx {
		flags, err := q.load16(q.driver)
		return flags&availNoInterrupt == 0, err
	}
	// used_event (section 2.7.7): an interrupt when the element at this position has been written.
	event, err := q.load16(q.driver + ringStart + availElement*uint64(q.size))
	return q.used-event-1 < q.used-before, err
}

func (q *Queue) load16(gpa uint64) (uint16, error) {
	var b [2]byte
	err := q.read(b[:], gpa)
	return binary.LittleEndian.Uint16(b[:]), err
}

func (q *Queue) store16(gpa uint64, v uint16) error {
	var b [2]byte
	binary.LittleEndian.PutUint16(b[:], v)
	return q.write(b[:], gpa)
}

// read and write reach the rings. Addresses above 2^63 are negative to Memory, which refuses them.
func (q *Queue) read(p []byte, gpa uint64) error {
	if _, err := q.mem.ReadAt(p, int64(gpa)); err != nil {
		return fmt.Errorf("virtio: queue %d: %w", q.index, err)
	}
	return nil
}

func (q *Queue) write(p []byte, gpa uint64) error {
	if _, err := q.mem.WriteAt(p, int64(gpa)); err != nil {
		return fmt.Errorf("virtio: queue %d: %w", q.index, err)
	}
	return nil
}

// fits says what is wrong with the size and the addresses of a queue that is to be ready (section 2.7).
func (q *Queue) fits() error {
	switch {
	case !validSize(q.size) || q.size > q.max:
		return ProtocolErrorf("queue %d: size %d", q.index, q.size)
	case q.desc%16 != 0 || q.driver%2 != 0 || q.device%4 != 0:
		return ProtocolErrorf("queue %d: areas at %#x, %#x and %#x are not aligned", q.index, q.desc, q.driver, q.device)
	}
	return nil
}

func validSize(n uint16) bool { return n != 0 && n&(n-1) == 0 }

// reset is the state before a driver sets the queue up.
func (q *Queue) reset() {
	q.ready, q.size = false, q.max
	q.desc, q.driver, q.device = 0, 0, 0
	q.rewind()
}

// rewind is the start of both rings.
func (q *Queue) rewind() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.next, q.used, q.notified, q.taken = 0, 0, 0, 0
}

// idle reports whether every chain that was taken has been given back.
func (q *Queue) idle() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.taken == 0
}
