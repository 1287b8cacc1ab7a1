package vsock

import (
	"encoding/binary"
	"errors"

	"github.com/cryovisor/cryovisor/internal/virtio"
)

// Serve implements virtio.Device. It goes on until neither side has anything for the other that can be taken. A
// driver must not depend on its packets being taken while it takes none (section 5.10.6.1).
func (d *Device) Serve() error {
	if d.rx == nil || d.tx == nil {
		return nil
	}
	for {
		if err := d.tellReset(); err != nil {
			return err
		}
		taken, err := d.takeAll()
		given, giveErr := d.giveAll()
		if err = errors.Join(err, giveErr); err != nil || !taken && !given {
			return err
		}
	}
}

// tellReset tells the guest that all connections are gone, when it has a buffer for that.
func (d *Device) tellReset() error {
	if !d.owesReset || d.event == nil {
		return nil
	}
	chain, err := d.event.Pop()
	if err != nil || chain == nil {
		return err
	}
	event := binary.LittleEndian.AppendUint32(nil, eventTransportReset)
	if d.eventsLeft, err = d.event.Available(); err == nil {
		err = chain.Writable.WriteAt(event, 0)
	}
	if err == nil {
		d.owesReset, d.told = false, true
	}
	return complete(d.event, chain, len(event), err, true)
}

// settled reports whether the guest has no connections of before a restore any more. When Linux comes to the event, it
// ends all connections that are established, and says nothing of it to the other side: one that it got to know of
// before that would hang. So it gets no packets until it has put the event's buffer back, which it does when it is done.
func (d *Device) settled() (bool, error) {
	if d.told && d.event != nil {
		n, err := d.event.Available()
		if err != nil || n <= d.eventsLeft {
			return false, err
		}
	}
	d.told = false
	return true, nil
}

// takeAll takes packets from the guest, until there are none, too many wait for their answer, or it is the other
// direction's turn.
func (d *Device) takeAll() (any bool, err error) {
	for n := 0; n < queueSize && len(d.resets) < d.limits.resets; n++ {
		chain, err := d.tx.Pop()
		if err != nil {
			return any, err
		}
		if chain == nil {
			break
		}
		any = true
		d.packets.Add(1)
		if err := complete(d.tx, chain, 0, d.take(&chain.Readable), false); err != nil {
			return any, err
		}
	}
	return any, d.tx.Notify()
}

// giveAll gives the guest packets, until there are none, it has no buffer, or it is the other direction's turn: resets
// first, then one of each connection in turn.
func (d *Device) giveAll() (any bool, err error) {
	if ok, err := d.settled(); err != nil || !ok {
		return false, err
	}
	d.admit()
	for n := 0; n < queueSize; n++ {
		var c *conn
		if len(d.resets) == 0 {
			if c = d.nextReady(); c == nil {
				break
			}
		}
		chain, err := d.rx.Pop()
		if err != nil || chain == nil {
			if c != nil {
				d.list(c)
			}
			return any, errors.Join(err, d.rx.Notify())
		}
		any = true
		d.packets.Add(1)
		if err := d.give(c, chain); err != nil {
			return any, err
		}
	}
	return any, d.rx.Notify()
}

// give puts the next packet of c, or the next reset if c is nil, in a buffer of the guest's.
func (d *Device) give(c *conn, chain *virtio.Chain) error {
	if c != nil {
		n, err := c.give(&chain.Writable)
		d.list(c)
		return complete(d.rx, chain, n, err, false)
	}
	err := chain.Writable.WriteAt(d.resets[0].append(nil), 0)
	if err == nil {
		d.resets = d.resets[1:]
	}
	return complete(d.rx, chain, headerSize, err, false)
}

// complete gives a chain back, of which n bytes were written, or none if there was an error.
func complete(q *virtio.Queue, chain *virtio.Chain, n int, err error, notify bool) error {
	if err != nil {
		n = 0
	}
	err = errors.Join(err, q.Push(chain, uint32(n)))
	if err == nil && notify {
		err = q.Notify()
	}
	return err
}

// nextReady is the connection that has waited longest of those that have a packet for the guest. It is off the list.
func (d *Device) nextReady() *conn {
	for {
		d.mu.Lock()
		if len(d.ready) == 0 {
			d.mu.Unlock()
			return nil
		}
		c := d.ready[0]
		d.ready = d.ready[1:]
		c.listed = false
		d.mu.Unlock()
		if c.next() != opInvalid {
			return c
		}
	}
}

// give puts the next packet in a buffer of the guest's, and returns its length.
func (c *conn) give(to *virtio.Buffer) (int, error) {
	if to.Len() <= headerSize {
		return 0, virtio.ProtocolErrorf("vsock: a receive buffer of %d bytes, without room for a byte of payload", to.Len())
	}
	h := c.header(c.next())
	switch h.op {
	case opRW:
		data := c.toGuest.data()
		n := min(int64(len(data)), int64(c.credit()), to.Len()-headerSize)
		if err := to.WriteAt(data[:n], headerSize); err != nil {
			return 0, err
		}
		h.len = uint32(n)
	case opShutdown:
		h.flags = c.hostShut()
	}
	if err := to.WriteAt(h.append(nil), 0); err != nil {
		return 0, err
	}
	c.packetSent(h)
	return headerSize + int(h.len), nil
}
