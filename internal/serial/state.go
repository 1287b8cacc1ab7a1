package serial

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// StateVersion is the version of the encoding that MarshalBinary writes.
const StateVersion = 1

// ErrState is wrapped by every error about a State, or its encoding, that no UART can have been in.
var ErrState = errors.New("serial: invalid UART state")

// StateVersionError says that a State was encoded by a newer version of the project.
type StateVersionError struct {
	Version, Newest uint16
}

func (e *StateVersionError) Error() string {
	return fmt.Sprintf("serial: UART state has version %d, and %d is the newest known here: use a newer version", e.Version, e.Newest)
}

// IRQError is a failure to set the level of the interrupt line; Err is what Config.IRQ returned.
type IRQError struct {
	Level bool
	Err   error
}

func (e *IRQError) Error() string {
	return fmt.Sprintf("serial: set the interrupt line to %t: %v", e.Level, e.Err)
}

func (e *IRQError) Unwrap() error { return e.Err }

// State is all of a UART that its guest can notice. Output that the writer has not taken is not in it: see
// UART.Flush.
type State struct {
	IER, FCR, LCR, MCR, MSR, SCR byte
	DLL, DLM                     byte
	LineErrors                   byte   // error bits that LSR will report once
	THREPending                  bool   // an unacknowledged transmitter-empty interrupt
	Handshake                    bool   // the guest has set MCR, so that input waits for RTS
	FIFO                         []byte // input in the receive FIFO, at most 16 bytes
	Backlog                      []byte // input behind it, at most InputBacklog bytes
}

// Save returns the state. Call it while the vCPUs are stopped, and after Flush.
func (u *UART) Save() State {
	u.mu.Lock()
	defer u.mu.Unlock()
	r := &u.regs
	return State{
		IER: r.ier, FCR: r.fcr, LCR: r.lcr, MCR: r.mcr, MSR: r.msr, SCR: r.scr,
		DLL: r.dll, DLM: r.dlm, LineErrors: r.lsrErr,
		// A UART restored from this has an empty transmitter, whatever this one's writer is at.
		THREPending: r.threPending || u.tx.blocked,
		Handshake:   r.handshake,
		FIFO:        append([]byte(nil), u.fifo...),
		Backlog:     append([]byte(nil), u.backlog...),
	}
}

// Restore puts s in place of the UART's state and sets the interrupt line to match, whatever its level was:
// an interrupt controller that was just restored does not know its lines. Input that the UART held is
// replaced. An error wraps ErrState, and nothing has changed then, or is an *IRQError.
func (u *UART) Restore(s State) error {
	if err := s.check(); err != nil {
		return err
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	u.regs = registers{
		ier: s.IER, fcr: s.FCR, lcr: s.LCR, mcr: s.MCR, msr: s.MSR, scr: s.SCR,
		dll: s.DLL, dlm: s.DLM, lsrErr: s.LineErrors, threPending: s.THREPending,
		handshake: s.Handshake,
	}
	u.fifo = append(u.fifo[:0], s.FIFO...)
	u.backlog = append(u.backlog[:0], s.Backlog...)
	u.space.Broadcast()
	u.drive(u.pending() != iirNone)
	return u.fault
}

func (s *State) check() error {
	switch {
	case s.IER&^ierMask != 0:
		return fmt.Errorf("%w: IER %#x has reserved bits", ErrState, s.IER)
	case s.FCR&^fcrKept != 0 || s.FCR != 0 && s.FCR&fcrEnable == 0:
		return fmt.Errorf("%w: FCR %#x", ErrState, s.FCR)
	case s.MCR&^mcrMask != 0:
		return fmt.Errorf("%w: MCR %#x has reserved bits", ErrState, s.MCR)
	case s.LineErrors&^lsrOE != 0:
		return fmt.Errorf("%w: line errors %#x", ErrState, s.LineErrors)
	case len(s.FIFO) > fifoSize:
		return fmt.Errorf("%w: %d bytes in the receive FIFO, which holds %d", ErrState, len(s.FIFO), fifoSize)
	case len(s.Backlog) > InputBacklog:
		return fmt.Errorf("%w: %d bytes of input, more than %d", ErrState, len(s.Backlog), InputBacklog)
	}
	return nil
}

// stateFixed is the length of the encoding without the input, in bytes.
const stateFixed = 2 + 10 + 2 + 2

// Flags of the encoding.
const (
	flagTHREPending = 1 << 0
	flagHandshake   = 1 << 1
)

// MarshalBinary encodes s, little-endian: version (2 bytes); IER, FCR, LCR, MCR, MSR, SCR, DLL, DLM, line
// errors and flags (1 each; the flags are THREPending, 1, and Handshake, 2); the lengths of FIFO and Backlog (2 each); their bytes.
func (s State) MarshalBinary() ([]byte, error) {
	if err := s.check(); err != nil {
		return nil, err
	}
	b := make([]byte, 0, stateFixed+len(s.FIFO)+len(s.Backlog))
	b = binary.LittleEndian.AppendUint16(b, StateVersion)
	flags := byte(0)
	if s.THREPending {
		flags |= flagTHREPending
	}
	if s.Handshake {
		flags |= flagHandshake
	}
	b = append(b, s.IER, s.FCR, s.LCR, s.MCR, s.MSR, s.SCR, s.DLL, s.DLM, s.LineErrors, flags)
	b = binary.LittleEndian.AppendUint16(b, uint16(len(s.FIFO)))
	b = binary.LittleEndian.AppendUint16(b, uint16(len(s.Backlog)))
	return append(append(b, s.FIFO...), s.Backlog...), nil
}

// UnmarshalBinary decodes what MarshalBinary wrote, and nothing else: every accepted encoding is the one
// that MarshalBinary gives. Errors wrap ErrState or are a *StateVersionError.
func (s *State) UnmarshalBinary(b []byte) error {
	if len(b) < 2 {
		return fmt.Errorf("%w: %d bytes, too few for a version", ErrState, len(b))
	}
	switch v := binary.LittleEndian.Uint16(b); {
	case v == 0:
		return fmt.Errorf("%w: version 0", ErrState)
	case v > StateVersion:
		return &StateVersionError{Version: v, Newest: StateVersion}
	}
	if len(b) < stateFixed {
		return fmt.Errorf("%w: %d bytes, fewer than %d", ErrState, len(b), stateFixed)
	}
	fifo := int(binary.LittleEndian.Uint16(b[12:]))
	backlog := int(binary.LittleEndian.Uint16(b[14:]))
	if len(b) != stateFixed+fifo+backlog {
		return fmt.Errorf("%w: %d bytes, where its lengths add up to %d", ErrState, len(b), stateFixed+fifo+backlog)
	}
	if b[11]&^(flagTHREPending|flagHandshake) != 0 {
		return fmt.Errorf("%w: flags %#x", ErrState, b[11])
	}
	input := b[stateFixed:]
	d := State{
		IER: b[2], FCR: b[3], LCR: b[4], MCR: b[5], MSR: b[6], SCR: b[7], DLL: b[8], DLM: b[9],
		LineErrors: b[10], THREPending: b[11]&flagTHREPending != 0, Handshake: b[11]&flagHandshake != 0,
		FIFO:    append([]byte(nil), input[:fifo]...),
		Backlog: append([]byte(nil), input[fifo:]...),
	}
	if err := d.check(); err != nil {
		return err
	}
	*s = d
	return nil
}
