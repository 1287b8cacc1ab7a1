package snapshot

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"io"
	"math"
	"slices"
	"time"
)

// Version is the format version that this package writes. It reads 1 to Version.
const Version = 1

// PageSize is the size of a guest page, in bytes.
const PageSize = 4096

// MaxAddress bounds the addresses of a snapshot. Guest physical addresses are those
// below DiskStride; the blocks of disk i have the addresses from DiskAddress(i) on.
const MaxAddress = 1 << 52

// DiskStride is the size of the address space of each disk, and of guest memory, in
// bytes.
const DiskStride = 1 << 48

// MaxDisks is how many disks a snapshot can hold.
const MaxDisks = MaxAddress/DiskStride - 1

// DiskAddress is where the addresses of disk i begin, for i from 0 up to MaxDisks.
func DiskAddress(i int) uint64 { return uint64(i+1) * DiskStride }

// diskPages is the first page number that is a disk's.
const diskPages = DiskStride / PageSize

// Limits of the format. docs/FORMAT.md states them; a reader rejects what exceeds them.
const (
	maxPacks       = 1 << 16
	maxSections    = 1 << 12
	maxSectionName = 64
	maxChunkPages  = 1024
	maxFileBytes   = 1 << 60
)

const (
	headerMagic  = "\x89CRYO\r\n\x1a"
	headerFixed  = 104 // bytes before the pack list
	headerPrefix = 16  // magic, version, header size: the same in every version
	digestBytes  = sha256.Size
	idBytes      = 16
	maxHeader    = headerFixed + maxPacks*idBytes + digestBytes

	// flagsRefuse are the flag bits that a reader which does not know them must
	// not ignore; it may ignore the others. Version 1 defines no flags.
	flagsRefuse = 0x0000ffff
)

// Header is the part of a manifest that anybody may read. Reading it with
// [Store.Header] proves only that it was not damaged by accident; [Store.Open]
// authenticates it with the reader's key.
type Header struct {
	Version     uint32    `json:"version"`
	Flags       uint32    `json:"flags"`
	ID          ID        `json:"id"`
	Parent      ID        `json:"parent"`       // zero: a full snapshot
	Created     time.Time `json:"created"`      // UTC, nanoseconds, not before 1970
	RAMBytes    uint64    `json:"ram_bytes"`    // guest memory
	PackBytes   uint64    `json:"pack_bytes"`   // on disk, in the packs that this snapshot wrote
	PagesStored uint64    `json:"pages_stored"` // guest pages and blocks of disks that this snapshot wrote to its packs
	PagesMapped uint64    `json:"pages_mapped"` // guest pages that are not zero, ancestors' included
	// BlocksMapped is how many blocks of disks the snapshot holds, ancestors' included, in PageSize.
	BlocksMapped uint64 `json:"blocks_mapped"`
	Packs        []ID   `json:"packs"` // every pack the snapshot needs, ascending
}

// marshal returns the header's bytes, the digest at their end included.
func (h *Header) marshal() []byte {
	size := headerFixed + len(h.Packs)*idBytes + digestBytes
	b := make([]byte, 0, size)
	le := binary.LittleEndian
	b = append(b, headerMagic...)
	b = le.AppendUint32(b, h.Version)
	b = le.AppendUint32(b, uint32(size))
	b = le.AppendUint32(b, h.Flags)
	b = append(b, h.ID[:]...)
	b = append(b, h.Parent[:]...)
	b = le.AppendUint64(b, uint64(h.Created.UnixNano()))
	b = le.AppendUint64(b, h.RAMBytes)
	b = le.AppendUint64(b, h.PackBytes)
	b = le.AppendUint64(b, h.PagesStored)
	b = le.AppendUint64(b, h.PagesMapped)
	b = le.AppendUint32(b, uint32(len(h.Packs)))
	b = le.AppendUint64(b, h.BlocksMapped)
	for _, id := range h.Packs {
		b = append(b, id[:]...)
	}
	sum := sha256.Sum256(b)
	return append(b, sum[:]...)
}

// parseHeader parses a header that starts at the first byte of b. b may be longer.
func parseHeader(b []byte) (*Header, error) {
	size, version, err := parsePrefix(b)
	if err != nil {
		return nil, err
	}
	if len(b) < size {
		return nil, parseError(ErrCorrupt, "header", len(b), "truncated: %d of %d bytes", len(b), size)
	}
	b = b[:size]
	if sum := sha256.Sum256(b[:size-digestBytes]); !bytes.Equal(sum[:], headerDigest(b)) {
		return nil, parseError(ErrCorrupt, "header", size-digestBytes, "checksum does not match")
	}
	le := binary.LittleEndian
	h := &Header{
		Version:     version,
		Flags:       le.Uint32(b[16:]),
		ID:          ID(b[20:36]),
		Parent:      ID(b[36:52]),
		Created:     time.Unix(0, int64(le.Uint64(b[52:]))).UTC(),
		RAMBytes:    le.Uint64(b[60:]),
		PackBytes:   le.Uint64(b[68:]),
		PagesStored: le.Uint64(b[76:]),
		PagesMapped: le.Uint64(b[84:]),

		BlocksMapped: le.Uint64(b[96:]),
	}
	for at := headerFixed; at < size-digestBytes; at += idBytes {
		h.Packs = append(h.Packs, ID(b[at:]))
	}
	return h, h.validate(b)
}

