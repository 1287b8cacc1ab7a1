package qcow2

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"slices"

	"github.com/cryovisor/cryovisor/blockdev"
	"github.com/cryovisor/cryovisor/internal/newfile"
)

// The geometry of the images that Write makes: that of qemu-img.
const (
	clusterBits  = 16
	clusterBytes = 1 << clusterBits
	tableEntries = clusterBytes / entryBytes // of an L2 table, and of a cluster of the refcount table
	blockEntries = clusterBytes / 2          // of a refcount block
	copied       = 1 << 63                   // "refcount is exactly one" in L1 and L2 entries

	copyBytes = 1 << 20 // read from the source at once; divides what an L2 table stands for
)

// Write writes all of src into a new image: qcow2 version 3, clusters of 64 KiB, not compressed. Clusters that are all zero
// take no space. Nothing has the name path before the image is complete and durable, and nothing is left after an error; one
// that wraps fs.ErrExist says that path is there already. Src must not change meanwhile. Only the owner can read the file.
func Write(ctx context.Context, path string, src blockdev.Device) error {
	err := newfile.Create(path, func(f *os.File) error { return writeImage(ctx, f, src) })
	if err != nil {
		return fmt.Errorf("qcow2: write %s: %w", path, err)
	}
	return nil
}

// imageWriter fills an image from the front to the back. Clusters are numbered by their place in the file:
//
//	0  header
//	1  L1 table
//	   for each part of the disk that an L2 table stands for: its data, the L2 table
//	   refcount table
//	   refcount blocks
type imageWriter struct {
	file *os.File
	next uint64 // the first cluster that is free
	l1   []uint64
	l2   []uint64 // of the part of the disk that is being written
}

func writeImage(ctx context.Context, file *os.File, src blockdev.Device) error {
	h := header{clusterBits: clusterBits, size: uint64(src.Size()), l1Offset: clusterBytes}
	need := h.l1Needed()
	if need > maxL1Bytes/entryBytes {
		return fmt.Errorf("%w: a disk of %d bytes", ErrUnsupported, src.Size())
	}
	h.l1Entries = uint32(need)
	w := &imageWriter{file: file, l1: make([]uint64, need), l2: make([]uint64, tableEntries)}
	w.next = 1 + clusters(need, tableEntries)
	if err := w.disk(ctx, src); err != nil {
		return err
	}
	if err := w.put(1, w.l1); err != nil {
		return err
	}
	h.refcountTable = w.next * clusterBytes
	var err error
	if h.refcountSize, err = w.refcounts(); err != nil {
		return err
	}
	_, err = file.WriteAt(h.marshal()[:], 0)
	return err
}

// clusters is how many clusters n entries take.
func clusters(n, entries uint64) uint64 { return (n + entries - 1) / entries }

// disk writes the data and the L2 tables.
func (w *imageWriter) disk(ctx context.Context, src blockdev.Device) error {
	buf := make([]byte, copyBytes)
	for off := int64(0); off < src.Size(); off += copyBytes {
		if err := ctx.Err(); err != nil {
			return err
		}
		n := min(copyBytes, src.Size()-off)
		if _, err := src.ReadAt(buf[:n], off); err != nil {
			return err
		}
		clear(buf[n:]) // the last cluster is written as a whole
		first := uint64(off) / clusterBytes
		if err := w.data(buf, first); err != nil {
			return err
		}
		end := first + copyBytes/clusterBytes
		if end%tableEntries == 0 || off+copyBytes >= src.Size() {
			if err := w.table((end - 1) / tableEntries); err != nil {
				return err
			}
		}
	}
	return nil
}

var zeros [clusterBytes]byte

// data writes the clusters in b, the first of which is the disk's cluster number first.
func (w *imageWriter) data(b []byte, first uint64) error {
	for i := range uint64(len(b) / clusterBytes) {
		c := b[i*clusterBytes:][:clusterBytes]
		if bytes.Equal(c, zeros[:]) {
			continue
		}
		if _, err := w.file.WriteAt(c, int64(w.next*clusterBytes)); err != nil {
			return err
		}
		w.l2[(first+i)%tableEntries] = w.next*clusterBytes | copied
		w.next++
	}
	return nil
}

// table writes the L2 table as number i, unless it has no entries, and empties it.
func (w *imageWriter) table(i uint64) error {
	if !slices.ContainsFunc(w.l2, func(e uint64) bool { return e != 0 }) {
		return nil
	}
	if err := w.put(w.next, w.l2); err != nil {
		return err
	}
	w.l1[i] = w.next*clusterBytes | copied
	w.next++
	clear(w.l2)
	return nil
}

// refcounts writes the refcount table and blocks (section "Host cluster management"), and returns how many clusters the table
// takes. Every cluster before them and of theirs is used once.
func (w *imageWriter) refcounts() (uint32, error) {
	var total, blocks, tables uint64
	// They count themselves too, so that their number is found step by step; it only grows.
	for n := w.next; n != total; n = w.next + blocks + tables {
		total = n
		blocks = clusters(total, blockEntries)
		tables = clusters(blocks, tableEntries)
	}
	table := make([]uint64, tables*tableEntries)
	for i := range blocks {
		table[i] = (w.next + tables + i) * clusterBytes
	}
	if err := w.put(w.next, table); err != nil {
		return 0, err
	}
	counts := make([]uint16, blockEntries)
	for i := range blocks {
		clear(counts)
		for j := range min(blockEntries, total-i*blockEntries) {
			counts[j] = 1
		}
		if err := w.put(w.next+tables+i, counts); err != nil {
			return 0, err
		}
	}
	return uint32(tables), nil
}

// put writes a slice of numbers from the start of a cluster on.
func (w *imageWriter) put(cluster uint64, numbers any) error {
	b, err := binary.Append(nil, binary.BigEndian, numbers)
	if err != nil {
		return err
	}
	_, err = w.file.WriteAt(b, int64(cluster*clusterBytes))
	return err
}
