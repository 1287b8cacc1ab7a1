package vsock

import (
	"net"
	"slices"
	"sync"
)

// state is where a connection is in the protocol.
type state int

const (
	stateAsking      state = iota // a host program wants it; the guest does not know
	stateRequested                // the guest was asked, and has not answered
	stateDialing                  // the guest wants it; the host's socket is being dialled
	stateEstablished              // both sides have agreed
	stateClosed                   // it is no more in the protocol; bytes for the host may be left
)

// maxGuestBuffer is how much of the guest's buffer is made use of. It keeps differences of counters unambiguous.
const maxGuestBuffer = 1 << 30

// conn is a connection.
type conn struct {
	d       *Device
	toGuest *pipe
	toHost  *pipe

	// answered is closed when the guest has said whether it accepts what a host program wants, in accepted.
	answered chan struct{}
	accepted bool
	port     uint32 // of the guest, that a host program has named

	listed, held, over bool // guarded by d.mu: on the ready list; used by the worker; its goroutines have ended

	mu     sync.Mutex
	socket *net.UnixConn // nil until the host's socket is dialled
	failed bool          // it can't be
	deaf   bool          // no more is to be read from it

	// The worker's.
	key                     key
	state                   state
	sent, forwarded         uint32 // bytes to the guest, and how many of them have left its buffer
	guestBuffer             uint32 // size
	received                uint32 // bytes from the guest
	reported                uint32 // fwd_cnt as the guest was last told
	owesCredit, askedCredit bool   // the guest has asked for an update; was asked for one
	shutByHost, shutByGuest uint32 // flags of the shutdowns that were sent and received
	answeredOnce            bool   // answered is closed
}

func (d *Device) newConn(s state) *conn {
	return &conn{
		d: d, state: s, answered: make(chan struct{}),
		toGuest: newPipe(d.limits.window), toHost: newPipe(d.limits.window),
	}
}

// header is a packet to the guest, with the credit that it has.
func (c *conn) header(op uint16) header {
	return header{
		srcCID: hostCID, dstCID: c.d.cfg.CID, srcPort: c.key.hostPort, dstPort: c.key.guestPort,
		typ: typeStream, op: op, bufAlloc: uint32(c.d.limits.window), fwdCnt: c.toHost.count(),
	}
}

// credit is how many bytes the guest has room for (section 5.10.6.3).
func (c *conn) credit() uint32 {
	underWay := c.sent - c.forwarded
	if underWay >= c.guestBuffer {
		return 0
	}
	return c.guestBuffer - underWay
}

// learnCredit takes over what the guest says about its buffer. A count from before the last one is of a packet
// that another overtook, and ignored. One of bytes that the guest was never sent is a lie: then it returns false.
func (c *conn) learnCredit(h header) bool {
	switch ahead := h.fwdCnt - c.forwarded; {
	case ahead <= c.sent-c.forwarded:
		c.forwarded = h.fwdCnt
	case ahead < 1<<31:
		return false
	}
	c.guestBuffer = min(h.bufAlloc, maxGuestBuffer)
	if c.credit() > 0 {
		c.askedCredit = false
	}
	return true
}

// hostShut is what the guest should know of the host's end: that nothing more will come, nothing more be taken.
func (c *conn) hostShut() uint32 {
	var flags uint32
	if c.toGuest.drained() {
		flags |= shutSend
	}
	if c.toHost.abandoned() {
		flags |= shutReceive
	}
	return flags
}

// next is the operation of the next packet for the guest, opInvalid if there is none.
func (c *conn) next() uint16 {
	switch c.state {
	case stateAsking:
		return opRequest
	case stateDialing:
		return c.dialled()
	case stateRequested, stateClosed:
		return opInvalid
	}
	waiting := len(c.toGuest.data()) > 0
	switch {
	case c.owesCredit || c.creditGrown():
		return opCreditUpdate
	case waiting && c.credit() > 0:
		return opRW
	case waiting && !c.askedCredit:
		return opCreditRequest
	case c.hostShut() != c.shutByHost:
		return opShutdown
	}
	return opInvalid
}

// creditGrown reports whether the guest should be told of room that it does not know of: a quarter of the buffer. So
// as long as the host program reads, the guest sees at least three quarters free.
func (c *conn) creditGrown() bool {
	grown := c.toHost.count() - c.reported
	return c.shutByGuest&shutSend == 0 && grown > 0 && grown >= uint32(c.d.limits.window/4)
}

// dialled is the answer to the guest, when there is one.
func (c *conn) dialled() uint16 {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.failed:
		return opReset
	case c.socket != nil:
		return opResponse
	}
	return opInvalid
}

// packetSent takes note of what the guest was told.
func (c *conn) packetSent(h header) {
	c.reported = h.fwdCnt
	switch h.op {
	case opRequest:
		c.state = stateRequested
	case opResponse:
		c.state = stateEstablished
	case opReset:
		c.d.drop(c)
	case opRW:
		c.sent += h.len
		c.toGuest.consume(int(h.len))
	case opCreditUpdate:
		c.owesCredit = false
	case opCreditRequest:
		c.askedCredit = true
	case opShutdown:
		c.shutByHost = h.flags
	}
}

// answer tells a host program whether the guest accepts. Only the first answer counts.
func (c *conn) answer(accepted bool) {
	if c.answeredOnce {
		return
	}
	c.answeredOnce, c.accepted = true, accepted
	close(c.answered)
}

// hangUp ends what the worker does with the connection: nothing more for the guest, and for the host what it was sent.
func (c *conn) hangUp() {
	c.state = stateClosed
	c.stopReading()
	c.toHost.end()
	c.answer(false)
}

// drop takes c out of the protocol.
func (d *Device) drop(c *conn) {
	delete(d.conns, c.key)
	c.hangUp()
	d.mu.Lock()
	defer d.mu.Unlock()
	c.held = false
	if c.listed {
		c.listed = false
		d.ready = slices.DeleteFunc(d.ready, func(other *conn) bool { return other == c })
	}
	if c.over {
		delete(d.all, c)
	}
}
