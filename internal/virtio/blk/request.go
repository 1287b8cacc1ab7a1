package blk

import (
	"encoding/binary"
	"errors"
	"sync"

	"github.com/cryovisor/cryovisor/internal/virtio"
)

// Request types and statuses (section 5.2.6).
const (
	typeIn          = 0
	typeOut         = 1
	typeFlush       = 4
	typeGetID       = 8
	typeDiscard     = 11
	typeWriteZeroes = 13

	statusOK          = 0
	statusIOErr       = 1
	statusUnsupported = 2
)

const (
	headerSize  = 16 // type (4 bytes), reserved (4), sector (8)
	segmentSize = 16 // of a discard or a write of zeros: sector (8), number of sectors (4), flags (4)
	flagUnmap   = 1
)

// Errors that become a status.
var (
	errIO          = errors.New("blk: the request can't be carried out")
	errUnsupported = errors.New("blk: unsupported request")
)

// pieceSize is how much of a request is in a buffer at a time.
const pieceSize = 256 << 10

var pieces = sync.Pool{New: func() any { return new([pieceSize]byte) }}

// request is a request being worked on.
type request struct {
	d        *Device
	chain    *virtio.Chain
	features virtio.Feature // that were negotiated
	sector   uint64
}

// serve carries out the request of a chain and gives it back. An error is about the driver or its memory, not about the
// disk.
func (d *Device) serve(q *virtio.Queue, c *virtio.Chain, features virtio.Feature) error {
	if c.Readable.Len() < headerSize || c.Writable.Len() < 1 {
		return virtio.ProtocolErrorf("a block request has %d bytes to read and %d to write", c.Readable.Len(), c.Writable.Len())
	}
	var header [headerSize]byte
	if err := c.Readable.ReadAt(header[:], 0); err != nil {
		return err
	}
	r := &request{d: d, chain: c, features: features, sector: binary.LittleEndian.Uint64(header[8:])}
	written, err := r.do(binary.LittleEndian.Uint32(header[:]))
	status := byte(statusOK)
	switch {
	case errors.Is(err, errUnsupported):
		status = statusUnsupported
	case errors.Is(err, errIO):
		status = statusIOErr
	case err != nil:
		return err
	}
	room := c.Writable.Len() - 1 // for data
	if status != statusOK {
		written = 0
	}
	if err := c.Writable.WriteAt([]byte{status}, room); err != nil {
		return err
	}
	// The used length counts from the start without gaps (section 2.7.8.2), and the status comes last.
	if written == room {
		written++
	}
	if err := q.Push(c, uint32(written)); err != nil {
		return err
	}
	return q.Notify()
}

// do returns how much data it has written for the driver.
func (r *request) do(kind uint32) (int64, error) {
	var err error
	switch kind {
	case typeIn:
		return r.read()
	case typeGetID:
		return r.id()
	case typeFlush:
		return 0, r.diskError(r.d.cfg.Disk.Flush())
	case typeOut:
		if r.d.cfg.Disk.ReadOnly() {
			return 0, errIO
		}
		err = r.write()
	case typeDiscard, typeWriteZeroes:
		if !r.mayZero(kind) {
			return 0, errUnsupported
		}
		err = r.zero(kind)
	default:
		return 0, errUnsupported
	}
	// A driver that does not know flushes takes a completed write for stable (section 5.2.6.2).
	if err == nil && r.features&FeatureFlush == 0 {
		err = r.diskError(r.d.cfg.Disk.Flush())
	}
	return 0, err
}

// mayZero reports whether the driver has negotiated such requests (section 5.2.6.1). A disk that is read-only does not
// offer them.
func (r *request) mayZero(kind uint32) bool {
	need := FeatureDiscard
	if kind == typeWriteZeroes {
		need = FeatureWriteZeroes
	}
	return r.features&need != 0
}

// diskError reports a failure of the disk, of which the driver only learns that it was one.
func (r *request) diskError(err error) error {
	if err == nil {
		return nil
	}
	if r.d.cfg.OnError != nil {
		r.d.cfg.OnError(err)
	}
	return errIO
}

// span checks that n bytes from the request's sector on are whole sectors of the disk, and returns their offset.
func (r *request) span(n int64) (int64, error) {
	sectors := uint64(r.d.cfg.Disk.Size() / sectorSize)
	if n%sectorSize != 0 || r.sector > sectors || uint64(n/sectorSize) > sectors-r.sector {
		return 0, errIO
	}
	return int64(r.sector) * sectorSize, nil
}

func (r *request) read() (int64, error) {
	n := r.chain.Writable.Len() - 1
	off, err := r.span(n)
	if err != nil {
		return 0, err
	}
	return n, inPieces(n, func(p []byte, at int64) error {
		if _, err := r.d.cfg.Disk.ReadAt(p, off+at); err != nil {
			return r.diskError(err)
		}
		return r.chain.Writable.WriteAt(p, at)
	})
}

func (r *request) write() error {
	n := r.chain.Readable.Len() - headerSize
	off, err := r.span(n)
	if err != nil {
		return err
	}
	return inPieces(n, func(p []byte, at int64) error {
		if err := r.chain.Readable.ReadAt(p, headerSize+at); err != nil {
			return err
		}
		_, err := r.d.cfg.Disk.WriteAt(p, off+at)
		return r.diskError(err)
	})
}

// inPieces calls move for each piece of n bytes, with a buffer and the piece's offset.
func inPieces(n int64, move func(p []byte, at int64) error) error {
	buf := pieces.Get().(*[pieceSize]byte)
	defer pieces.Put(buf)
	for at := int64(0); at < n; at += pieceSize {
		if err := move(buf[:min(pieceSize, n-at)], at); err != nil {
			return err
		}
	}
	return nil
}

// id answers with the serial number, cut to the room that there is.
func (r *request) id() (int64, error) {
	var id [serialSize]byte
	copy(id[:], r.d.cfg.Serial)
	n := min(serialSize, r.chain.Writable.Len()-1)
	return n, r.chain.Writable.WriteAt(id[:n], 0)
}

// zero is a discard or a write of zeros. Every segment is checked before the first is carried out.
func (r *request) zero(kind uint32) error {
	n := r.chain.Readable.Len() - headerSize
	if n == 0 || n%segmentSize != 0 || n > maxZeroSegments*segmentSize {
		return errIO
	}
	segments := make([]byte, n)
	if err := r.chain.Readable.ReadAt(segments, headerSize); err != nil {
		return err
	}
	type span struct {
		off, n int64
		unmap  bool
	}
	var spans []span
	for ; len(segments) > 0; segments = segments[segmentSize:] {
		r.sector = binary.LittleEndian.Uint64(segments)
		sectors, flags := binary.LittleEndian.Uint32(segments[8:]), binary.LittleEndian.Uint32(segments[12:])
		// A discard must not have the flag (section 5.2.6.2).
		if flags&^flagUnmap != 0 || kind == typeDiscard && flags != 0 {
			return errUnsupported
		}
		if sectors > maxZeroSectors {
			return errIO
		}
		off, err := r.span(int64(sectors) * sectorSize)
		if err != nil {
			return err
		}
		spans = append(spans, span{off, int64(sectors) * sectorSize, kind == typeDiscard || flags&flagUnmap != 0})
	}
	for _, s := range spans {
		erase := r.d.cfg.Disk.WriteZeroes
		if s.unmap {
			erase = r.d.cfg.Disk.Discard
		}
		if err := erase(s.off, s.n); err != nil {
			return r.diskError(err)
		}
	}
	return nil
}
