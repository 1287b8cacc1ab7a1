package balloon

import (
	"encoding/binary"
	"fmt"
	"slices"

	"github.com/cryovisor/cryovisor/internal/virtio"
)

const (
	frameSize = 4 // bytes of a page number (section 5.5.6)

	// pieceSize is how much of a request is read at once, in bytes.
	pieceSize = 4096
	// maxInflate is the longest request to inflate, in bytes, so that a driver can't keep the device busy for long with
	// one. The specification has no limit; Linux sends 256 pages at a time.
	maxInflate = 256 << 10
)

// inflate discards the pages whose numbers the request lists. Pages that aren't RAM are a protocol error: no driver owns
// such pages, so it has lost track of which it gives away.
func (d *Device) inflate(c *virtio.Chain) error {
	n := c.Readable.Len()
	if n%frameSize != 0 || n > maxInflate {
		return virtio.ProtocolErrorf("a list of %d bytes of pages for the balloon", n)
	}
	for off := int64(0); off < n; off += pieceSize {
		p := make([]byte, min(pieceSize, n-off))
		if err := c.Readable.ReadAt(p, off); err != nil {
			return err
		}
		if err := d.discardFrames(p); err != nil {
			return err
		}
	}
	return nil
}

// discardFrames discards the pages of a list, runs of them at once.
func (d *Device) discardFrames(list []byte) error {
	var frames []uint32
	for ; len(list) > 0; list = list[frameSize:] {
		frames = append(frames, binary.LittleEndian.Uint32(list))
	}
	slices.Sort(frames)
	frames = slices.Compact(frames)
	for i := 0; i < len(frames); {
		n := 1
		for i+n < len(frames) && frames[i+n] == frames[i]+uint32(n) {
			n++
		}
		if err := d.discard(uint64(frames[i])*PageSize, uint64(n)*PageSize); err != nil {
			return err
		}
		i += n
	}
	return nil
}

// report discards the pages that are the request's buffers (section 5.5.6.7).
func (d *Device) report(c *virtio.Chain) error {
	if c.Readable.Len() != 0 {
		return virtio.ProtocolErrorf("a report of free pages that are device-readable")
	}
	for _, s := range c.Writable.Segments() {
		if err := d.discard(s.GPA, uint64(s.Len)); err != nil {
			return err
		}
	}
	return nil
}

func (d *Device) discard(gpa, n uint64) error {
	if err := d.mem.Discard(gpa, n); err != nil {
		return fmt.Errorf("%w: balloon: discard %d bytes at %#x: %w", virtio.ErrProtocol, n, gpa, err)
	}
	return nil
}
