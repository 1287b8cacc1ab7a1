package qcow2

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/cryovisor/cryovisor/blockdev"
)

// Errors of this package, for errors.Is. Those of Open wrap blockdev.ErrNotDisk too, and say what to do.
var (
	// ErrBackingFile says that an image is only what differs from another file.
	ErrBackingFile = errors.New("it has a backing file")
	// ErrEncrypted says that an image is encrypted.
	ErrEncrypted = errors.New("it is encrypted")
	// ErrUnsupported says that an image is, or would be, of a kind that this package does not deal with.
	ErrUnsupported = errors.New("unsupported")
	// ErrCorrupt says that an image contradicts itself, or is not all there.
	ErrCorrupt = errors.New("damaged image")
)

// The names that follow are those of QEMU's docs/interop/qcow2.rst; sections are cited from there.
const (
	magic = "QFI\xfb"

	headerV2Bytes = 72
	headerV3Bytes = 104
	// headerBytes holds all that is looked at: the version 3 header and compression_type, padded to 8 bytes. Even the
	// smallest image is larger, since its L1 table is not in its first cluster.
	headerBytes = 112

	minClusterBits, maxClusterBits = 9, 21
	entryBytes                     = 8 // of L1 and L2 tables

	// maxL1Bytes bounds the memory for an L1 table. It is enough for 256 TiB with clusters of 64 KiB, for 16 GiB
	// with clusters of 512 bytes.
	maxL1Bytes = 4 << 20

	refcountOrder = 4 // refcounts of 16 bits
)

// Bits of incompatible_features.
const (
	featureDirty = 1 << iota
	featureCorrupt
	featureExternalData
	featureCompressionType
	featureExtendedL2
)

// header is what matters of an image's header (section "Header").
type header struct {
	version       uint32
	backingOffset uint64
	clusterBits   uint32
	size          uint64 // of the disk, in bytes
	cryptMethod   uint32
	l1Entries     uint32
	l1Offset      uint64
	refcountTable uint64 // offset
	refcountSize  uint32 // clusters of the refcount table

	// Version 3.
	incompatible uint64
	length       uint32
	compression  byte
}

// parseHeader takes a header apart. It is in no way checked.
func parseHeader(b *[headerBytes]byte) header {
	be := binary.BigEndian
	h := header{
		version:       be.Uint32(b[4:]),
		backingOffset: be.Uint64(b[8:]),
		clusterBits:   be.Uint32(b[20:]),
		size:          be.Uint64(b[24:]),
		cryptMethod:   be.Uint32(b[32:]),
		l1Entries:     be.Uint32(b[36:]),
		l1Offset:      be.Uint64(b[40:]),
		refcountTable: be.Uint64(b[48:]),
		refcountSize:  be.Uint32(b[56:]),
		length:        headerV2Bytes,
	}
	if h.version >= 3 {
		h.incompatible = be.Uint64(b[72:])
		h.length = be.Uint32(b[100:])
		// Section "Additional fields": a field beyond header_length is absent, which is the same as 0.
		if h.length > headerV3Bytes {
			h.compression = b[headerV3Bytes]
		}
	}
	return h
}

// marshal returns a version 3 header without any features or extensions.
func (h *header) marshal() *[headerBytes]byte {
	b, be := new([headerBytes]byte), binary.BigEndian
	copy(b[:], magic)
	be.PutUint32(b[4:], 3)
	be.PutUint32(b[20:], h.clusterBits)
	be.PutUint64(b[24:], h.size)
	be.PutUint32(b[36:], h.l1Entries)
	be.PutUint64(b[40:], h.l1Offset)
	be.PutUint64(b[48:], h.refcountTable)
	be.PutUint32(b[56:], h.refcountSize)
	be.PutUint32(b[96:], refcountOrder)
	be.PutUint32(b[100:], headerV3Bytes)
	return b
}

