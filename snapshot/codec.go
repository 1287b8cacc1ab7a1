package snapshot

import (
	"fmt"

	"github.com/pierrec/lz4/v4"

	"github.com/cryovisor/cryovisor/internal/lz4block"
)

// Codec says how a chunk is stored.
type Codec uint32

// The codecs of version 1. The numbers are the format's, which has no 0.
const (
	// CodecStored: the pages as they are.
	CodecStored Codec = 1
	// CodecLZ4: one LZ4 block. A chunk that LZ4 does not shrink is stored.
	CodecLZ4 Codec = 2
)

// String returns the codec's name.
func (c Codec) String() string {
	switch c {
	case CodecStored:
		return "stored"
	case CodecLZ4:
		return "lz4"
	default:
		return fmt.Sprintf("codec %d", uint32(c))
	}
}

// checkSize checks the record's sizes against its codec. The bound on an LZ4
// block follows from its format: a byte of input makes at most 255 of output.
func (c *chunkRecord) checkSize() error {
	if c.pages == 0 || c.pages > maxChunkPages {
		return fmt.Errorf("%d pages, not 1 to %d", c.pages, maxChunkPages)
	}
	plain := c.pages * PageSize
	switch c.codec {
	case CodecStored:
		if c.length != plain {
			return fmt.Errorf("%d bytes for %d stored pages", c.length, c.pages)
		}
	case CodecLZ4:
		if c.length >= plain || uint64(plain) > 255*uint64(c.length) {
			return fmt.Errorf("%d bytes can't be an LZ4 block of %d pages", c.length, c.pages)
		}
	default:
		return fmt.Errorf("unknown %v", c.codec)
	}
	return nil
}

// compressor compresses chunks; it belongs to one goroutine.
type compressor struct {
	lz4 lz4block.Encoder
	buf []byte
}

// compress returns plain in the form in which it is to be stored. The result is
// valid until the next call, and may be plain itself.
func (c *compressor) compress(plain []byte, codec Codec) ([]byte, Codec) {
	if codec == CodecStored {
		return plain, CodecStored
	}
	most := len(plain) - len(plain)/minSaving - 1
	if len(c.buf) < most {
		c.buf = make([]byte, most)
	}
	n := c.lz4.Encode(c.buf[:most], plain)
	if n == 0 {
		return plain, CodecStored
	}
	return c.buf[:n], CodecLZ4
}

// minSaving is the fraction of a chunk that compression must save to be worth
// its decompression: one 32nd.
const minSaving = 32

// decodeChunk decodes the stored bytes of a chunk. The result is stored itself
// or a part of buf, which must hold all of the chunk's pages.
func decodeChunk(c chunkRecord, stored, buf []byte) ([]byte, error) {
	plain := int(c.pages) * PageSize
	if c.codec == CodecStored {
		return stored[:plain:plain], nil
	}
	n, err := lz4.UncompressBlock(stored, buf[:plain:plain])
	if err != nil {
		return nil, parseError(ErrCorrupt, "chunk", 0, "LZ4 block: %v", err)
	}
	if n != plain {
		return nil, parseError(ErrCorrupt, "chunk", 0, "LZ4 block of %d bytes, should be %d", n, plain)
	}
	return buf[:plain:plain], nil
}
