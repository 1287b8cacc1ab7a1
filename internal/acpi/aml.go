package acpi

import (
	"bytes"
	"fmt"
	"math"
)

// AML opcodes (ACPI 6.5, table 20.3).
const (
	opZero    = 0x00
	opOne     = 0x01
	opName    = 0x08
	opByte    = 0x0a
	opWord    = 0x0b
	opDWord   = 0x0c
	opString  = 0x0d
	opQWord   = 0x0e
	opScope   = 0x10
	opBuffer  = 0x11
	opPackage = 0x12
	opMethod  = 0x14
	opExt     = 0x5b
	extDevice = 0x82
	opArg0    = 0x68
	opNotify  = 0x86
	opLEqual  = 0x93
	opIf      = 0xa0

	rootChar   = '\\'
	dualPrefix = 0x2e

	methodSerialized = 1 << 3
)

// aml is a piece of AML: a term, or a list of them.
type aml = []byte

// list is the terms one after the other.
func list(terms ...aml) aml { return bytes.Join(terms, nil) }

// pkg is op followed by a package length (20.2.4), which counts itself, and the body.
func pkg(op aml, body ...aml) aml {
	b := list(body...)
	n := len(b) + 1
	if n < 1<<6 {
		return list(op, aml{byte(n)}, b)
	}
	extra := 1
	for ; n+extra >= 1<<(4+8*extra); extra++ { // three at most: tables are far below 256 MiB
	}
	n += extra
	length := aml{byte(extra<<6 | n&0xf)}
	for n >>= 4; extra > 0; extra, n = extra-1, n>>8 {
		length = append(length, byte(n))
	}
	return list(op, length, b)
}

// integer is v in its shortest form.
func integer(v uint64) aml {
	switch {
	case v == 0:
		return aml{opZero}
	case v == 1:
		return aml{opOne}
	case v <= math.MaxUint8:
		return aml{opByte, byte(v)}
	case v <= math.MaxUint16:
		return le.AppendUint16(aml{opWord}, uint16(v))
	case v <= math.MaxUint32:
		return le.AppendUint32(aml{opDWord}, uint32(v))
	}
	return le.AppendUint64(aml{opQWord}, v)
}

// text is a string of ASCII characters.
func text(s string) aml { return append(append(aml{opString}, s...), 0) }

// eisaID is an ID such as PNP0501, compressed as the EISA specification has it: three letters of five bits and four
// hexadecimal digits, most significant byte first.
func eisaID(id string) aml {
	var product uint32
	for _, c := range []byte(id[3:7]) {
		product = product<<4 | uint32(bytes.IndexByte([]byte("0123456789ABCDEF"), c))
	}
	v := uint32(id[0]-'@')<<26 | uint32(id[1]-'@')<<21 | uint32(id[2]-'@')<<16 | product
	return append(aml{opDWord}, byte(v>>24), byte(v>>16), byte(v>>8), byte(v))
}

// name defines an object of four characters.
func name(seg string, value aml) aml { return list(aml{opName}, aml(seg), value) }

func device(seg string, body ...aml) aml {
	return pkg(aml{opExt, extDevice}, append([]aml{aml(seg)}, body...)...)
}

func scope(path aml, body ...aml) aml { return pkg(aml{opScope}, append([]aml{path}, body...)...) }

func method(seg string, args int, body ...aml) aml {
	return pkg(aml{opMethod}, append([]aml{aml(seg), {byte(args) | methodSerialized}}, body...)...)
}

func pack(elements ...aml) aml {
	return pkg(aml{opPackage}, append([]aml{{byte(len(elements))}}, elements...)...)
}

// rooted is the absolute path of one or two segments.
func rooted(segs ...string) aml {
	p := aml{rootChar}
	if len(segs) == 2 {
		p = append(p, dualPrefix)
	}
	for _, s := range segs {
		p = append(p, s...)
	}
	return p
}

