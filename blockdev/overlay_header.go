package blockdev

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/bits"
)

// The file of an overlay is its header, the map of its blocks, and the blocks, each where it is on the disk:
//
//	offset  size
//	     0     8  magic
//	     8     4  version: 1
//	    12     4  size of a block
//	    16     8  size of the disk
//	    24     8  size of what is below
//	    32    32  SHA-256 of the identity of what is below
//	    64    16  kind of what is below, padded with zeros
//	    80     2  length of its name, at most 2048
//	    82        its name, padded with zeros
//	  4064    32  SHA-256 of what is before
//	  4096        the map: 2 bits a block, the least significant first, padded to whole pages of 4096 bytes
//	         ...  the blocks, from a multiple of 64 KiB on
//
// All integers are little-endian.
const (
	overlayMagic      = "\x89CRYV\r\n\x1a"
	overlayVersion    = 1
	overlayHeadBytes  = 4096
	overlayDigestAt   = overlayHeadBytes - sha256.Size
	overlayNameAt     = 82
	maxLowerName      = 2048
	maxLowerKind      = 16
	minOverlayBlock   = 4096
	maxOverlayBlock   = 64 << 10
	maxOverlaySize    = 1 << 48
	overlayDataAlign  = 64 << 10
	defaultOverlayLen = 4096
)

// overlayHeader is the header of an overlay's file, checked.
type overlayHeader struct {
	size  int64
	shift uint // of a block
	lower Lower
}

func (h *overlayHeader) blockSize() int64 { return 1 << h.shift }
func (h *overlayHeader) blocks() int64    { return (h.size + h.blockSize() - 1) >> h.shift }
func (h *overlayHeader) mapAt() int64     { return overlayHeadBytes }

func (h *overlayHeader) dataAt() int64 {
	end := h.mapAt() + mapBytes(h.blocks())
	return (end + overlayDataAlign - 1) &^ (overlayDataAlign - 1)
}

func (h *overlayHeader) fileSize() int64 { return h.dataAt() + h.size }

func newOverlayHeader(opts OverlayOptions) (overlayHeader, error) {
	if opts.BlockSize == 0 {
		opts.BlockSize = defaultOverlayLen
	}
	h := overlayHeader{size: opts.Size, shift: uint(bits.TrailingZeros(uint(opts.BlockSize))), lower: opts.Lower}
	if opts.BlockSize < 0 || h.blockSize() != int64(opts.BlockSize) {
		return h, fmt.Errorf("%w: blocks of %d bytes", ErrNotDisk, opts.BlockSize)
	}
	if err := h.check(); err != nil {
		return h, fmt.Errorf("%w: %w", ErrNotDisk, err)
	}
	return h, nil
}

// check checks what the fields of a header must be.
func (h *overlayHeader) check() error {
	switch {
	case h.blockSize() < minOverlayBlock || h.blockSize() > maxOverlayBlock:
		return fmt.Errorf("blocks of %d bytes; want %d up to %d", h.blockSize(), minOverlayBlock, maxOverlayBlock)
	case h.size <= 0 || h.size%MinBlockSize != 0 || h.size > maxOverlaySize:
		return fmt.Errorf("a disk of %d bytes; want a positive multiple of %d", h.size, MinBlockSize)
	case h.lower.Identity.Size < 0 || h.lower.Identity.Size > h.size:
		return fmt.Errorf("a disk of %d bytes over one of %d", h.size, h.lower.Identity.Size)
	case len(h.lower.Kind) > maxLowerKind || len(h.lower.Name) > maxLowerName:
		return fmt.Errorf("a lower device of kind %q with a name of %d bytes", h.lower.Kind, len(h.lower.Name))
	case bytes.IndexByte([]byte(h.lower.Kind), 0) >= 0:
		return errors.New("a kind with a zero in it")
	}
	return nil
}

func (h *overlayHeader) marshal() []byte {
	b := make([]byte, overlayHeadBytes)
	le := binary.LittleEndian
	copy(b, overlayMagic)
	le.PutUint32(b[8:], overlayVersion)
	le.PutUint32(b[12:], uint32(h.blockSize()))
	le.PutUint64(b[16:], uint64(h.size))
	le.PutUint64(b[24:], uint64(h.lower.Identity.Size))
	copy(b[32:], h.lower.Identity.SHA256[:])
	copy(b[64:], h.lower.Kind)
	le.PutUint16(b[80:], uint16(len(h.lower.Name)))
	copy(b[overlayNameAt:], h.lower.Name)
	sum := sha256.Sum256(b[:overlayDigestAt])
	copy(b[overlayDigestAt:], sum[:])
	return b
}

func readOverlayHeader(file io.ReaderAt) (overlayHeader, error) {
	b := make([]byte, overlayHeadBytes)
	if n, err := file.ReadAt(b, 0); n < len(b) {
		return overlayHeader{}, fmt.Errorf("%w: its header is cut off: %w", ErrOverlay, err)
	}
	return parseOverlayHeader(b)
}

// parseOverlayHeader parses overlayHeadBytes.
func parseOverlayHeader(b []byte) (overlayHeader, error) {
	le := binary.LittleEndian
	if !bytes.HasPrefix(b, []byte(overlayMagic)) {
		return overlayHeader{}, fmt.Errorf("%w: it does not begin as one", ErrOverlay)
	}
	if v := le.Uint32(b[8:]); v > overlayVersion {
		return overlayHeader{}, fmt.Errorf("%w: version %d, this one knows %d", ErrVersion, v, overlayVersion)
	}
	if sum := sha256.Sum256(b[:overlayDigestAt]); !bytes.Equal(sum[:], b[overlayDigestAt:]) {
		return overlayHeader{}, fmt.Errorf("%w: the checksum of its header is wrong", ErrOverlay)
	}
	size, block, name := le.Uint64(b[16:]), le.Uint32(b[12:]), int(le.Uint16(b[80:]))
	if le.Uint32(b[8:]) == 0 || bits.OnesCount32(block) != 1 || size > maxOverlaySize || le.Uint64(b[24:]) > size || name > maxLowerName {
		return overlayHeader{}, fmt.Errorf("%w: a field of its header is impossible", ErrOverlay)
	}
	h := overlayHeader{size: int64(size), shift: uint(bits.TrailingZeros32(block))}
	h.lower = Lower{
		Kind:     string(bytes.TrimRight(b[64:64+maxLowerKind], "\x00")),
		Name:     string(b[overlayNameAt : overlayNameAt+name]),
		Identity: Identity{int64(le.Uint64(b[24:])), [32]byte(b[32:64])},
	}
	if err := h.check(); err != nil {
		return h, fmt.Errorf("%w: %w", ErrOverlay, err)
	}
	if !bytes.Equal(h.marshal(), b) {
		return h, fmt.Errorf("%w: bytes of its header that mean nothing are not zero", ErrOverlay)
	}
	return h, nil
}
