package virtio

import (
	"encoding/binary"
	"fmt"
	"math"
)

// A descriptor (section 2.7.5): address (8 bytes), length (4), flags (2), next (2).
const (
	descSize = 16

	descNext     = 1 // another descriptor follows
	descWrite    = 2 // writable by the device, else readable
	descIndirect = 4 // refers to a table of descriptors
)

type descriptor struct {
	addr        uint64
	len         uint32
	flags, next uint16
}

func decodeDescriptor(b []byte) descriptor {
	return descriptor{
		addr:  binary.LittleEndian.Uint64(b),
		len:   binary.LittleEndian.Uint32(b[8:]),
		flags: binary.LittleEndian.Uint16(b[12:]),
		next:  binary.LittleEndian.Uint16(b[14:]),
	}
}

// Chain is one request: what the driver wrote for the device, and room for the device's answer. Its descriptors were
// read once, when it was taken; the driver can't change them any more, but still the bytes that they refer to.
type Chain struct {
	// Readable is what the device reads, Writable what it writes.
	Readable, Writable Buffer

	head uint16
}

// Segment is a range of guest physical addresses. It need not be RAM.
type Segment struct {
	GPA uint64
	Len uint32
}

// Buffer is one half of a Chain: segments of guest memory, addressed by offset.
type Buffer struct {
	mem  Memory
	segs []Segment
	size int64
}

// Len is the length in bytes, below 2^32.
func (b *Buffer) Len() int64 { return b.size }

// Segments is what the buffer consists of, without empty segments, in order. At most twice as many as the
// queue can be long (descriptors, then an indirect table). The caller must not change it.
func (b *Buffer) Segments() []Segment { return b.segs }

// ReadAt copies all of p from offset off, or fails: with ErrProtocol if the buffer is shorter, else with
// Memory's error.
func (b *Buffer) ReadAt(p []byte, off int64) error {
	return b.each(p, off, b.mem.ReadAt)
}

// WriteAt copies all of p to offset off, or fails as ReadAt does.
func (b *Buffer) WriteAt(p []byte, off int64) error {
	return b.each(p, off, b.mem.WriteAt)
}

func (b *Buffer) each(p []byte, off int64, move func([]byte, int64) (int, error)) error {
	if off < 0 || off > b.size || int64(len(p)) > b.size-off {
		return ProtocolErrorf("a buffer of %d bytes is too short for %d bytes at offset %d", b.size, len(p), off)
	}
	for _, s := range b.segs {
		if len(p) == 0 {
			return nil
		}
		if off >= int64(s.Len) {
			off -= int64(s.Len)
			continue
		}
		n := min(int64(len(p)), int64(s.Len)-off)
		if _, err := move(p[:n], int64(s.GPA)+off); err != nil {
			return fmt.Errorf("virtio: buffer of a request: %w", err)
		}
		p, off = p[n:], 0
	}
	return nil
}

// chain reads the chain that begins at descriptor head of the queue's table.
func (q *Queue) chain(head uint16) (*Chain, error) {
	c := &Chain{head: head, Readable: Buffer{mem: q.mem}, Writable: Buffer{mem: q.mem}}
	var raw [descSize]byte
	for at, n := head, uint16(0); ; n++ {
		if at >= q.size {
			return nil, ProtocolErrorf("queue %d of size %d: descriptor %d", q.index, q.size, at)
		}
		if n == q.size {
			return nil, ProtocolErrorf("queue %d of size %d: a chain has a loop", q.index, q.size)
		}
		if err := q.read(raw[:], q.desc+descSize*uint64(at)); err != nil {
			return nil, err
		}
		d := decodeDescriptor(raw[:])
		if d.flags&descIndirect != 0 {
			return c, q.indirectChain(c, d)
		}
		if err := c.add(d); err != nil {
			return nil, err
		}
		if d.flags&descNext == 0 {
			return c, nil
		}
		at = d.next
	}
}

// indirectChain adds the descriptors of the table that d refers to (section 2.7.5.3). The table is read at once, so that
// the driver can't change it while it is checked. Its size is limited by what the device offers, not by what
// the driver chose, since Linux makes tables that are longer than a queue that it had to make shorter.
func (q *Queue) indirectChain(c *Chain, d descriptor) error {
	switch {
	case !q.indirect:
		return ProtocolErrorf("queue %d: indirect descriptors were not negotiated", q.index)
	case d.flags&descNext != 0:
		return ProtocolErrorf("queue %d: an indirect descriptor has a successor", q.index)
	case d.len == 0 || d.len%descSize != 0 || d.len > descSize*uint32(q.max):
		return ProtocolErrorf("queue %d: an indirect table of %d bytes", q.index, d.len)
	}
	table := make([]byte, d.len)
	if err := q.read(table, d.addr); err != nil {
		return err
	}
	entries := uint16(d.len / descSize)
	for at, n := uint16(0), uint16(0); ; n++ {
		if at >= entries {
			return ProtocolErrorf("queue %d: descriptor %d of an indirect table of %d", q.index, at, entries)
		}
		if n == entries {
			return ProtocolErrorf("queue %d: a chain in an indirect table has a loop", q.index)
		}
		e := decodeDescriptor(table[descSize*int(at):])
		if e.flags&descIndirect != 0 {
			return ProtocolErrorf("queue %d: an indirect table in an indirect table", q.index)
		}
		if err := c.add(e); err != nil {
			return err
		}
		if e.flags&descNext == 0 {
			return nil
		}
		at = e.next
	}
}

// add appends what d refers to.
func (c *Chain) add(d descriptor) error {
	if d.addr > math.MaxInt64-uint64(d.len) {
		return ProtocolErrorf("a buffer of %d bytes at %#x", d.len, d.addr)
	}
	b := &c.Readable
	if d.flags&descWrite != 0 {
		b = &c.Writable
	} else if c.Writable.segs != nil {
		return ProtocolErrorf("a device-readable buffer after a device-writable one")
	}
	if c.Readable.size+c.Writable.size+int64(d.len) > math.MaxUint32 {
		return ProtocolErrorf("a chain of 2^32 bytes or more")
	}
	if d.len > 0 {
		b.segs = append(b.segs, Segment{d.addr, d.len})
		b.size += int64(d.len)
	}
	return nil
}
