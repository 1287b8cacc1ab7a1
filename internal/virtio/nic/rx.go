package nic

import (
	"fmt"
	"time"
)

// past is a deadline that ends every Read.
var past = time.Unix(1, 0)

func (d *Device) startReader(size int) {
	d.backlog.begin()
	// New has proved that the tap takes deadlines; if it fails here, it is closed, and so Read fails too.
	_ = d.tap.SetReadDeadline(time.Time{})
	d.reader = make(chan struct{})
	go d.read(d.reader, size)
}

// stopReader ends the reader if there is one. A frame that it has read is in the backlog then.
func (d *Device) stopReader() {
	if d.reader == nil {
		return
	}
	d.backlog.end()
	_ = d.tap.SetReadDeadline(past) // as in startReader
	<-d.reader
	d.reader = nil
}

// read moves frames from the tap to the backlog. It has a byte more of room than the longest frame needs, so
// that a longer one is noticed.
func (d *Device) read(done chan<- struct{}, size int) {
	defer close(done)
	for {
		slot := d.backlog.reserve(size + 1)
		if slot == nil {
			return
		}
		n, err := d.tap.Read(slot)
		switch {
		case err != nil && d.backlog.isEnding():
			return // by the deadline; if for another reason, the next reader will see it
		case err != nil:
			d.unplug(err)
			return
		case n > size || !whole(slot[:n]):
			d.stats.rxDropped.Add(1)
		case d.backlog.add(n):
			d.host.Wake() // not for every frame: the worker takes all there are
		}
	}
}

// unplug takes the link down. To the driver this is a cable that was pulled, no fault that calls for a reset.
func (d *Device) unplug(err error) {
	d.mu.Lock()
	d.link = fmt.Errorf("nic: read the tap: %w", err)
	d.mu.Unlock()
	d.host.ConfigChanged()
}

// deliver moves frames from the backlog to buffers of the driver, while there are both. Buffers are asked for only
// when there is a frame, so that none is held without one.
func (d *Device) deliver() (n int, err error) {
	if d.rx == nil {
		return 0, nil
	}
	for n < backlogFrames {
		frame := d.backlog.head()
		if frame == nil {
			break
		}
		c, err := d.rx.Pop()
		if err != nil {
			return n, err
		}
		if c == nil {
			break
		}
		n++
		setHeader(frame, 1)
		written := len(frame)
		if c.Writable.Len() < int64(len(frame)) {
			written = 0 // the driver gets its buffer back, and the frame is dropped
		} else if err = c.Writable.WriteAt(frame, 0); err != nil {
			written = 0
		}
		d.backlog.take()
		if written > 0 {
			d.stats.rxFrames.Add(1)
		} else {
			d.stats.rxDropped.Add(1)
		}
		if err := complete(d.rx, c, uint32(written), err); err != nil {
			return n, err
		}
	}
	return n, d.rx.Notify()
}
