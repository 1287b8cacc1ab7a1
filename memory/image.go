package memory

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync"
	"sync/atomic"

	"golang.org/x/sync/errgroup"
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
	Fetch(ctx context.Context, chunk int64, install func(gpa uint64, pages []byte) error) error

	// Chunks is how many chunks there are, numbered from 0.
	Chunks() int64
}

// An Image is the memory of a snapshot as far as it has been fetched, in a
// memfd that the machines resumed from it share. It only grows: nobody writes to
// it but Fetch, and machines write to private copies of its pages. All methods
// are safe for concurrent use.
type Image struct {
	size    uint64
	ranges  []Range
	src     Source
	file    *os.File
	present bitmap // pages in file. Set after the page is written: set means that touching it can't block

	mu      sync.Mutex
	refs    int               // the creator, every Memory, every fetch under way
	closed  bool              // the creator has closed it
	flights map[int64]*flight // fetches under way
	done    bitmap            // chunks that are fetched

	pagesFetched, chunksFetched atomic.Uint64
}

// A flight is a fetch that others may wait for. err is set before done closes.
type flight struct {
	done chan struct{}
	err  error
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
	return &Image{
		size:    size,
		ranges:  Layout(size),
		src:     src,
		file:    file,
		present: newBitmap(span(size) / PageSize),
		refs:    1,
		flights: make(map[int64]*flight),
		done:    newBitmap(uint64(max(src.Chunks(), 0))),
	}, nil
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

func (img *Image) release() error {
	img.mu.Lock()
	img.refs--
	last := img.refs == 0
	img.mu.Unlock()
	if !last {
		return nil
	}
	if err := img.file.Close(); err != nil {
		return fmt.Errorf("memory: close the image: %w", err)
	}
	return nil
}

// Size is the amount of RAM in bytes, without the hole.
func (img *Image) Size() uint64 { return img.size }

// Fetch makes the pages of a chunk present. Calls for the same chunk are merged:
// one fetches, the others wait. A fetch that failed is tried again by the next
// call; one that ended because its caller's ctx did is taken over by a caller
// that waits for it. The error is a *[FetchError], or ErrClosed.
func (img *Image) Fetch(ctx context.Context, chunk int64) error {
	if chunk < 0 || chunk >= img.src.Chunks() {
		return &FetchError{chunk, fmt.Errorf("%w: it has %d chunks", ErrSource, img.src.Chunks())}
	}
	for {
		f, mine, err := img.board(chunk)
		if f == nil {
			return err
		}
		if mine {
			f.err = img.fetch(ctx, chunk)
			return img.land(f, chunk)
		}
		select {
		case <-f.done:
		case <-ctx.Done():
			return &FetchError{chunk, ctx.Err()}
		}
		if !ended(f.err) || ctx.Err() != nil {
			return f.err
		}
	}
}

// ended says whether a fetch failed because somebody gave up.
func ended(err error) bool {
	return errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)
}

// board joins the flight that fetches chunk, or starts one, which is then mine
// to fly. There is none if the chunk is there already or the image is gone.
func (img *Image) board(chunk int64) (f *flight, mine bool, err error) {
	img.mu.Lock()
	defer img.mu.Unlock()
	if img.refs == 0 {
		return nil, false, fmt.Errorf("memory: image: %w", ErrClosed)
	}
	if img.done.get(uint64(chunk)) {
		return nil, false, nil
	}
	if f := img.flights[chunk]; f != nil {
		return f, false, nil
	}
	f = &flight{done: make(chan struct{})}
	img.flights[chunk] = f
	img.refs++
	return f, true, nil
}

// land ends a flight of mine and returns its error.
func (img *Image) land(f *flight, chunk int64) error {
	img.mu.Lock()
	delete(img.flights, chunk)
	if f.err == nil {
		img.done.set(uint64(chunk), uint64(chunk)+1)
	}
	img.mu.Unlock()
	close(f.done)
	return errors.Join(f.err, img.release())
}

func (img *Image) fetch(ctx context.Context, chunk int64) error {
	err := ctx.Err()
	if err == nil {
		err = img.src.Fetch(ctx, chunk, img.install)
	}
	if err != nil {
		return &FetchError{chunk, err}
	}
	img.chunksFetched.Add(1)
	return nil
}

// install writes pages that are not there yet. A page is written whole by one
// pwrite, under the kernel's lock of that page, so that nobody ever sees a part
// of it. Writing through a shared mapping would not have that.
func (img *Image) install(gpa uint64, pages []byte) error {
	n := uint64(len(pages))
	if gpa%PageSize != 0 || n%PageSize != 0 || !inRAM(img.ranges, gpa, n) {
		return fmt.Errorf("%w: %d bytes for GPA %#x", ErrSource, n, gpa)
	}
	end := (gpa + n) / PageSize
	for lo := gpa / PageSize; lo < end; {
		lo = img.present.next(lo, end, false)
		hi := img.present.next(lo, end, true)
		if lo == hi {
			break
		}
		if _, err := img.file.WriteAt(pages[lo*PageSize-gpa:hi*PageSize-gpa], int64(lo*PageSize)); err != nil {
			return fmt.Errorf("memory: write %d pages to the image: %w", hi-lo, err)
		}
		img.present.set(lo, hi)
		img.pagesFetched.Add(hi - lo)
		lo = hi
	}
	return nil
}

// Populate fetches all chunks, on all processors. Pages that the source knows to
// be zero take no memory and are not touched.
func (img *Image) Populate(ctx context.Context) error {
	return img.populate(ctx, func(uint64) {})
}

// populate tells progress how many bytes the image has, from several goroutines.
func (img *Image) populate(ctx context.Context, progress func(bytes uint64)) error {
	g, ctx := errgroup.WithContext(ctx)
	var next atomic.Int64
	for range runtime.GOMAXPROCS(0) {
		g.Go(func() error {
			for chunk := next.Add(1) - 1; chunk < img.src.Chunks(); chunk = next.Add(1) - 1 {
				if err := img.Fetch(ctx, chunk); err != nil {
					return err
				}
				progress(img.pagesFetched.Load() * PageSize)
			}
			return nil
		})
	}
	return g.Wait()
}
