package vsock

import (
	"fmt"

	"github.com/cryovisor/cryovisor/internal/virtio"
)

// take acts on a packet of the guest's. Whatever is wrong with it ends its connection at most; an error says that
// there is no packet at all.
func (d *Device) take(packet *virtio.Buffer) error {
	var b [headerSize]byte
	if err := packet.ReadAt(b[:], 0); err != nil {
		return err
	}
	h := decodeHeader(&b)
	if h.srcCID != d.cfg.CID || h.dstCID != hostCID || h.typ != typeStream {
		// After a resume with another CID, these are packets of old connections.
		d.refuse(h)
		return nil
	}
	k := key{guestPort: h.srcPort, hostPort: h.dstPort}
	c := d.conns[k]
	switch {
	case c == nil && h.op == opRequest && int64(h.len) <= packet.Len()-headerSize:
		d.requested(k, h)
		return nil
	case c == nil:
		d.refuse(h)
		return nil
	case h.op == opReset:
		d.drop(c)
		return nil
	}
	valid, err := c.take(h, packet)
	if err == nil && !valid {
		d.abort(c)
	}
	return err
}

// refuse answers a packet that belongs to no connection. A reset has no answer.
func (d *Device) refuse(h header) {
	if h.op != opReset {
		d.resets = append(d.resets, h.reset())
	}
}

// abort ends a connection and tells the guest.
func (d *Device) abort(c *conn) {
	d.resets = append(d.resets, c.header(opReset))
	d.drop(c)
}

// requested is the guest's wish for a connection to a host program.
func (d *Device) requested(k key, h header) {
	c := d.newConn(stateDialing)
	c.key = k
	c.held = true
	if !c.learnCredit(h) || !d.join(c) {
		d.refuse(h)
		return
	}
	d.conns[k] = c
	d.running.Go(func() { c.serveGuest(fmt.Sprintf("%s_%d", d.cfg.Path, k.hostPort)) })
}

// take acts on a packet of a connection that exists. It returns false if the guest must not send it.
func (c *conn) take(h header, packet *virtio.Buffer) (valid bool, err error) {
	if int64(h.len) > packet.Len()-headerSize || !c.learnCredit(h) {
		return false, nil
	}
	c.d.list(c) // with more credit it may have a packet
	if h.op == opResponse {
		if c.state != stateRequested {
			return false, nil
		}
		c.state = stateEstablished
		c.answer(true)
		return true, nil
	}
	if c.state != stateEstablished {
		return false, nil
	}
	switch h.op {
	case opRW:
		return c.takePayload(h, packet)
	case opCreditUpdate:
		return true, nil
	case opCreditRequest:
		c.owesCredit = true
		return true, nil
	case opShutdown:
		c.guestShut(h.flags)
		return true, nil
	}
	return false, nil
}

// takePayload takes bytes for the host. The guest must have said nothing of an end, and have credit for them. So they
// fit in the pipe, which has at least the room that the guest was told of.
func (c *conn) takePayload(h header, packet *virtio.Buffer) (valid bool, err error) {
	if c.shutByGuest&shutSend != 0 || uint64(c.received-c.reported)+uint64(h.len) > uint64(c.d.limits.window) {
		return false, nil
	}
	c.received += h.len
	for off, left := int64(headerSize), int(h.len); left > 0; {
		space := c.toHost.space()
		if len(space) == 0 {
			// The host program takes no more.
			c.toHost.commit(left)
			break
		}
		n := min(left, len(space))
		if err := packet.ReadAt(space[:n], off); err != nil {
			return true, err
		}
		c.toHost.commit(n)
		off, left = off+int64(n), left-n
	}
	return true, nil
}

// guestShut takes note that the guest will send, or receive, no more. A connection that is shut both ways ends with a
// reset (section 5.10.6.5); the host program still gets what is in the pipe.
func (c *conn) guestShut(flags uint32) {
	c.shutByGuest |= flags & shutBoth
	if c.shutByGuest&shutSend != 0 {
		c.toHost.end()
	}
	if c.shutByGuest&shutReceive != 0 {
		c.stopReading()
	}
	if c.shutByGuest == shutBoth {
		c.d.abort(c)
	}
}

// Ports of the host for connections that it begins, from a range that services don't use. They are taken in turn, so
// that one comes again late.
const (
	firstHostPort = 1 << 30
	lastHostPort  = 1<<31 - 1
)

// admit makes the connections that host programs want known to the worker. While the guest is to be told that all
// connections are gone they wait, for it would reset them as well.
func (d *Device) admit() {
	if d.owesReset && d.event != nil {
		return
	}
	d.mu.Lock()
	asking := d.asking
	d.asking = nil
	for _, c := range asking {
		c.held = true
	}
	d.mu.Unlock()
	for _, c := range asking {
		c.key = key{guestPort: c.port, hostPort: d.freePort(c.port)}
		d.conns[c.key] = c
		d.list(c)
	}
}

// freePort takes a host port that has no connection with a port of the guest. There is one, since there are more
// ports than connections.
func (d *Device) freePort(guestPort uint32) uint32 {
	for {
		port := d.nextPort
		d.nextPort++
		if d.nextPort > lastHostPort {
			d.nextPort = firstHostPort
		}
		if d.conns[key{guestPort, port}] == nil {
			return port
		}
	}
}
