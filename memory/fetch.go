package memory

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"syscall"
	"time"
)

// TouchTime is for how long after its first an Image records touches: the working
// set of a resume, and not what a machine comes by in an hour.
const TouchTime = 10 * time.Second

// pauses are how long a fetch that failed waits before it is tried again.
var pauses = [...]time.Duration{20 * time.Millisecond, 60 * time.Millisecond, 180 * time.Millisecond, 540 * time.Millisecond}

// A flight is the fetch of a chunk that others may wait for. err is set before done
// closes.
type flight struct {
	done  chan struct{}
	err   error
	ahead bool   // nobody had asked for the chunk
	batch bool   // and it comes with others: waiting for it may take longer than fetching it
	found bool   // nothing had to be fetched: all of it was there
	epoch uint64 // of the image, when it began
}

// Fetch makes the pages of a chunk present, for somebody who waits for one of them.
// Calls for the same chunk are merged: one fetches, the others wait. A fetch that
// failed is tried again by the next call, and by a caller that waits for it if it
// failed because its own caller gave up, or was a prefetch. The error is a
// *[FetchError], or [ErrClosed].
func (img *Image) Fetch(ctx context.Context, chunk int64) error {
	return img.demand(ctx, chunk, nil)
}

// demand is Fetch; want, if not nil, is what is wanted most of the chunk.
func (img *Image) demand(ctx context.Context, chunk int64, want *need) error {
	img.mu.Lock()
	img.demands++
	img.mu.Unlock()
	defer img.served()
	return img.get(ctx, chunk, false, want)
}

// served ends a demand.
func (img *Image) served() {
	img.mu.Lock()
	defer img.mu.Unlock()
	if img.demands--; img.demands == 0 {
		img.quiet()
	}
}

// quiet lets those go on who give way to demands, even if the next one comes before
// they do. The caller holds mu.
func (img *Image) quiet() {
	img.lulls++
	img.lull.Broadcast()
}

// get is Fetch; ahead says that nobody has asked for the chunk yet.
func (img *Image) get(ctx context.Context, chunk int64, ahead bool, want *need) error {
	if err := img.known(chunk); err != nil {
		return err
	}
	for {
		f, mine, err := img.board(chunk, ahead)
		if f == nil {
			return err
		}
		if mine {
			if f.found = img.find(chunk); f.found {
				return img.land(f, chunk, nil)
			}
			return img.land(f, chunk, img.fetch(ctx, chunk, img.installer(ahead, want)))
		}
		select {
		case <-f.done:
		case <-ctx.Done():
			return &FetchError{chunk, ctx.Err()}
		}
		if f.err == nil || ctx.Err() != nil || !f.ahead && !ended(f.err) {
			return f.err
		}
	}
}

func (img *Image) known(chunk int64) error {
	if n := img.src.Chunks(); chunk < 0 || chunk >= n {
		return &FetchError{chunk, fmt.Errorf("%w: it has %d chunks", ErrSource, n)}
	}
	return nil
}

// ended says whether a fetch failed because somebody gave up.
func ended(err error) bool {
	return errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)
}

// board joins the flight that fetches chunk, or starts one, which is then mine
// to fly. There is none if the chunk is there already or the image is gone.
func (img *Image) board(chunk int64, ahead bool) (f *flight, mine bool, err error) {
	img.mu.Lock()
	defer img.mu.Unlock()
	if img.refs == 0 {
		return nil, false, fmt.Errorf("memory: image: %w", ErrClosed)
	}
	if img.done.get(uint64(chunk)) {
		return nil, false, nil
	}
	if !ahead {
		img.touch(chunk)
	}
	if f := img.flights[chunk]; f != nil && (ahead || !f.batch) {
		return f, false, nil
	}
	return img.start(chunk, &flight{ahead: ahead}), true, nil
}

// start makes f the flight of chunk. The caller holds mu.
func (img *Image) start(chunk int64, f *flight) *flight {
	f.done, f.epoch = make(chan struct{}), img.epoch
	img.flights[chunk] = f
	img.refs++
	return f
}

