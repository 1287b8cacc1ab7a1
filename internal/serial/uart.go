// Package serial emulates the 16550A UART of a PC serial port: the console of a guest.
//
// The register model follows the National Semiconductor PC16550D data sheet (June 1995), as far as
// the 8250 driver of Linux probes and uses it. Line speed is not modelled: a byte is sent, and a
// receive time-out has passed, at once. Guest output passes through a bounded queue to an
// io.Writer that a goroutine of the UART feeds, so that a slow writer slows the guest down through
// the transmitter-empty bit, as a slow line would, and never blocks the thread that runs a vCPU.
package serial

import (
	"context"
	"io"
	"sync"
)

// Ports is the number of I/O ports that a UART decodes.
const Ports = 8

// COM1 is the first I/O port of the first PC serial port, and COM1IRQ its interrupt.
const (
	COM1    = 0x3f8
	COM1IRQ = 4
)

// Register offsets from the first port (PC16550D, table II). RBR and THR share one, as do IIR and FCR;
// DLL and DLM take the place of RBR/THR and IER while LCR's DLAB bit is set.
const (
	regData = 0
	regIER  = 1
	regIIR  = 2
	regLCR  = 3
	regMCR  = 4
	regLSR  = 5
	regMSR  = 6
	regSCR  = 7
)

// Register bits (PC16550D, section 8).
const (
	ierRDA  = 0x01 // received data available
	ierTHRE = 0x02 // transmitter holding register empty
	ierRLS  = 0x04 // receiver line status
	ierMS   = 0x08 // modem status
	ierMask = 0x0f

	iirMS      = 0x00
	iirNone    = 0x01
	iirTHRE    = 0x02
	iirRDA     = 0x04
	iirRLS     = 0x06
	iirTimeout = 0x0c
	iirFIFO    = 0xc0 // FIFOs are on

	fcrEnable  = 0x01
	fcrClearRX = 0x02
	fcrTrigger = 0xc0
	fcrKept    = fcrEnable | fcrTrigger

	lcrDLAB = 0x80

	mcrDTR  = 0x01
	mcrRTS  = 0x02
	mcrOUT1 = 0x04
	mcrOUT2 = 0x08
	mcrLoop = 0x10
	mcrMask = 0x1f

	lsrDR   = 0x01 // data ready
	lsrOE   = 0x02 // overrun
	lsrTHRE = 0x20
	lsrTEMT = 0x40

	msrDelta = 0x0f
	msrTERI  = 0x04
	msrCTS   = 0x10
	msrDSR   = 0x20
	msrRI    = 0x40
	msrDCD   = 0x80
)

const (
	// fifoSize is the depth of the receive FIFO in bytes.
	fifoSize = 16
	// InputBacklog is how many input bytes a UART holds for a guest beyond its receive FIFO.
	InputBacklog = 4096
	// txSoftLimit is how many output bytes may wait for the writer before the guest is told to wait.
	txSoftLimit = 64 << 10
	// txHardLimit bounds what a guest can queue that writes although it was told to wait.
	txHardLimit = 256 << 10
)

// Config says what a UART is connected to.
type Config struct {
	// Out receives what the guest sends, in order, from one goroutine; nil discards it.
	// A Writer that fails is not used again: see UART.Err.
	Out io.Writer
	// IRQ sets the level of the interrupt line; nil leaves the line unconnected. It is called only when
	// the level changes (and once by Restore), one call at a time, from whatever goroutine caused
	// the change, with the UART locked: it must not call the UART.
	IRQ func(level bool) error
}

// UART is one serial port. Its methods may be called from any goroutine.
type UART struct {
	out io.Writer
	irq func(bool) error

	mu    sync.Mutex
	regs  registers
	line  bool  // level of the interrupt line
	fault error // first failure of irq

	fifo    []byte // receive FIFO, at most fifoSize
	backlog []byte // input that has not reached the FIFO, at most InputBacklog
	space   *sync.Cond

	tx txQueue

	life context.Context // ends with Close, and the pumps with it
	end  context.CancelFunc
}

