package blockdev

import (
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"sync"
	"sync/atomic"
)

// An Overlay is a disk whose changes lie in a local sparse file, block by block, over a device that is only read. Blocks that
// are not in the file show what is below; a map in memory, of 2 bits a block, says which are.
//
// The file is not encrypted. Space that the guest discards is given back to the file system.
//
// After a crash of the process or of the host, the file can be opened again: everything that was flushed is there, and of what
// was not, any part may be. To that end a Flush makes the blocks durable first and the map's changes after them, so that the
// map in the file never promises more than there is.
type Overlay struct {
	file  storage
	path  string
	head  overlayHeader
	lower Device // nil: zeros
	under int64  // size of lower
	dir   string // with the file's name, which is not durable yet; or empty

	blocks  *blockMap
	writers stripes
	writes  atomic.Uint64
	epoch   epoch
	still   atomic.Pointer[Still] // nil: nothing is kept

	flush    sync.Mutex
	flushErr error // of the first sync that failed
}

// storage is the file under an overlay. Its errors are those of os.File; one of PunchHole that matches errors.ErrUnsupported
// says that nothing was done.
type storage interface {
	io.ReaderAt
	io.WriterAt
	io.Closer
	PunchHole(off, n int64) error
	Truncate(size int64) error
	Sync() error // of the contents
}

// OverlayOptions are the choices for a new overlay. Size is needed.
type OverlayOptions struct {
	// Size of the disk in bytes: a multiple of MinBlockSize, not less than that of what is below. What lies behind the end of that is zero.
	Size int64
	// BlockSize is the unit in which changes are kept, in bytes: a power of two from 4096 up to 65536. 0 means 4096:
	// BenchmarkOverlayBlockSize.
	BlockSize int
	// Lower says what is below, for whoever opens the overlay again.
	Lower Lower
}

// Lower says what an overlay lies on. This package stores it; it means nothing to it.
type Lower struct {
	// Kind says what Name and Identity are: at most 16 bytes. Empty for an overlay on nothing.
	Kind string
	// Name tells where the lower device was, such as a path, in at most 2048 bytes.
	Name string
	// Identity is of what is below.
	Identity Identity
}

// CreateOverlay makes a new file, which must not exist, with mode 0600. lower, of which nothing is on the disk behind
// its end, may be nil; it must not change, stays the caller's, and must outlive the overlay.
func CreateOverlay(path string, lower Device, opts OverlayOptions) (*Overlay, error) {
	file, err := createOverlayFile(path)
	if err != nil {
		return nil, err
	}
	o, err := newOverlay(file, path, lower, opts)
	if err != nil {
		return nil, errors.Join(err, file.Close(), removeFile(path))
	}
	o.dir = filepath.Dir(path)
	return o, nil
}

// newOverlay makes an overlay of an empty file. It syncs nothing: until the first Flush there is nothing to keep.
func newOverlay(file storage, path string, lower Device, opts OverlayOptions) (*Overlay, error) {
	head, err := newOverlayHeader(opts)
	if err != nil {
		return nil, err
	}
	o, err := joinOverlay(file, path, lower, head)
	if err != nil {
		return nil, err
	}
	if err := file.Truncate(head.fileSize()); err != nil {
		return nil, fmt.Errorf("blockdev: make overlay %s: %w", path, err)
	}
	if _, err := file.WriteAt(head.marshal(), 0); err != nil {
		return nil, fmt.Errorf("blockdev: make overlay %s: %w", path, err)
	}
	return o, nil
}

// OpenOverlay opens an overlay that was made before, over a device with the same contents as then: the caller has compared
// what ReadOverlay says of it. Errors: ErrOverlay, ErrVersion, ErrInUse.
func OpenOverlay(path string, lower Device) (*Overlay, error) {
	file, err := openOverlayFile(path)
	if err != nil {
		return nil, err
	}
	o, err := loadOverlay(file, path, lower)
	if err != nil {
		return nil, errors.Join(err, file.Close())
	}
	return o, nil
}

func loadOverlay(file storage, path string, lower Device) (*Overlay, error) {
	head, err := readOverlayHeader(file)
	if err != nil {
		return nil, fmt.Errorf("open overlay %s: %w", path, err)
	}
	// Before there is a map of the size that the header says.
	if n, err := file.ReadAt(make([]byte, 1), head.fileSize()-1); n == 0 {
		return nil, fmt.Errorf("open overlay %s: %w: it is cut off: %w", path, ErrOverlay, err)
	}
	o, err := joinOverlay(file, path, lower, head)
	if err != nil {
		return nil, err
	}
	if err := o.blocks.load(file, head.mapAt()); err != nil {
		return nil, fmt.Errorf("open overlay %s: %w", path, err)
	}
	return o, nil
}

