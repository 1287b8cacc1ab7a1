package vsock

import (
	"cmp"
	"encoding/binary"
	"slices"

	"github.com/cryovisor/cryovisor/internal/virtio"
)

const (
	// stateVersion is the first byte of the state, 1. The port for the next connection from the host follows (4 bytes,
	// little-endian), then the headers of resets.
	stateVersion = 1
	stateHead    = 1 + 4
	// maxStateResets is more than any limits allow.
	maxStateResets = 1 << 16
)

// Save implements virtio.Device. Connections are not saved. What is: resets that the guest has not taken, and such for
// the connections that it has asked for and not got an answer to, since a transport reset is about established
// ones only; and the next port, so that a new connection is not taken for one of before.
func (d *Device) Save() ([]byte, error) {
	resets := slices.Clone(d.resets)
	for _, c := range d.conns {
		if c.state == stateDialing {
			resets = append(resets, c.header(opReset))
		}
	}
	slices.SortFunc(resets[len(d.resets):], func(a, b header) int {
		return cmp.Or(cmp.Compare(a.srcPort, b.srcPort), cmp.Compare(a.dstPort, b.dstPort))
	})
	b := binary.LittleEndian.AppendUint32([]byte{stateVersion}, d.nextPort)
	for _, h := range resets {
		b = h.append(b)
	}
	return b, nil
}

// Restore implements virtio.Device.
func (d *Device) Restore(state []byte) error {
	if len(state) < stateHead || state[0] != stateVersion {
		return virtio.StateErrorf("vsock: %d bytes, which do not begin with version %d", len(state), stateVersion)
	}
	next, rest := binary.LittleEndian.Uint32(state[1:]), state[stateHead:]
	if next < firstHostPort || next > lastHostPort {
		return virtio.StateErrorf("vsock: next port %#x", next)
	}
	if len(rest)%headerSize != 0 || len(rest) > maxStateResets*headerSize {
		return virtio.StateErrorf("vsock: %d bytes of resets", len(rest))
	}
	var resets []header
	for ; len(rest) > 0; rest = rest[headerSize:] {
		h := decodeHeader((*[headerSize]byte)(rest))
		if h.op != opReset || h.len != 0 {
			return virtio.StateErrorf("vsock: operation %d of %d bytes in place of a reset", h.op, h.len)
		}
		resets = append(resets, h)
	}
	d.Reset()
	d.nextPort, d.resets, d.owesReset = next, resets, true
	return nil
}