// registers is what the guest can read back or has set.
type registers struct {
	ier, fcr, lcr, mcr, scr byte
	dll, dlm                byte
	lsrErr                  byte // error bits, cleared by reading LSR
	msr                     byte // lines and their delta bits
	threPending             bool // a THRE interrupt has not been acknowledged
	handshake               bool // the guest has set MCR: input waits for RTS
}

// New returns a UART in the state that a reset leaves, and starts the goroutine that feeds
// cfg.Out. Close ends it.
func New(cfg Config) *UART {
	u := &UART{out: cfg.Out, irq: cfg.IRQ}
	if u.out == nil {
		u.out = io.Discard
	}
	u.space = sync.NewCond(&u.mu)
	u.tx.init(&u.mu)
	u.life, u.end = context.WithCancel(context.Background())
	// 1 is the divisor of 115200 baud, which firmware would have left.
	u.regs = registers{dll: 1, msr: msrCTS | msrDSR | msrDCD}
	go u.transmit()
	return u
}

// Read returns the value of the register at off (0 to Ports-1; only the low three bits count).
// An error is a failure of the interrupt line; the value is good even so.
func (u *UART) Read(off uint16) (byte, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	v := u.read(off % Ports)
	u.update()
	return v, u.fault
}

// Write sets the register at off (0 to Ports-1; only the low three bits count). An error is a failure of
// the interrupt line; the write took effect even so.
func (u *UART) Write(off uint16, v byte) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.write(off%Ports, v)
	u.update()
	return u.fault
}

func (u *UART) read(off uint16) byte {
	r := &u.regs
	dlab := r.lcr&lcrDLAB != 0
	switch {
	case off == regData && dlab:
		return r.dll
	case off == regIER && dlab:
		return r.dlm
	}
	switch off {
	case regData:
		return u.receive()
	case regIER:
		return r.ier
	case regIIR:
		return u.readIIR()
	case regLCR:
		return r.lcr
	case regMCR:
		return r.mcr
	case regLSR:
		v := u.lsr()
		r.lsrErr = 0
		return v
	case regMSR:
		v := r.msr
		r.msr &^= msrDelta
		return v
	default:
		return r.scr
	}
}

func (u *UART) write(off uint16, v byte) {
	r := &u.regs
	dlab := r.lcr&lcrDLAB != 0
	switch {
	case off == regData && dlab:
		r.dll = v
		return
	case off == regIER && dlab:
		r.dlm = v
		return
	}
	switch off {
	case regData:
		u.send(v)
	case regIER:
		u.writeIER(v & ierMask)
	case regIIR: // FCR on writes
		u.writeFCR(v)
	case regLCR:
		r.lcr = v
	case regMCR:
		r.mcr, r.handshake = v&mcrMask, true
		u.updateModem()
		u.fill()
	case regSCR:
		r.scr = v
	}
	// LSR and MSR are for reading; the data sheet calls writing them factory testing.
}

// receive takes the next byte from the FIFO; an empty one reads as zero.
func (u *UART) receive() byte {
	if len(u.fifo) == 0 {
		return 0
	}
	b := u.fifo[0]
	u.fifo = append(u.fifo[:0], u.fifo[1:]...)
	u.fill()
	return b
}

// send transmits v: to the writer, or, in loopback, to the receiver.
func (u *UART) send(v byte) {
	u.regs.threPending = false
	if u.regs.mcr&mcrLoop != 0 {
		u.loopback(v)
		u.regs.threPending = true
		return
	}
	u.tx.put(v)
	u.regs.threPending = u.tx.ready()
}

func (u *UART) loopback(v byte) {
	if len(u.fifo) >= u.depth() {
		u.regs.lsrErr |= lsrOE
		return
	}
	u.fifo = append(u.fifo, v)
}

// depth is the capacity of the receiver in bytes.
func (u *UART) depth() int {
	if u.regs.fcr&fcrEnable == 0 {
		return 1
	}
	return fifoSize
}

