package vsock

import "encoding/binary"

// headerSize is the length in bytes of the header of every packet (section 5.10.6).
const headerSize = 44

// hostCID is the address of the host (section 5.10.4). The guest's are from firstCID to lastCID.
const (
	hostCID  = 2
	firstCID = 3
	lastCID  = 0xfffffffe
)

// typeStream is the type of stream sockets (section 5.10.6.2).
const typeStream = 1

// Operations (section 5.10.6).
const (
	opInvalid       = 0
	opRequest       = 1
	opResponse      = 2
	opReset         = 3
	opShutdown      = 4
	opRW            = 5
	opCreditUpdate  = 6
	opCreditRequest = 7
)

// Flags of opShutdown (section 5.10.6.5): the sender will receive, or send, no more.
const (
	shutReceive = 1
	shutSend    = 2
	shutBoth    = shutReceive | shutSend
)

// eventTransportReset says that all connections are gone (section 5.10.6.7). An event is 4 bytes.
const eventTransportReset = 0

// header is struct virtio_vsock_hdr.
type header struct {
	srcCID, dstCID   uint64
	srcPort, dstPort uint32
	len              uint32 // of the payload
	typ, op          uint16
	flags            uint32
	bufAlloc         uint32 // the sender's buffer for the connection, in bytes
	fwdCnt           uint32 // bytes that have left that buffer, modulo 2^32
}

func decodeHeader(b *[headerSize]byte) header {
	le := binary.LittleEndian
	return header{
		srcCID: le.Uint64(b[0:]), dstCID: le.Uint64(b[8:]),
		srcPort: le.Uint32(b[16:]), dstPort: le.Uint32(b[20:]),
		len: le.Uint32(b[24:]), typ: le.Uint16(b[28:]), op: le.Uint16(b[30:]),
		flags: le.Uint32(b[32:]), bufAlloc: le.Uint32(b[36:]), fwdCnt: le.Uint32(b[40:]),
	}
}

func (h header) append(b []byte) []byte {
	le := binary.LittleEndian
	b = le.AppendUint64(b, h.srcCID)
	b = le.AppendUint64(b, h.dstCID)
	b = le.AppendUint32(b, h.srcPort)
	b = le.AppendUint32(b, h.dstPort)
	b = le.AppendUint32(b, h.len)
	b = le.AppendUint16(b, h.typ)
	b = le.AppendUint16(b, h.op)
	b = le.AppendUint32(b, h.flags)
	b = le.AppendUint32(b, h.bufAlloc)
	return le.AppendUint32(b, h.fwdCnt)
}

// reset is the answer to a packet that belongs to no connection. It goes back to where that came from, whatever the
// addresses are.
func (h header) reset() header {
	return header{
		srcCID: h.dstCID, dstCID: h.srcCID, srcPort: h.dstPort, dstPort: h.srcPort, typ: h.typ, op: opReset,
	}
}