func joinOverlay(file storage, path string, lower Device, head overlayHeader) (*Overlay, error) {
	o := &Overlay{file: file, path: path, head: head, lower: lower, blocks: newBlockMap(head.blocks())}
	if lower != nil {
		o.under = lower.Size()
	}
	if o.under > head.size {
		return nil, fmt.Errorf("%w: an overlay of %d bytes over a disk of %d", ErrNotDisk, head.size, o.under)
	}
	return o, nil
}

// Size implements Device.
func (o *Overlay) Size() int64 { return o.head.size }

// BlockSize implements Device: images of disks assume sectors of that size.
func (o *Overlay) BlockSize() int { return MinBlockSize }

// ReadOnly implements Device.
func (o *Overlay) ReadOnly() bool { return false }

// Path is the name of the file.
func (o *Overlay) Path() string { return o.path }

// ReadAt implements Device.
func (o *Overlay) ReadAt(p []byte, off int64) (int, error) {
	if err := CheckRange("read", off, int64(len(p)), o.head.size); err != nil {
		return 0, err
	}
	for n := 0; n < len(p); {
		state, end := o.run(off+int64(n), off+int64(len(p)))
		part := p[n : end-off]
		var err error
		switch state {
		case blockData:
			_, err = o.file.ReadAt(part, o.head.dataAt()+off+int64(n))
		case blockZero:
			clear(part)
		default:
			err = readBelow(o.lower, o.under, part, off+int64(n))
		}
		if err != nil {
			return n, o.wrap("read", off, int64(len(p)), err)
		}
		n += len(part)
	}
	return len(p), nil
}

// run says in which state the block at off is, and where the blocks of that state end, at most at limit.
func (o *Overlay) run(off, limit int64) (blockState, int64) {
	first, last := off>>o.head.shift, (limit-1)>>o.head.shift
	state, end := o.blocks.run(first, last+1)
	return state, min(end<<o.head.shift, limit)
}

// WriteAt implements Device.
func (o *Overlay) WriteAt(p []byte, off int64) (int, error) {
	n := int64(len(p))
	if err := CheckRange("write", off, n, o.head.size); err != nil || n == 0 {
		return 0, err
	}
	o.writes.Add(1)
	o.keep(off, n)
	defer o.writers.lock(off, n)()
	defer o.note(off, n)
	if err := o.write(p, off); err != nil {
		return 0, o.wrap("write", off, n, err)
	}
	return len(p), nil
}

// write writes p, with the writers' lock for its blocks.
func (o *Overlay) write(p []byte, off int64) error {
	if head := o.partialAt(off, off+int64(len(p))); head > off {
		if err := o.merge(p[:head-off], off); err != nil {
			return err
		}
		p, off = p[head-off:], head
	}
	end := off + int64(len(p))
	tail := end
	if block := end &^ (o.head.blockSize() - 1); block >= off && o.partialAt(block, end) > block {
		tail = block
	}
	if tail > off {
		if _, err := o.file.WriteAt(p[:tail-off], o.head.dataAt()+off); err != nil {
			return err
		}
		o.set(off, tail, blockData)
	}
	if tail < end {
		return o.merge(p[tail-off:], tail)
	}
	return nil
}

// partialAt says up to where a write from off to end must first bring in the rest of the block that off is in: to
// off itself if it need not.
func (o *Overlay) partialAt(off, end int64) int64 {
	block := off &^ (o.head.blockSize() - 1)
	blockEnd := min(block+o.head.blockSize(), o.head.size)
	if block == off && blockEnd <= end || o.blocks.get(off>>o.head.shift) == blockData {
		return off
	}
	return min(blockEnd, end)
}

// merge writes a part of a block that is not in the file: the whole of it, with what it showed around the part.
func (o *Overlay) merge(p []byte, off int64) error {
	block := off &^ (o.head.blockSize() - 1)
	whole := make([]byte, min(o.head.blockSize(), o.head.size-block))
	if o.blocks.get(off>>o.head.shift) == blockAbsent {
		if err := readBelow(o.lower, o.under, whole, block); err != nil {
			return err
		}
	}
	copy(whole[off-block:], p)
	if _, err := o.file.WriteAt(whole, o.head.dataAt()+block); err != nil {
		return err
	}
	o.set(block, block+int64(len(whole)), blockData)
	return nil
}

// set notes the state of the blocks from off to end.
func (o *Overlay) set(off, end int64, state blockState) {
	o.blocks.set(off>>o.head.shift, (end+o.head.blockSize()-1)>>o.head.shift, state)
}