func (u *UART) lsr() byte {
	v := u.regs.lsrErr
	if len(u.fifo) > 0 {
		v |= lsrDR
	}
	if u.regs.mcr&mcrLoop != 0 || u.tx.ready() {
		v |= lsrTHRE | lsrTEMT
	}
	return v
}

// writeIER re-raises the THRE interrupt when it is switched on with the transmitter empty, even one
// that had been acknowledged: Linux tests the port for just that.
func (u *UART) writeIER(v byte) {
	r := &u.regs
	if (r.ier^v)&ierTHRE != 0 {
		r.threPending = v&ierTHRE != 0 && u.lsr()&lsrTHRE != 0
	}
	r.ier = v
}

// writeFCR follows the data sheet, 8.4: changing the enable bit empties the FIFOs, and the other
// bits count only when it is set. Bytes that wait for the writer have left the transmitter as far as the
// guest can tell, so that clearing the transmit FIFO takes none back.
func (u *UART) writeFCR(v byte) {
	r := &u.regs
	toggled := (r.fcr^v)&fcrEnable != 0
	if toggled || v&(fcrEnable|fcrClearRX) == fcrEnable|fcrClearRX {
		u.fifo = u.fifo[:0]
	}
	r.fcr = 0
	if v&fcrEnable != 0 {
		r.fcr = v & fcrKept
	}
	u.fill()
}

// updateModem derives the modem lines, which in loopback are the modem outputs (data sheet, 8.6), and
// elsewhere a peer that is always there.
func (u *UART) updateModem() {
	r := &u.regs
	lines := byte(msrCTS | msrDSR | msrDCD)
	if r.mcr&mcrLoop != 0 {
		lines = 0
		for _, m := range [...]struct{ out, in byte }{
			{mcrRTS, msrCTS}, {mcrDTR, msrDSR}, {mcrOUT1, msrRI}, {mcrOUT2, msrDCD},
		} {
			if r.mcr&m.out != 0 {
				lines |= m.in
			}
		}
	}
	changed := (r.msr ^ lines) & 0xf0 >> 4
	if lines&msrRI != 0 {
		changed &^= msrTERI // set by the trailing edge only
	}
	r.msr = lines | r.msr&msrDelta | changed
}

// pending returns the identification of the enabled interrupt with the highest priority.
func (u *UART) pending() byte {
	r := &u.regs
	switch {
	case r.ier&ierRLS != 0 && r.lsrErr != 0:
		return iirRLS
	case r.ier&ierRDA != 0 && len(u.fifo) >= u.trigger():
		return iirRDA
	case r.ier&ierRDA != 0 && len(u.fifo) > 0:
		return iirTimeout
	case r.ier&ierTHRE != 0 && r.threPending:
		return iirTHRE
	case r.ier&ierMS != 0 && r.msr&msrDelta != 0:
		return iirMS
	}
	return iirNone
}

// trigger is the FIFO level, in bytes, that raises the data interrupt.
func (u *UART) trigger() int {
	if u.regs.fcr&fcrEnable == 0 {
		return 1
	}
	return [4]int{1, 4, 8, 14}[u.regs.fcr>>6]
}

// readIIR acknowledges a THRE interrupt, and no other, by reporting it.
func (u *UART) readIIR() byte {
	id := u.pending()
	if id == iirTHRE {
		u.regs.threPending = false
	}
	if u.regs.fcr&fcrEnable != 0 {
		id |= iirFIFO
	}
	return id
}

// update drives the interrupt line. A PC gates the line with OUT2; this port does not, for the sake of
// small guests that don't know it.
func (u *UART) update() {
	level := u.pending() != iirNone
	if level != u.line {
		u.drive(level)
	}
}

func (u *UART) drive(level bool) {
	u.line = level
	if u.irq == nil {
		return
	}
	if err := u.irq(level); err != nil && u.fault == nil {
		u.fault = &IRQError{Level: level, Err: err}
	}
}
