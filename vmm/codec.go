package vmm

import (
	"encoding/binary"
	"fmt"
)

// The encoding of a section, version 1: parts back to back, each a tag (u16), a
// length in bytes (u32) and that many bytes; integers are little-endian. Tags
// ascend and occur once. A reader that meets a tag above those it knows fails,
// unless bit 15 of the tag says that it may be skipped: a newer program wrote it.
// A part that a later version adds keeps the section's version if older readers
// may skip it.

const (
	tagSkippable = 0x8000
	partHeader   = 6
)

const ( // of vmm/machine
	tagMemory = 1 + iota
	tagVCPUs
)

const ( // of vmm/kvm
	tagPIT = 1 + iota
	tagClock
	tagPICMaster
	tagPICSlave
	tagIOAPIC
)

const ( // of vmm/vcpu/N
	tagID = 1 + iota
	tagMPState
	tagTSCKHz
	tagRegs
	tagSregs
	tagCPUID
	tagMSRs
	tagTSCDeadline
	tagXSave
	tagXCRs
	tagDebugRegs
	tagLAPIC
	tagEvents
)

// part is one field of a section: put appends its bytes, get takes them.
type part struct {
	tag uint16
	put func(b []byte) []byte
	get func(b []byte) error
}

func encodeParts(parts []part) []byte {
	var b []byte
	for _, p := range parts {
		b = binary.LittleEndian.AppendUint16(b, p.tag)
		at := len(b)
		b = append(b, 0, 0, 0, 0)
		b = p.put(b)
		binary.LittleEndian.PutUint32(b[at:], uint32(len(b)-at-4))
	}
	return b
}

func decodeParts(b []byte, parts []part) error {
	next := 0
	for last := -1; len(b) > 0; {
		if len(b) < partHeader {
			return fmt.Errorf("%d stray bytes", len(b))
		}
		tag, n := binary.LittleEndian.Uint16(b), binary.LittleEndian.Uint32(b[2:])
		b = b[partHeader:]
		if uint64(n) > uint64(len(b)) {
			return fmt.Errorf("part %d of %d bytes is cut at %d", tag, n, len(b))
		}
		if int(tag) <= last {
			return fmt.Errorf("part %d after part %d", tag, last)
		}
		last = int(tag)
		data := b[:n]
		b = b[n:]
		if tag&tagSkippable != 0 {
			continue
		}
		if next == len(parts) {
			return fmt.Errorf("%w: part %d is not known to this program; update it", ErrStateVersion, tag)
		}
		if parts[next].tag != tag {
			return fmt.Errorf("unexpected part %d", tag)
		}
		if err := parts[next].get(data); err != nil {
			return fmt.Errorf("part %d: %w", tag, err)
		}
		next++
	}
	if next != len(parts) {
		return fmt.Errorf("part %d is missing", parts[next].tag)
	}
	return nil
}

// fixed is a part that is a value of fixed size (binary.Size).
func fixed(tag uint16, v any) part {
	size := binary.Size(v)
	return part{
		tag: tag,
		put: func(b []byte) []byte {
			b, err := binary.Append(b, binary.LittleEndian, v)
			if err != nil { // v is of fixed size: a mistake in this file
				panic("vmm: " + err.Error())
			}
			return b
		},
		get: func(b []byte) error {
			if len(b) != size {
				return fmt.Errorf("%d bytes, want %d", len(b), size)
			}
			_, err := binary.Decode(b, binary.LittleEndian, v)
			return err
		},
	}
}

// raw is a part whose bytes are taken as they are, at most limit of them.
func raw(tag uint16, v *[]byte, limit int) part {
	return part{
		tag: tag,
		put: func(b []byte) []byte { return append(b, *v...) },
		get: func(b []byte) error {
			if len(b) == 0 || len(b) > limit {
				return fmt.Errorf("%d bytes, want 1 to %d", len(b), limit)
			}
			*v = append([]byte(nil), b...)
			return nil
		},
	}
}

// list is a part that is a sequence of values of one fixed size.
func list[T any](tag uint16, v *[]T, limit int) part {
	var zero T
	size := binary.Size(zero)
	return part{
		tag: tag,
		put: func(b []byte) []byte {
			b, err := binary.Append(b, binary.LittleEndian, *v)
			if err != nil { // T is of fixed size: a mistake in this file
				panic("vmm: " + err.Error())
			}
			return b
		},
		get: func(b []byte) error {
			if len(b)%size != 0 || len(b)/size > limit {
				return fmt.Errorf("%d bytes, want at most %d times %d", len(b), limit, size)
			}
			*v = make([]T, len(b)/size)
			_, err := binary.Decode(b, binary.LittleEndian, *v)
			return err
		},
	}
}

func (m *MachineState) parts() []part {
	return []part{fixed(tagMemory, &m.MemoryBytes), fixed(tagVCPUs, &m.VCPUs)}
}

func (m *MachineState) encode() []byte        { return encodeParts(m.parts()) }
func (m *MachineState) decode(b []byte) error { return decodeParts(b, m.parts()) }

// A page is more than any of these structs of the KVM ABI has; the XSAVE area
// is 11 KiB with AMX and grows with the processor.
const (
	abiLimit   = 4096
	xsaveLimit = 1 << 20
	listLimit  = 4096
)

func (v *VMState) parts() []part {
	return []part{
		raw(tagPIT, &v.PIT, abiLimit),
		raw(tagClock, &v.Clock, abiLimit),
		raw(tagPICMaster, &v.PICMaster, abiLimit),
		raw(tagPICSlave, &v.PICSlave, abiLimit),
		raw(tagIOAPIC, &v.IOAPIC, abiLimit),
	}
}

func (v *VMState) encode() []byte        { return encodeParts(v.parts()) }
func (v *VMState) decode(b []byte) error { return decodeParts(b, v.parts()) }

func (v *VCPUState) parts() []part {
	return []part{
		fixed(tagID, &v.ID),
		fixed(tagMPState, &v.MPState),
		fixed(tagTSCKHz, &v.TSCKHz),
		fixed(tagRegs, &v.Regs),
		fixed(tagSregs, &v.Sregs),
		list(tagCPUID, &v.CPUID, listLimit),
		list(tagMSRs, &v.MSRs, listLimit),
		fixed(tagTSCDeadline, &v.TSCDeadline),
		raw(tagXSave, &v.XSave, xsaveLimit),
		raw(tagXCRs, &v.XCRs, abiLimit),
		raw(tagDebugRegs, &v.DebugRegs, abiLimit),
		raw(tagLAPIC, &v.LAPIC, abiLimit),
		raw(tagEvents, &v.Events, abiLimit),
	}
}

func (v *VCPUState) encode() []byte        { return encodeParts(v.parts()) }
func (v *VCPUState) decode(b []byte) error { return decodeParts(b, v.parts()) }