// parsePrefix parses what every version of the format starts with and returns
// the size of the whole header, which is at most maxHeader.
func parsePrefix(b []byte) (size int, version uint32, err error) {
	if !bytes.HasPrefix(b, []byte(headerMagic)) {
		return 0, 0, parseError(ErrFormat, "header", 0, "does not start with the magic number")
	}
	if len(b) < headerPrefix {
		return 0, 0, parseError(ErrCorrupt, "header", len(b), "truncated")
	}
	version = binary.LittleEndian.Uint32(b[8:])
	switch {
	case version == 0:
		return 0, 0, parseError(ErrFormat, "header", 8, "version is 0")
	case version > Version:
		return 0, 0, parseError(ErrVersion, "header", 8, "version %d, this reader knows 1 to %d", version, Version)
	}
	n := int64(binary.LittleEndian.Uint32(b[12:]))
	if n < headerFixed+digestBytes || n > maxHeader || (n-headerFixed-digestBytes)%idBytes != 0 {
		return 0, 0, parseError(ErrFormat, "header", 12, "header size %d is impossible", n)
	}
	return int(n), version, nil
}

// validate checks the rules that go beyond the size of fields; b is the header's bytes.
func (h *Header) validate(b []byte) error {
	le := binary.LittleEndian
	switch {
	case h.Flags&flagsRefuse != 0:
		return parseError(ErrVersion, "header", 16, "flags %#x ask for a feature that this reader lacks", h.Flags)
	case h.ID.IsZero():
		return parseError(ErrFormat, "header", 20, "snapshot id is zero")
	case h.Parent == h.ID:
		return parseError(ErrFormat, "header", 36, "snapshot is its own parent")
	case le.Uint64(b[52:]) > math.MaxInt64:
		return parseError(ErrFormat, "header", 52, "creation time is before 1970")
	case h.RAMBytes%PageSize != 0 || h.RAMBytes > DiskStride:
		return parseError(ErrFormat, "header", 60, "guest memory of %d bytes is impossible", h.RAMBytes)
	case h.PagesMapped > h.RAMBytes/PageSize:
		return parseError(ErrFormat, "header", 84, "more pages mapped than there are")
	case le.Uint32(b[92:]) != uint32(len(h.Packs)):
		return parseError(ErrFormat, "header", 92, "pack count does not match the header's size")
	case h.BlocksMapped > MaxDisks*diskPages:
		return parseError(ErrFormat, "header", 96, "more blocks mapped than disks can have")
	}
	for i, id := range h.Packs {
		if id.IsZero() || i > 0 && bytes.Compare(h.Packs[i-1][:], id[:]) >= 0 {
			return parseError(ErrFormat, "header", headerFixed+i*len(id), "pack ids are not ascending")
		}
	}
	return nil
}

// headerDigest returns the digest at the end of a header's bytes.
func headerDigest(b []byte) []byte { return b[len(b)-digestBytes:] }

// readHeader reads the header at the start of a manifest and its exact bytes.
func readHeader(r io.ReaderAt) (*Header, []byte, error) {
	prefix := make([]byte, headerPrefix)
	n, err := r.ReadAt(prefix, 0)
	if n < len(prefix) && isStorage(err) {
		return nil, nil, err
	}
	size, _, err := parsePrefix(prefix[:n])
	if err != nil {
		return nil, nil, err
	}
	b := make([]byte, size) // at most 1 MiB
	n, err = r.ReadAt(b, 0)
	if n < len(b) && isStorage(err) {
		return nil, nil, err
	}
	h, err := parseHeader(b[:n])
	if err != nil {
		return nil, nil, err
	}
	return h, b, nil
}

// clone returns a copy that shares nothing with h.
func (h *Header) clone() Header {
	c := *h
	c.Packs = slices.Clone(h.Packs)
	return c
}

// String says what the snapshot is in one line.
func (h Header) String() string {
	kind := "full"
	if !h.Parent.IsZero() {
		kind = "diff of " + h.Parent.String()
	}
	return fmt.Sprintf("snapshot %v (%s), %d MiB of memory, %d packs", h.ID, kind, h.RAMBytes>>20, len(h.Packs))
}