// Discard implements Device.
func (o *Overlay) Discard(off, n int64) error { return o.zero("discard", off, n) }

// WriteZeroes implements Device. It keeps no space: what space a block takes is known only when it has contents.
func (o *Overlay) WriteZeroes(off, n int64) error { return o.zero("write zeroes to", off, n) }

func (o *Overlay) zero(op string, off, n int64) error {
	if err := CheckRange(op, off, n, o.head.size); err != nil || n == 0 {
		return err
	}
	o.writes.Add(1)
	o.keep(off, n)
	defer o.writers.lock(off, n)()
	defer o.note(off, n)
	size := o.head.blockSize()
	first, last := (off+size-1)&^(size-1), (off+n)&^(size-1)
	if off+n == o.head.size {
		last = o.head.size // the last block ends with the disk
	}
	if first >= last { // no whole block
		first, last = off+n, off+n
	}
	err := o.zeroPart(off, first)
	if err == nil {
		err = o.zeroBlocks(first, last)
	}
	if err == nil {
		err = o.zeroPart(last, off+n)
	}
	if err != nil {
		return o.wrap(op, off, n, err)
	}
	return nil
}

// zeroPart zeroes parts of blocks: at most two.
func (o *Overlay) zeroPart(off, end int64) error {
	for off < end {
		next := min(end, (off|(o.head.blockSize()-1))+1)
		if o.blocks.get(off>>o.head.shift) != blockZero {
			if err := o.write(make([]byte, next-off), off); err != nil {
				return err
			}
		}
		off = next
	}
	return nil
}

// zeroBlocks makes whole blocks zero. What the file holds of them is of no use any more.
func (o *Overlay) zeroBlocks(off, end int64) error {
	if off == end {
		return nil
	}
	o.set(off, end, blockZero)
	err := o.file.PunchHole(o.head.dataAt()+off, end-off)
	if errors.Is(err, errors.ErrUnsupported) {
		return nil // the space is lost, until the block is written again
	}
	return err
}

// Flush implements Device. Once a sync of the file has failed it fails for good: see File.Flush.
func (o *Overlay) Flush() error {
	o.flush.Lock()
	defer o.flush.Unlock()
	if o.flushErr != nil {
		return o.flushErr
	}
	// What the map says now is of writes that have been made; what it will say when they are durable may not be.
	pages := o.blocks.takeChanges()
	if err := o.sync(o.file.Sync); err != nil {
		return err
	}
	for i, p := range pages {
		if _, err := o.file.WriteAt(p.bytes, o.head.mapAt()+p.off); err != nil {
			o.blocks.giveBack(pages[i:])
			return fmt.Errorf("blockdev: flush overlay %s: %w", o.path, err)
		}
	}
	if len(pages) > 0 {
		if err := o.sync(o.file.Sync); err != nil {
			return err
		}
	}
	if o.dir == "" {
		return nil
	}
	dir := o.dir
	o.dir = ""
	return o.sync(func() error { return syncDir(dir) })
}

// sync makes something durable. A failure is final: the kernel may have dropped what it could not write.
func (o *Overlay) sync(sync func() error) error {
	if err := sync(); err != nil {
		o.flushErr = fmt.Errorf("blockdev: flush overlay %s: %w", o.path, err)
	}
	return o.flushErr
}

// Extent is a range of a disk, in bytes.
type Extent struct{ Off, Len int64 }

// Changes are the blocks that are not as below: those with contents, and those that are zero. They are ascending and made of
// whole blocks of OverlayOptions.BlockSize, of which the last may reach beyond the end of the disk.
func (o *Overlay) Changes() (data, zeros []Extent) {
	for block, end := int64(0), o.head.blocks(); block < end; {
		state, next := o.blocks.run(block, end)
		e := Extent{block << o.head.shift, (next - block) << o.head.shift}
		switch state {
		case blockData:
			data = append(data, e)
		case blockZero:
			zeros = append(zeros, e)
		default: // as below
		}
		block = next
	}
	return data, zeros
}

// Writes is the number of operations so far, since the overlay was opened, that may have changed what is on the disk.
func (o *Overlay) Writes() uint64 { return o.writes.Load() }

// Close flushes the overlay and gives the file back. Calls after it fail with os.ErrClosed.
func (o *Overlay) Close() error { return errors.Join(o.Flush(), o.file.Close()) }

// Remove closes the overlay and removes the file. What was in it is lost.
func (o *Overlay) Remove() error { return errors.Join(removeFile(o.path), o.file.Close()) }

func (o *Overlay) wrap(op string, off, n int64, err error) error {
	return fmt.Errorf("blockdev: %s %d bytes at %d of overlay %s: %w", op, n, off, o.path, err)
}
