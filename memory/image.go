package memory

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

// A Source is where an image comes from: a snapshot. Its methods must be safe
// for concurrent use, and its answers must not change.
type Source interface {
	// Lookup describes the longest run of guest pages around the page at gpa,
	// which is in RAM, that have one origin: the chunk they are in, or a
	// negative chunk for pages that are all zero. start and length are in
	// bytes, multiples of PageSize.
	Lookup(gpa uint64) (start, length uint64, chunk int64)

	// Fetch reads a chunk and calls install for every run of guest pages that
	// Lookup attributes to it, and for no others. pages is whole pages, valid
	// during the call only. Fetch returns the error of install, if there is one,
	// and ctx's when it gives up because of ctx.
	//
	// It is called again, for a second at most, when its error may pass: when it is
	// one of the operating system's (syscall.Errno), or has a method Temporary() bool
	// that says so. The first error of the chain that has this method decides, so
	// that a source can overrule what it wraps. Damage does not pass.
	Fetch(ctx context.Context, chunk int64, install func(gpa uint64, pages []byte) error) error

	// Chunks is how many chunks there are, numbered from 0.
	Chunks() int64
}

// A RunSource is a source that knows where the pages of a chunk are. What is there
// already, because another process has fetched it, is not fetched from it again.
type RunSource interface {
	Source

	// ChunkRuns are the runs of guest pages that Fetch installs for a chunk.
	ChunkRuns(chunk int64) []Range
}

// A BatchSource is a source that can read chunks that lie near each other at once.
type BatchSource interface {
	Source

	// FetchBatch is Fetch for several chunks, in an order of its own. After an error,
	// nobody knows which of them were installed.
	FetchBatch(ctx context.Context, chunks []int64, install func(gpa uint64, pages []byte) error) error
}

// An Image is the memory of a snapshot as far as it has been fetched, in a
// memfd that the machines resumed from it share, also those of other processes
// (Lend, AdoptImage). Nobody writes to it but Fetch and its kin, and machines write to
// private copies of its pages; it shrinks by Reclaim, and where a limit is set.
// All methods are safe for concurrent use.
type Image struct {
	size   uint64
	ranges []Range
	src    Source
	file   *os.File

	// present is the pages in file. A bit is set after the page is written. As long
	// as it is set, touching the page can't block.
	present bitmap
	pages   atomic.Int64 // how many bits of present are set
	huge    bitmap       // what may be a huge page of file, in whole or in part
	zeroing sync.RWMutex // held for reading while a machine maps zeros of its own, for writing while it must not
	filling sync.RWMutex // held for writing while pages leave file, for reading while others enter it

	mapMu  sync.Mutex
	maps   []*Memory           // every Memory of the image
	pinned map[*Range]struct{} // what Go code is about to touch: the limit takes none of it
	eager  atomic.Int32        // of maps: those that can't ask for a page

	lease io.Closer    // of an image of another process; nil for one of our own
	lent  atomic.Int32 // how many processes have it; grows under mapMu

	limit    atomic.Uint64 // bytes; 0 is none
	trimming sync.Mutex

	mu      sync.Mutex
	refs    int               // the creator, every Memory, every fetch under way
	closed  bool              // the creator has closed it
	flights map[int64]*flight // fetches under way
	done    bitmap            // chunks that are fetched: all of their pages are present
	epoch   uint64            // grows when pages leave file
	ahead   bitmap            // chunks that were fetched before anybody had asked
	ages    map[int64]uint64  // chunks that may have pages in file; the larger, the later they came
	arrived uint64            // the largest age

	demands int        // fetches that somebody waits for
	lulls   uint64     // how often that has become none
	lull    *sync.Cond // of mu, for the next time

	asked   bitmap  // chunks in touched
	touched []int64 // in the order of the first demand
	first   time.Time

	now   func() time.Time
	pause func(context.Context, time.Duration) error // between two attempts to fetch

	demandPages, aheadPages, chunksFetched, reclaimed, found, evictedPages, filled atomic.Uint64
}

// NewImage returns an empty image of size bytes of RAM that fills itself from
// src. The caller closes it when it will make no more mappings; memories made
// from it go on. src must stay usable until the image and all of these are
// closed.
func NewImage(size uint64, src Source) (*Image, error) {
	if err := checkSize(size); err != nil {
		return nil, err
	}
	file, err := newImageFile(span(size))
	if err != nil {
		return nil, err
	}
	return imageOf(size, src, file), nil
}

