package snapshot

import (
	"fmt"
	"io"
	"sort"
)

// Disk is what Write stores of a disk. Offsets and lengths are in bytes; the
// unit in which blocks are stored is PageSize, the size of a block.
type Disk struct {
	// Index numbers the disks of a snapshot, from 0 and below MaxDisks. A diff must
	// give a disk the index that it has in the parent.
	Index int
	// Size of the disk, up to DiskStride.
	Size uint64
	// Layered says that there is something under the disk, a base image, that shows
	// where the snapshot holds no block: so blocks of zeros must be held too. Without
	// it, what is not held is zero.
	Layered bool
	// Data are the ranges that may have changed, and Zeros those that are known to be
	// zero: of whole blocks (the last may reach beyond Size), ascending, not
	// overlapping, neither by themselves nor with each other. GPA is the offset on the
	// disk.
	Data, Zeros []Range
	// ReadAt reads the disk, within Size, as an io.ReaderAt. It is called from several
	// goroutines.
	ReadAt func(p []byte, off int64) (int, error)
}

// base is the address of the disk's first byte.
func (d *Disk) base() uint64 { return DiskAddress(d.Index) }

// at are ranges of the disk as ranges of the snapshot's addresses.
func (d *Disk) at(ranges []Range) []Range {
	out := make([]Range, len(ranges))
	for i, r := range ranges {
		out[i] = Range{r.GPA + d.base(), r.Len}
	}
	return out
}

// read fills p, whole blocks at an address of the snapshot, with what is on the disk, and zeros
// behind its end.
func (d *Disk) read(p []byte, address uint64) ([]byte, error) {
	off := address - d.base()
	n := int(min(uint64(len(p)), d.Size-off))
	clear(p[n:])
	if got, err := d.ReadAt(p[:n], int64(off)); got < n {
		if err == nil {
			err = io.ErrUnexpectedEOF
		}
		return nil, fmt.Errorf("disk %d at %d: %w", d.Index, off, err)
	}
	return p, nil
}

func (d *Disk) check() error {
	if d.Index < 0 || d.Index >= MaxDisks || d.Size == 0 || d.Size > DiskStride {
		return fmt.Errorf("%w: disk %d of %d bytes", ErrInvalid, d.Index, d.Size)
	}
	for _, ranges := range [][]Range{d.Data, d.Zeros} {
		if _, err := checkRanges(ranges); err != nil {
			return err
		}
		if n := len(ranges); n > 0 && ranges[n-1].GPA+ranges[n-1].Len > (d.Size+PageSize-1)/PageSize*PageSize {
			return fmt.Errorf("%w: range %#x+%#x leaves disk %d, which has %d bytes",
				ErrInvalid, ranges[n-1].GPA, ranges[n-1].Len, d.Index, d.Size)
		}
	}
	return nil
}

// zeroPages is the size of the chunk to which all blocks refer that are known to be zero. A TiB
// of them takes a million extents, 20 MB; and each reader holds a buffer of a chunk's size.
const zeroPages = 256

// makeZeros stores the chunk of zeros, unless it is there.
func (w *Writer) makeZeros() error {
	if w.zeros != nil {
		return nil
	}
	w.hire(1)
	k := w.workers[0]
	k.runs = k.runs[:0]
	stored, codec := k.comp.compress(make([]byte, zeroPages*PageSize), w.opts.Codec)
	if err := k.put(stored, codec, zeroPages); err != nil {
		return err
	}
	w.zeros = &extent{chunk: uint32(len(w.chunks)), count: zeroPages}
	w.collect(&job{})
	w.info.DiskBlocks += zeroPages
	return nil
}

// repeat covers ranges with extents like e.
func (e *extent) repeat(ranges []Range) []extent {
	var out []extent
	for _, r := range ranges {
		for page, end := r.GPA/PageSize, (r.GPA+r.Len)/PageSize; page < end; {
			n := min(uint64(e.count), end-page)
			out = append(out, extent{page: page, count: uint32(n), chunk: e.chunk})
			page += n
		}
	}
	return out
}

