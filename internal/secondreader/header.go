// Package secondreader reads snapshots by what docs/FORMAT.md says and by nothing else: it was written before its author
// had seen package snapshot, changed since only where the document was, and imports nothing of this project. Tests hold the two readers against each other; where
// they differ, the document is wrong or one of them is.
//
// It is no reader for use: it is as short as it can be, holds packs' chunks in memory one at a time, and is slow.
package secondreader

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
)

// ErrNewer is what a snapshot of a newer version of the format is rejected with.
var ErrNewer = errors.New("newer than version 1 of the format")

const (
	headerMagic = "\x89CRYO\x0d\x0a\x1a"
	headerFixed = 136 // a header without packs
	maxPacks    = 65536
	diskPages   = 1 << 36 // pages of one disk, and of memory, in the space of addresses
)

type id [16]byte

func (i id) String() string { return fmt.Sprintf("%x", i[:]) }

type header struct {
	id, parent   id
	ram          uint64
	packBytes    uint64 // of the packs that the snapshot wrote
	memoryPages  uint64 // that the page map maps
	diskPages    uint64 // likewise
	packs        []id
	checksum     [32]byte
	size         int
	createdNanos uint64
}

// parseHeader reads the header in the clear, at the start of a manifest.
func parseHeader(b []byte) (*header, error) {
	size, err := headerSize(b)
	if err != nil {
		return nil, err
	}
	h := &header{size: size, checksum: [32]byte(b[size-32 : size])}
	if sha256.Sum256(b[:size-32]) != h.checksum {
		return nil, errors.New("header: wrong checksum")
	}
	le := binary.LittleEndian
	if flags := le.Uint32(b[16:]); flags&0xffff != 0 {
		return nil, fmt.Errorf("header: flags %#x: %w", flags, ErrNewer)
	}
	h.id, h.parent = id(b[20:36]), id(b[36:52])
	h.createdNanos, h.ram, h.packBytes = le.Uint64(b[52:]), le.Uint64(b[60:]), le.Uint64(b[68:])
	h.memoryPages, h.diskPages = le.Uint64(b[84:]), le.Uint64(b[96:])
	for p := b[104 : size-32]; len(p) > 0; p = p[16:] {
		h.packs = append(h.packs, id(p[:16]))
	}
	if n := le.Uint32(b[92:]); uint64(n) != uint64(len(h.packs)) {
		return nil, fmt.Errorf("header: %d packs do not fit its size", n)
	}
	return h, h.check()
}

// headerSize checks what means the same in every version, and that the header is whole.
func headerSize(b []byte) (int, error) {
	if len(b) < 16 || string(b[:8]) != headerMagic {
		return 0, errors.New("header: wrong magic")
	}
	switch version := binary.LittleEndian.Uint32(b[8:]); {
	case version == 0:
		return 0, errors.New("header: version 0")
	case version > 1:
		return 0, fmt.Errorf("header: version %d: %w", version, ErrNewer)
	}
	size := uint64(binary.LittleEndian.Uint32(b[12:]))
	if size < headerFixed || size > headerFixed+16*maxPacks || (size-headerFixed)%16 != 0 {
		return 0, fmt.Errorf("header: size %d", size)
	}
	if size > uint64(len(b)) {
		return 0, errors.New("header: cut short")
	}
	return int(size), nil
}

func (h *header) check() error {
	switch {
	case h.id == id{}:
		return errors.New("header: no id")
	case h.parent == h.id:
		return errors.New("header: its own parent")
	case h.createdNanos >= 1<<63:
		return errors.New("header: creation time")
	case h.ram > 1<<48 || h.ram%4096 != 0:
		return fmt.Errorf("header: %d bytes of RAM", h.ram)
	case h.memoryPages > h.ram/4096:
		return errors.New("header: more pages mapped than RAM has")
	case h.diskPages > 15*diskPages:
		return errors.New("header: more blocks mapped than disks can have")
	}
	last := id{} // not a valid first pack either
	for _, p := range h.packs {
		if bytes.Compare(p[:], last[:]) <= 0 {
			return errors.New("header: packs not ascending")
		}
		last = p
	}
	return nil
}