// land ends a flight of mine and returns its error.
func (img *Image) land(f *flight, chunk int64, err error) error {
	at := uint64(chunk)
	img.mu.Lock()
	if img.flights[chunk] == f {
		delete(img.flights, chunk)
	}
	if !img.done.get(at) {
		img.arrived++
		img.ages[chunk] = img.arrived // a part of it may be there, even after an error
	}
	if err == nil && !img.done.get(at) {
		if !f.found {
			img.chunksFetched.Add(1)
		}
		img.ahead.clear(at, at+1)
		if f.ahead {
			img.ahead.set(at, at+1)
		}
		// What left the image in the meantime may have been this chunk's.
		if f.epoch == img.epoch {
			img.done.set(at, at+1)
		}
	}
	img.mu.Unlock()
	f.err = err
	close(f.done)
	img.trim()
	return errors.Join(err, img.release())
}

// fetch has the source read a chunk, and tries again what may pass.
func (img *Image) fetch(ctx context.Context, chunk int64, install installFunc) error {
	for attempt := 0; ; attempt++ {
		err := ctx.Err()
		if err == nil {
			err = sound(func() error { return img.src.Fetch(ctx, chunk, install) })
		}
		if err == nil {
			return nil
		}
		if attempt == len(pauses) || !passing(err) {
			return &FetchError{chunk, err}
		}
		if err := img.pause(ctx, pauses[attempt]); err != nil {
			return &FetchError{chunk, err}
		}
	}
}

// A need is a page that a thread waits for. ready is called when it is there, with
// others around it, and the rest of its chunk is still to come.
type need struct {
	gpa   uint64
	ready func(Range)
}

// aroundFault is how much comes before the rest of a chunk, aligned: what the kernel
// maps around a fault, so that the next pages cause none.
const aroundFault = 64 << 10

// An installFunc is what a source is given to install pages with.
type installFunc = func(gpa uint64, pages []byte) error

func (img *Image) installer(ahead bool, want *need) installFunc {
	count := &img.demandPages
	if ahead {
		count = &img.aheadPages
	}
	return func(gpa uint64, pages []byte) error {
		if end := gpa + uint64(len(pages)); want != nil && gpa <= want.gpa && want.gpa < end {
			from := want.gpa &^ (aroundFault - 1)
			lo, hi := max(gpa, from), min(end, from+aroundFault)
			if err := img.install(lo, pages[lo-gpa:hi-gpa], count); err != nil {
				return err
			}
			want.ready(Range{GPA: lo, Len: hi - lo})
		}
		return img.install(gpa, pages, count)
	}
}

// sound calls f, which calls the source, and makes an error of a panic: a machine
// may end because of it, the others of this process must not.
func sound(f func() error) (err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("%w: panic: %v\n%s", ErrSource, r, debug.Stack())
		}
	}()
	return f()
}

// passing says whether the cause of err may have gone by the next attempt. See
// Source.
func passing(err error) bool {
	var t interface{ Temporary() bool }
	if ended(err) || !errors.As(err, &t) {
		return false
	}
	_, system := t.(syscall.Errno)
	return system || t.Temporary()
}

// pause waits for d, or for the end of ctx, which is an error.
func pause(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// lacks says whether the source has left a page out of a chunk that it has fetched.
func (img *Image) lacks(chunk int64, page uint64) bool {
	img.mu.Lock()
	defer img.mu.Unlock()
	return img.done.get(uint64(chunk)) && !img.present.get(page)
}

// cameAhead says whether the page at gpa was fetched before anybody had asked for its
// chunk.
func (img *Image) cameAhead(gpa uint64) bool {
	_, chunk, err := img.lookup(gpa)
	return err == nil && chunk >= 0 && img.ahead.get(uint64(chunk))
}

// touch records the first demand for a chunk that is not there. The caller holds mu.
func (img *Image) touch(chunk int64) {
	at := uint64(chunk)
	if img.asked.get(at) {
		return
	}
	now := img.now()
	if len(img.touched) == 0 {
		img.first = now
	}
	if now.Sub(img.first) <= TouchTime {
		img.asked.set(at, at+1)
		img.touched = append(img.touched, chunk)
	}
}

// Touched returns the chunks that were fetched because somebody touched a page of
// them, in the order of the first time, for [TouchTime] from the first of all: page
// faults and accesses of all machines of the image. What was brought by Prefetch or
// Populate before anybody asked is not among them, since nobody has to ask for it
// any more: the working set of a machine that resumes with a prefetched one is that
// and this. The caller owns the slice.
func (img *Image) Touched() []int64 {
	img.mu.Lock()
	defer img.mu.Unlock()
	return append([]int64(nil), img.touched...)
}