// check says whether the image, whose file has fileSize bytes, can be read by this package.
func (h *header) check(fileSize int64) error {
	if h.version != 2 && h.version != 3 {
		return fmt.Errorf("%w: version %d, not 2 or 3", ErrUnsupported, h.version)
	}
	if h.version == 3 && (h.length < headerV3Bytes || h.length%8 != 0) {
		return fmt.Errorf("%w: header_length is %d", ErrCorrupt, h.length)
	}
	if err := h.checkFeatures(); err != nil {
		return err
	}
	if h.clusterBits < minClusterBits || h.clusterBits > maxClusterBits {
		return fmt.Errorf("%w: cluster_bits is %d, not %d to %d", ErrUnsupported, h.clusterBits, minClusterBits, maxClusterBits)
	}
	if h.size == 0 || h.size%blockdev.MinBlockSize != 0 {
		return fmt.Errorf("%w: the disk has %d bytes, which is no positive multiple of %d: qemu-img resize it",
			ErrUnsupported, h.size, blockdev.MinBlockSize)
	}
	return h.checkL1(fileSize)
}

// checkFeatures is about what makes an image need more than itself and plain tables.
func (h *header) checkFeatures() error {
	const convert = "convert it: qemu-img convert -O qcow2"
	compressed := h.incompatible&featureCompressionType != 0
	switch {
	case h.backingOffset != 0:
		return fmt.Errorf("%w: flatten it: qemu-img convert -O qcow2", ErrBackingFile)
	case h.cryptMethod != 0:
		return fmt.Errorf("%w (crypt_method %d): decrypt it with qemu-img convert", ErrEncrypted, h.cryptMethod)
	case h.incompatible&featureCorrupt != 0:
		return fmt.Errorf("%w: it is marked as corrupt: qemu-img check -r all", ErrCorrupt)
	case h.incompatible&featureExternalData != 0:
		return fmt.Errorf("%w: its data is in another file: %s", ErrUnsupported, convert)
	case h.incompatible&featureExtendedL2 != 0:
		return fmt.Errorf("%w: extended L2 entries: %s", ErrUnsupported, convert)
	case compressed != (h.compression != 0):
		return fmt.Errorf("%w: compression_type is %d, its feature bit says %v", ErrCorrupt, h.compression, compressed)
	case compressed:
		return fmt.Errorf("%w: compression_type %d (1 is zstd): %s", ErrUnsupported, h.compression, convert)
	// Dirty is about refcounts, which only who writes needs.
	case h.incompatible&^featureDirty != 0:
		return fmt.Errorf("%w: incompatible features %#x", ErrUnsupported, h.incompatible)
	}
	return nil
}

// checkL1 is about the place and the size of the L1 table.
func (h *header) checkL1(fileSize int64) error {
	cluster, need := uint64(1)<<h.clusterBits, h.l1Needed()
	switch size := uint64(h.l1Entries) * entryBytes; {
	case need > maxL1Bytes/entryBytes:
		return fmt.Errorf("%w: a disk of %d bytes in clusters of %d needs %d entries of an L1 table, more than %d: "+
			"use larger clusters (qemu-img convert -o cluster_size=)",
			ErrUnsupported, h.size, cluster, need, maxL1Bytes/entryBytes)
	case uint64(h.l1Entries) < need:
		return fmt.Errorf("%w: l1_size is %d, but a disk of %d bytes needs %d", ErrCorrupt, h.l1Entries, h.size, need)
	case h.l1Offset < cluster || h.l1Offset%cluster != 0:
		return fmt.Errorf("%w: l1_table_offset is %#x", ErrCorrupt, h.l1Offset)
	case h.l1Offset > uint64(fileSize) || size > uint64(fileSize)-h.l1Offset:
		return fmt.Errorf("%w: the L1 table, %d bytes at %d, is not within the %d bytes of the file",
			ErrCorrupt, size, h.l1Offset, fileSize)
	}
	return nil
}

// l1Needed is how many entries of the L1 table the disk takes: each stands for one L2 table, which is a cluster (section
// "Cluster mapping").
func (h *header) l1Needed() uint64 {
	span := uint64(1) << (2*h.clusterBits - 3)
	need := h.size / span
	if h.size%span != 0 {
		need++
	}
	return need
}
