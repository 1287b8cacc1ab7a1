package memory

import (
	"context"
	"errors"
	"fmt"
	"runtime"

	"golang.org/x/sync/errgroup"
)

// batchChunks is how many chunks a prefetch reads at once, where the source can do
// that: enough that reads are large, and few enough that it soon looks again
// whether somebody waits.
const batchChunks = 16

// Prefetch fetches chunks before anybody asks for them, about in this order, and
// returns when all are there or on their way. It gives way to those who wait for a
// page: no worker begins with a chunk, or with a few of a [BatchSource], while
// somebody waits. workers is how many there are at most, and 0 as many as leave one
// processor to the machines; there are never more than that, but always one.
//
// At the limit of the image, if it has one, it stops, without an error.
//
// It ends with the first error, which is a *[FetchError], [ErrClosed] when the image
// is gone, or ctx's. None is a failure of a machine: what is missing is fetched when
// it is touched.
func (img *Image) Prefetch(ctx context.Context, chunks []int64, workers int) error {
	for _, chunk := range chunks {
		if err := img.known(chunk); err != nil {
			return err
		}
	}
	most := max(1, runtime.GOMAXPROCS(0)-1)
	if workers <= 0 || workers > most {
		workers = most
	}
	g, ctx := errgroup.WithContext(ctx)
	for range workers {
		g.Go(func() error { return img.prefetch(ctx, &chunks, func(uint64) {}) })
	}
	return g.Wait()
}

// prefetch is a worker: it takes from left, under mu, until there is nothing left, and
// tells progress how many bytes the image has got so far.
func (img *Image) prefetch(ctx context.Context, left *[]int64, progress func(bytes uint64)) error {
	src, batched := img.src.(BatchSource)
	most := 1
	if batched {
		most = batchChunks
	}
	for {
		if err := img.giveWay(ctx); err != nil {
			return err
		}
		if img.full() {
			return nil
		}
		chunks, flights, err := img.depart(left, most)
		if len(chunks) == 0 {
			return err
		}
		chunks, flights, err = img.landFound(chunks, flights)
		switch {
		case err != nil || len(chunks) == 0:
		case len(chunks) == 1:
			err = img.land(flights[0], chunks[0], img.fetch(ctx, chunks[0], img.installer(true, nil)))
		default:
			err = img.fetchBatch(ctx, src, chunks, flights)
		}
		if err != nil {
			return err
		}
		progress(img.fetched() * PageSize)
	}
}

// depart takes up to most chunks from left that are neither there nor on their way,
// and starts their flights.
func (img *Image) depart(left *[]int64, most int) (chunks []int64, flights []*flight, err error) {
	img.mu.Lock()
	defer img.mu.Unlock()
	if img.refs == 0 {
		return nil, nil, fmt.Errorf("memory: image: %w", ErrClosed)
	}
	for len(*left) > 0 && len(chunks) < most {
		chunk := (*left)[0]
		*left = (*left)[1:]
		if !img.done.get(uint64(chunk)) && img.flights[chunk] == nil {
			chunks = append(chunks, chunk)
			flights = append(flights, img.start(chunk, &flight{ahead: true}))
		}
	}
	for _, f := range flights {
		f.batch = len(flights) > 1
	}
	return chunks, flights, nil
}

// landFound ends the flights of what is there already, and returns the others.
func (img *Image) landFound(chunks []int64, flights []*flight) (left []int64, going []*flight, err error) {
	for i, f := range flights {
		if f.found = img.find(chunks[i]); f.found {
			err = errors.Join(err, img.land(f, chunks[i], nil))
			continue
		}
		left, going = append(left, chunks[i]), append(going, f)
	}
	return left, going, err
}

// fetchBatch flies several at once. If that fails, one by one: so the others come
// through, what may pass is tried again, and the error says which chunk it was.
func (img *Image) fetchBatch(ctx context.Context, src BatchSource, chunks []int64, flights []*flight) error {
	install := img.installer(true, nil)
	batch := sound(func() error { return src.FetchBatch(ctx, chunks, install) })
	var first error
	for i, f := range flights {
		if err := img.land(f, chunks[i], batch); batch == nil && err != nil {
			first = err // of the release of the image
		}
	}
	if batch == nil {
		return first
	}
	for _, chunk := range chunks {
		if err := img.get(ctx, chunk, true, nil); err != nil && first == nil {
			first = err
		}
	}
	return first
}

// giveWay waits until nobody waits for a page: until now, or until there was such a
// moment since it was called, so that machines that never rest can't hold it up for
// ever.
func (img *Image) giveWay(ctx context.Context) error {
	defer context.AfterFunc(ctx, func() {
		img.mu.Lock()
		defer img.mu.Unlock()
		img.lull.Broadcast()
	})()
	img.mu.Lock()
	defer img.mu.Unlock()
	for seen := img.lulls; img.demands > 0 && img.lulls == seen && ctx.Err() == nil; {
		img.lull.Wait()
	}
	return ctx.Err()
}

// Populate fetches all chunks, on all processors, and gives way as Prefetch does. At
// the limit of the image it stops, without an error.
// Pages that the source knows to be zero take no memory and are not touched.
func (img *Image) Populate(ctx context.Context) error {
	return img.populate(ctx, func(uint64) {})
}

// populate tells progress how many bytes have come into the image, from several
// goroutines.
func (img *Image) populate(ctx context.Context, progress func(bytes uint64)) error {
	chunks := make([]int64, max(img.src.Chunks(), 0))
	for i := range chunks {
		chunks[i] = int64(i)
	}
	left := chunks
	g, gctx := errgroup.WithContext(ctx)
	for range runtime.GOMAXPROCS(0) {
		g.Go(func() error { return img.prefetch(gctx, &left, progress) })
	}
	if err := g.Wait(); err != nil {
		return err
	}
	for _, chunk := range chunks { // those that others were fetching
		if img.full() {
			return nil
		}
		if err := img.get(ctx, chunk, true, nil); err != nil {
			return err
		}
	}
	return nil
}

// fetched is how many pages have come into the image.
func (img *Image) fetched() uint64 { return img.demandPages.Load() + img.aheadPages.Load() }