// Resource descriptors (6.4.2 and 6.4.3).
const (
	resIOPort         = 0x47
	resMemory32Fixed  = 0x86
	resInterrupt      = 0x89
	resEnd            = 0x79
	ioDecode16        = 1
	memReadWrite      = 1
	interruptConsumer = 1 << 0
	interruptEdge     = 1 << 1
)

// resources is a resource template in a buffer. Its end tag has the checksum 0, which means: not checked.
func resources(descriptors ...aml) aml {
	b := append(list(descriptors...), resEnd, 0)
	return pkg(aml{opBuffer}, integer(uint64(len(b))), b)
}

func ioPorts(port uint16, n byte) aml {
	b := le.AppendUint16(aml{resIOPort, ioDecode16}, port)
	return append(le.AppendUint16(b, port), 1, n)
}

func memory32(base, size uint32) aml {
	return le.AppendUint32(le.AppendUint32(aml{resMemory32Fixed, 9, 0, memReadWrite}, base), size)
}

// interrupt is an extended interrupt descriptor: active high, exclusive. Unlike an IRQ descriptor it is taken as it is,
// whatever the guest thinks of ISA interrupts.
func interrupt(gsi uint32, t Trigger) aml {
	flags := byte(interruptConsumer)
	if t == Edge {
		flags |= interruptEdge
	}
	return le.AppendUint32(aml{resInterrupt, 6, 0, flags, 1}, gsi)
}

const (
	dsdtRevision = 2 // integers have 64 bits
	serialPorts  = 8
	notifyChange = 0x80
)

// dsdt is the tree of devices.
func dsdt(c *Config) []byte {
	var devices []aml
	for i := range c.CPUs {
		devices = append(devices, device(fmt.Sprintf("C%03X", i),
			name("_HID", text("ACPI0007")), name("_UID", integer(uint64(i)))))
	}
	for i, s := range c.Serial {
		devices = append(devices, serialDevice(i, s))
	}
	for i, v := range c.Virtio {
		devices = append(devices, device(fmt.Sprintf("VR%02X", i),
			name("_HID", text("LNRO0005")),
			name("_UID", integer(uint64(i))),
			name("_CRS", resources(memory32(v.Base, v.Size), interrupt(v.GSI, v.Trigger)))))
	}
	if c.VMGenID != nil {
		devices = append(devices, vmGenIDDevices(c.VMGenID))
	}
	s5 := name("_S5_", pack(integer(sleepTypeS5), integer(0), integer(0), integer(0)))
	return table("DSDT", dsdtRevision, list(s5, scope(rooted("_SB_"), devices...)))
}

func serialDevice(i int, s SerialPort) aml {
	return device(fmt.Sprintf("COM%X", i+1),
		name("_HID", eisaID("PNP0501")),
		name("_UID", integer(uint64(i))),
		name("_DDN", text(fmt.Sprintf("COM%X", i+1))),
		name("_CRS", resources(ioPorts(s.Port, serialPorts), interrupt(s.GSI, Edge))))
}

// vmGenIDDevices is the device that names the ID's address and the event device that reports changes of it.
func vmGenIDDevices(g *VMGenID) aml {
	return list(
		device("VGEN",
			name("_HID", text("CRYO0001")),
			name("_CID", text("VM_Gen_Counter")),
			name("_DDN", text("VM_Gen_Counter")),
			name("ADDR", pack(integer(g.Addr&math.MaxUint32), integer(g.Addr>>32)))),
		device("GED_",
			name("_HID", text("ACPI0013")),
			name("_UID", integer(0)),
			name("_CRS", resources(interrupt(g.GSI, Edge))),
			method("_EVT", 1, pkg(aml{opIf}, aml{opLEqual, opArg0}, integer(uint64(g.GSI)),
				aml{opNotify}, rooted("_SB_", "VGEN"), integer(notifyChange)))))
}
