package nic

// The header before each frame (section 5.1.6, struct virtio_net_hdr): flags (1 byte), GSO type (1), header length
// (2), GSO size (2), checksum start (2), checksum offset (2), number of buffers (2).
const (
	headerSize = 12

	headerFlags      = 0
	headerGSOType    = 1
	headerNumBuffers = 10

	flagNeedsChecksum = 1 // VIRTIO_NET_HDR_F_NEEDS_CSUM
	gsoNone           = 0 // VIRTIO_NET_HDR_GSO_NONE
)

// Lengths in bytes of an Ethernet header, and of one with two VLAN tags.
const (
	ethernetHeader = 14
	taggedHeader   = ethernetHeader + 2*4
)

// bufferSize is the length of the longest header and frame for an MTU.
func bufferSize(mtu uint16) int { return headerSize + taggedHeader + int(mtu) }

// whole reports whether header and frame b, which may be from either side, can be passed on. Without a
// checksum or before its segmentation a frame can't: neither side has agreed to finish it for the
// other. Flags that are not known are ignored (section 5.1.6.2.2).
func whole(b []byte) bool {
	return len(b) >= headerSize+ethernetHeader && b[headerFlags]&flagNeedsChecksum == 0 && b[headerGSOType] == gsoNone
}

// setHeader writes the header of a frame that is complete in itself. Buffers are counted towards the driver only
// (sections 5.1.6.2.1 and 5.1.6.4.1).
func setHeader(b []byte, buffers byte) {
	clear(b[:headerSize])
	b[headerNumBuffers] = buffers
}