// DiskReader reads the blocks of a disk that a snapshot holds, by chunks. It is good
// for as long as the Reader is, and its methods may be called from any number of
// goroutines.
type DiskReader struct {
	r    *Reader
	base uint64
}

// Disk returns the disk of that index, which the snapshot need not have: then it holds
// no block of it. The index is one of Disk.Index.
func (r *Reader) Disk(index int) *DiskReader { return &DiskReader{r, DiskAddress(index)} }

// Lookup describes the run of blocks around the byte at off that has one origin: the
// chunk that holds it, of which it begins at byte within, or chunk < 0 for blocks that
// the snapshot does not hold. start and length are in bytes, whole blocks. off must be
// below DiskStride; a run in no chunk reaches up to there.
func (d *DiskReader) Lookup(off int64) (start, length, chunk int64, within int) {
	run, chunk := d.r.body.lookup((d.base + uint64(off)) / PageSize)
	return int64(run.page*PageSize - d.base), int64(run.pages * PageSize), chunk, int(run.first) * PageSize
}

// ReadChunk reads and decodes a chunk. The result is the caller's. Errors are those of
// Reader.Fetch.
func (d *DiskReader) ReadChunk(chunk int64) ([]byte, error) {
	r := d.r
	if chunk < 0 || chunk >= r.Chunks() {
		return nil, fmt.Errorf("%w: chunk %d of %d", ErrInvalid, chunk, r.Chunks())
	}
	r.open.RLock()
	defer r.open.RUnlock()
	if r.closed {
		return nil, fmt.Errorf("snapshot %v: reader %w", r.header.ID, ErrClosed)
	}
	plain := make([]byte, int(r.body.chunks.pages(int(chunk)))*PageSize)
	if r.body.chunks.at(int(chunk)).codec == CodecStored {
		return r.decode(int(chunk), &fetchBuffers{stored: plain})
	}
	buf := r.buffers.Get().(*fetchBuffers)
	defer r.buffers.Put(buf)
	return r.decode(int(chunk), &fetchBuffers{buf.stored, plain})
}

// Held are the ranges of the disk that the snapshot holds, ascending.
func (d *DiskReader) Held() []Range {
	var out []Range
	for off := int64(0); off < DiskStride; {
		start, length, chunk, _ := d.Lookup(off)
		if n := len(out); chunk >= 0 && n > 0 && out[n-1].GPA+out[n-1].Len == uint64(start) {
			out[n-1].Len += uint64(length)
		} else if chunk >= 0 {
			out = append(out, Range{uint64(start), uint64(length)})
		}
		off = start + length
	}
	return out
}

// LayerInfo says what of a disk lies in the packs of one snapshot: the one that is read, or
// an ancestor.
type LayerInfo struct {
	Origin ID     `json:"origin"` // the snapshot that stored the blocks
	Blocks uint64 `json:"blocks"` // of the disk, of PageSize
	Chunks int    `json:"chunks"` // that hold them
	Stored uint64 `json:"stored"` // size of these chunks in the packs, in bytes
}

// Layers says where the blocks of the disk are, in the order of their origins' first chunks.
func (d *DiskReader) Layers() []LayerInfo {
	b := d.r.body
	var out []LayerInfo
	index, counted := map[ID]int{}, map[uint32]bool{}
	first := d.base / PageSize
	from := sort.Search(b.extents.len(), func(i int) bool { return b.extents.at(i).page >= first })
	for i := from; i < b.extents.len(); i++ {
		e := b.extents.at(i)
		if e.page >= first+diskPages {
			break
		}
		c := b.chunks.at(int(e.chunk))
		origin := b.packs[c.pack].origin
		at, known := index[origin]
		if !known {
			at = len(out)
			index[origin], out = at, append(out, LayerInfo{Origin: origin})
		}
		out[at].Blocks += uint64(e.count)
		if !counted[e.chunk] {
			counted[e.chunk] = true
			out[at].Chunks++
			out[at].Stored += uint64(c.length)
		}
	}
	return out
}
