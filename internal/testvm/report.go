package testvm

import (
	"encoding/binary"
	"fmt"
)

// Report is what a worker's vCPU says about itself after a step.
type Report struct {
	VCPU  int
	Step  uint64
	Sum   uint64    // the running checksum
	State uint64    // of the generator that chooses pages
	Lanes [4]uint64 // vector register 0
}

const (
	recordSize  = 64
	magicReport = 0x52575643 // "CVWR"; one more in fault.inc's record
)

func (r Report) encode(b []byte) {
	le := binary.LittleEndian
	le.PutUint64(b, magicReport|uint64(r.VCPU)<<32)
	for i, q := range []uint64{r.Step, r.Sum, r.State, r.Lanes[0], r.Lanes[1], r.Lanes[2], r.Lanes[3]} {
		le.PutUint64(b[8+i*8:], q)
	}
}

// decodeReport takes a worker's record of 64 bytes apart. The error is badRecord's.
func decodeReport(b []byte) (Report, error) {
	q := words(b)
	if uint32(q(0)) != magicReport {
		return Report{}, badRecord(b)
	}
	return Report{VCPU: int(q(0) >> 32), Step: q(1), Sum: q(2), State: q(3), Lanes: [4]uint64{q(4), q(5), q(6), q(7)}}, nil
}

func words(b []byte) func(i int) uint64 {
	return func(i int) uint64 { return binary.LittleEndian.Uint64(b[i*8:]) }
}

// badRecord says what a record is that is no report: a *FaultError if the guest
// tells of an exception, otherwise a *RecordError.
func badRecord(b []byte) error {
	q := words(b)
	if uint32(q(0))-1 == magicReport || uint32(q(0))-1 == magicTimer {
		return &FaultError{
			VCPU: int(q(0) >> 32), CR2: q(1), Vector: q(2), Code: q(3),
			RIP: q(4), CS: q(5), RFLAGS: q(6), RSP: q(7),
		}
	}
	return &RecordError{Bytes: append([]byte(nil), b[:recordSize]...)}
}

// FaultError is an exception, or an interrupt that nobody asked for, that stopped
// a vCPU of a test guest.
type FaultError struct {
	VCPU                 int
	Vector, Code         uint64
	RIP, CS, RFLAGS, RSP uint64
	CR2                  uint64
}

func (e *FaultError) Error() string {
	return fmt.Sprintf("vCPU %d: vector %d, error code %#x, at RIP %#x, CS %#x, RFLAGS %#x, RSP %#x, CR2 %#x",
		e.VCPU, e.Vector, e.Code, e.RIP, e.CS, e.RFLAGS, e.RSP, e.CR2)
}

// RecordError is 64 bytes from a guest that are no record.
type RecordError struct{ Bytes []byte }

func (e *RecordError) Error() string {
	return fmt.Sprintf("the guest sent %x, which is no record", e.Bytes)
}

// Tokens: the low bits tell the guest what to do.
const (
	tokenHold = 1
	tokenOff  = 2
	tokenBits = 7
)

// answers are the token and the echo to a vCPU's report of a step.
func answers(seed uint64, vcpu int, step uint64) (token, echo uint32) {
	r := splitmix(seed + uint64(vcpu)<<48 ^ step*xorshiftMu)
	q := r.next()
	return uint32(q) &^ tokenBits, uint32(q >> 32)
}
