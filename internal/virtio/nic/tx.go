package nic

import "github.com/cryovisor/cryovisor/internal/virtio"

// transmit moves frames from the driver to the tap, at most as many as the queue holds.
func (d *Device) transmit() (n int, err error) {
	if d.tx == nil {
		return 0, nil
	}
	for n < d.tx.Size() {
		c, err := d.tx.Pop()
		if err != nil {
			return n, err
		}
		if c == nil {
			break
		}
		n++
		sent, err := d.send(&c.Readable)
		if sent {
			d.stats.txFrames.Add(1)
		} else {
			d.stats.txDropped.Add(1)
		}
		if err := complete(d.tx, c, 0, err); err != nil {
			return n, err
		}
	}
	return n, d.tx.Notify()
}

// send writes header and frame b to the tap, and reports whether the tap took them. An error is the driver's fault.
func (d *Device) send(b *virtio.Buffer) (bool, error) {
	if b.Len() > int64(len(d.out)) {
		return false, nil
	}
	frame := d.out[:b.Len()]
	if err := b.ReadAt(frame, 0); err != nil {
		return false, err
	}
	if !whole(frame) {
		return false, nil
	}
	setHeader(frame, 0)
	_, err := d.tap.Write(frame)
	return err == nil, nil
}

// complete gives a chain back, also if err says that it was wrong: nobody else would. It returns the first error.
func complete(q *virtio.Queue, c *virtio.Chain, written uint32, err error) error {
	if perr := q.Push(c, written); err == nil {
		err = perr
	}
	return err
}