func imageOf(size uint64, src Source, file *os.File) *Image {
	chunks := uint64(max(src.Chunks(), 0))
	img := &Image{
		size:    size,
		ranges:  Layout(size),
		src:     src,
		file:    file,
		present: newBitmap(span(size) / PageSize),
		huge:    newBitmap(span(size)/hugePage + 1),
		refs:    1,
		flights: make(map[int64]*flight),
		done:    newBitmap(chunks),
		ahead:   newBitmap(chunks),
		asked:   newBitmap(chunks),
		ages:    make(map[int64]uint64),
		pinned:  make(map[*Range]struct{}),
		now:     time.Now,
		pause:   pause,
	}
	img.lull = sync.NewCond(&img.mu)
	return img
}

// Close gives up the creator's hold. The image goes away with the last Memory
// that uses it. Close is idempotent.
func (img *Image) Close() error {
	img.mu.Lock()
	again := img.closed
	img.closed = true
	img.mu.Unlock()
	if again {
		return nil
	}
	return img.release()
}

// acquire takes a hold for a Memory.
func (img *Image) acquire() error {
	img.mu.Lock()
	defer img.mu.Unlock()
	if img.closed {
		return fmt.Errorf("memory: image: %w", ErrClosed)
	}
	img.refs++
	return nil
}

// hold keeps the file open until release, and says whether it is.
func (img *Image) hold() bool {
	img.mu.Lock()
	defer img.mu.Unlock()
	if img.refs == 0 {
		return false
	}
	img.refs++
	return true
}

func (img *Image) release() error {
	img.mu.Lock()
	img.refs--
	last := img.refs == 0
	img.mu.Unlock()
	if !last {
		return nil
	}
	err := img.file.Close()
	if img.lease != nil {
		err = errors.Join(err, img.lease.Close()) // now, when nothing of the file is mapped here
	}
	if err != nil {
		return fmt.Errorf("memory: close the image: %w", err)
	}
	return nil
}

// Size is the amount of RAM in bytes, without the hole.
func (img *Image) Size() uint64 { return img.size }

// install writes pages that are not there yet. A page is written whole by one
// pwrite, under the kernel's lock of that page, so that nobody ever sees a part
// of it. Writing through a shared mapping would not have that. Two that install a
// page at the same time write the same bytes.
func (img *Image) install(gpa uint64, pages []byte, count *atomic.Uint64) error {
	n := uint64(len(pages))
	if gpa%PageSize != 0 || n%PageSize != 0 || !inRAM(img.ranges, gpa, n) {
		return fmt.Errorf("%w: %d bytes for GPA %#x", ErrSource, n, gpa)
	}
	img.filling.RLock()
	defer img.filling.RUnlock()
	return img.put(gpa, pages, count)
}

// put is install; the caller holds filling.
func (img *Image) put(gpa uint64, pages []byte, count *atomic.Uint64) error {
	end := (gpa + uint64(len(pages))) / PageSize
	for lo := gpa / PageSize; lo < end; {
		lo = img.present.next(lo, end, false)
		hi := img.present.next(lo, end, true)
		if lo == hi {
			break
		}
		if _, err := img.file.WriteAt(pages[lo*PageSize-gpa:hi*PageSize-gpa], int64(lo*PageSize)); err != nil {
			return fmt.Errorf("memory: write %d pages to the image: %w", hi-lo, err)
		}
		fresh := img.present.set(lo, hi) // a demand may install what a batch does at the same time
		img.pages.Add(int64(fresh))
		count.Add(uint64(fresh))
		lo = hi
	}
	return nil
}

// lookup asks the source for the run of pages around gpa, without what is not RAM.
func (img *Image) lookup(gpa uint64) (run Range, chunk int64, err error) {
	var start, length uint64
	err = sound(func() error {
		start, length, chunk = img.src.Lookup(gpa)
		return nil
	})
	if err != nil {
		return Range{}, 0, err
	}
	lo, hi := clip(img.ranges, gpa, start, length)
	if lo%PageSize != 0 || hi%PageSize != 0 || gpa < lo || gpa >= hi {
		return Range{}, 0, fmt.Errorf("%w: GPA %#x is in [%#x, %#x)", ErrSource, gpa, lo, hi)
	}
	return Range{GPA: lo, Len: hi - lo}, chunk, nil
}
