package snapshot

import (
	"context"
	"fmt"
	"slices"

	"golang.org/x/sync/errgroup"
)

const (
	// batchBytes is how much of a pack a batch reads at a time. A segment of age, 64 KiB, at either end of it may have to
	// be decrypted for its neighbour too, which is little of that much.
	batchBytes = 1 << 20
	// batchGap is how much that no chunk of the batch needs is read with those around it. Less than a segment of it
	// would mostly be decrypted even so.
	batchGap = 32 << 10
)

// span is chunks of a batch that lie near each other in a pack and are read at once.
type span struct {
	pack     uint32
	from, to uint64  // in the pack's plaintext
	chunks   []int64 // ascending, which is the order in which they lie there
}

// FetchBatch is Fetch of several chunks, given in any order. Those that lie near each other are read and decrypted
// together, which is faster than one by one. install is called for one chunk after the other, in the order of their
// numbers and from the goroutine that called FetchBatch; a chunk that is given twice is fetched once.
//
// After an error some of the chunks may have been installed.
func (r *Reader) FetchBatch(ctx context.Context, chunks []int64, install func(gpa uint64, pages []byte) error) error {
	spans, err := r.plan(chunks)
	if err != nil {
		return err
	}
	if err := r.enter(ctx); err != nil {
		return err
	}
	defer r.open.RUnlock()
	ahead := readAhead{packs: r.packs, spans: spans}
	if c := r.source.cache; c != nil {
		ahead.requests = cap(c.slots)
		if err := ahead.openPacks(); err != nil {
			return err
		}
	}
	defer ahead.end()
	buf := r.batches.Get().(*fetchBuffers)
	defer r.batches.Put(buf)
	for i := range spans {
		ahead.move(i)
		if err := r.fetchSpan(ctx, &spans[i], buf, install); err != nil {
			return err
		}
	}
	return nil
}

// readAhead keeps requests for the next spans of a batch under way.
type readAhead struct {
	packs    []*packReader
	spans    []span
	requests int      // to keep under way: none if the packs are near
	held     []func() // release what the first spans have asked for
	done     int      // of held, have been called
}

// openPacks opens the packs of all spans, at the same time.
func (a *readAhead) openPacks() error {
	var g errgroup.Group
	g.SetLimit(a.requests)
	for i, s := range a.spans {
		if i > 0 && a.spans[i-1].pack == s.pack {
			continue
		}
		g.Go(func() error {
			_, err := a.packs[s.pack].open()
			return err
		})
	}
	return g.Wait()
}

// move releases what was needed before span i, and asks for what is needed from it on.
func (a *readAhead) move(i int) {
	for ; a.done < min(i, len(a.held)); a.done++ {
		a.held[a.done]()
	}
	if a.requests == 0 {
		return
	}
	for len(a.held) < min(i+a.requests, len(a.spans)) {
		s := &a.spans[len(a.held)]
		a.held = append(a.held, a.packs[s.pack].ask(s.from, s.to))
	}
}

// end releases what is left, when the requests that are still under way have been answered.
func (a *readAhead) end() {
	a.requests = 0
	a.move(len(a.spans))
}

// plan groups chunks into what is read at once.
func (r *Reader) plan(chunks []int64) ([]span, error) {
	order := make([]int64, 0, len(chunks))
	for _, c := range chunks {
		if c < 0 || c >= r.Chunks() {
			return nil, fmt.Errorf("%w: chunk %d of %d", ErrInvalid, c, r.Chunks())
		}
		if r.holdsMemory(c) {
			order = append(order, c)
		}
	}
	slices.Sort(order)
	order = slices.Compact(order)
	var spans []span
	for i, c := range order {
		rec := r.body.chunks.at(int(c))
		if n := len(spans); n > 0 && r.source.joins(&spans[n-1], rec) {
			s := &spans[n-1]
			s.to = rec.end()
			s.chunks = s.chunks[:len(s.chunks)+1] // the next of order
			continue
		}
		spans = append(spans, span{rec.pack, rec.offset, rec.end(), order[i : i+1]})
	}
	return spans, nil
}

// joins says whether a chunk, behind all that a span has, is read together with them.
func (s *source) joins(a *span, c chunkRecord) bool {
	return c.pack == a.pack && c.offset-a.to <= s.spanGap() && c.end()-a.from <= s.spanBytes()
}

// fetchSpan reads a span, and decodes and installs its chunks.
func (r *Reader) fetchSpan(ctx context.Context, s *span, buf *fetchBuffers, install func(gpa uint64, pages []byte) error) error {
	stored := buf.stored[:s.to-s.from]
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := r.packs[s.pack].readAt(stored, s.from); err != nil {
		return err
	}
	for _, chunk := range s.chunks {
		if err := ctx.Err(); err != nil {
			return err
		}
		c := r.body.chunks.at(int(chunk))
		plain, err := r.unpack(c, stored[c.offset-s.from:][:c.length], buf.plain)
		if err != nil {
			return err
		}
		if err := r.install(chunk, plain, install); err != nil {
			return err
		}
	}
	return nil
}
