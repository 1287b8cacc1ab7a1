package snapshot

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"sort"
	"sync"
	"sync/atomic"
)

// Damage is something that Verify could not read or decode.
type Damage struct {
	Pack  ID
	Path  string // of the pack
	Chunk int64  // -1: not in a chunk that this snapshot uses, or the pack as a whole
	// Ranges of guest memory that are lost by it.
	Ranges []Range
	Err    error // wraps ErrCorrupt, or is what the operating system said
}

// Report says what Verify found.
type Report struct {
	Packs  int
	Chunks int64
	Bytes  uint64   // of the packs' plaintext
	Damage []Damage // ordered by pack and by offset in it
}

// Err returns nil if there is no damage, and otherwise an error that names the
// first and wraps the errors of all.
func (r *Report) Err() error {
	if len(r.Damage) == 0 {
		return nil
	}
	errs := make([]error, len(r.Damage))
	lost := uint64(0)
	for i, d := range r.Damage {
		errs[i] = d.Err
		for _, x := range d.Ranges {
			lost += x.Len
		}
	}
	return fmt.Errorf("snapshot: %d bytes of memory and disks can't be read: %w", lost, errors.Join(errs...))
}

// Verify reads every byte of every pack that the snapshot needs, and decodes
// every chunk. (The manifest was verified when it was opened.) Damage is in the
// report; the error is for a verification that did not end: ctx, or a closed
// Reader. progress, if not nil, is told how many of the packs' bytes are done,
// from one goroutine at a time.
func (r *Reader) Verify(ctx context.Context, progress func(done, total uint64)) (*Report, error) {
	r.open.RLock()
	defer r.open.RUnlock()
	if r.closed {
		return nil, fmt.Errorf("snapshot %v: reader %w", r.header.ID, ErrClosed)
	}
	v := &verifier{r: r, ctx: ctx, found: make([][]Damage, len(r.packs))}
	v.progress = progressMeter{report: progress}
	for _, p := range r.packs {
		v.progress.total += p.rec.plainSize
	}
	var next atomic.Int64
	var wg sync.WaitGroup
	for range min(len(r.packs), runtime.GOMAXPROCS(0)) {
		wg.Go(func() {
			for i := int(next.Add(1)) - 1; i < len(r.packs) && ctx.Err() == nil; i = int(next.Add(1)) - 1 {
				v.pack(i)
			}
		})
	}
	wg.Wait()
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	rep := &Report{Packs: len(r.packs), Chunks: r.Chunks(), Bytes: v.progress.total}
	for _, d := range v.found {
		rep.Damage = append(rep.Damage, d...)
	}
	v.progress.finish()
	return rep, nil
}

// verifier is one call of Verify. Each element of found has one writer.
type verifier struct {
	r        *Reader
	ctx      context.Context
	found    [][]Damage
	progress progressMeter
}

// pack verifies pack i: chunk by chunk, and what lies between them.
func (v *verifier) pack(i int) {
	r, p := v.r, v.r.packs[i]
	t := r.body.chunks
	first := sort.Search(t.len(), func(c int) bool { return int(t.at(c).pack) >= i })
	last := sort.Search(t.len(), func(c int) bool { return int(t.at(c).pack) > i })
	if _, err := p.open(); err != nil {
		v.lost(i, -1, first, last, err)
		v.progress.add(p.rec.plainSize)
		return
	}
	buf := r.buffers.Get().(*fetchBuffers)
	defer r.buffers.Put(buf)
	at := uint64(0)
	for c := first; c < last && v.ctx.Err() == nil; c++ {
		rec := t.at(c)
		v.gap(i, at, rec.offset)
		if _, err := r.decode(c, buf); err != nil {
			v.lost(i, int64(c), c, c+1, err)
		}
		at = rec.offset + uint64(rec.length)
		v.progress.add(uint64(rec.length))
	}
	v.gap(i, at, p.rec.plainSize)
}

// gap reads what is in pack i and in no chunk of this snapshot.
func (v *verifier) gap(i int, from, to uint64) {
	buf := make([]byte, min(to-from, 1<<20))
	for from < to && v.ctx.Err() == nil {
		n := min(to-from, uint64(len(buf)))
		if err := v.r.packs[i].readAt(buf[:n], from); err != nil {
			v.lost(i, -1, 0, 0, err)
		}
		v.progress.add(n)
		from += n
	}
}

// lost notes damage that affects chunks first up to last of pack i.
func (v *verifier) lost(i int, chunk int64, first, last int, err error) {
	b, p := v.r.body, v.r.packs[i]
	d := Damage{Pack: p.rec.id, Path: p.path, Chunk: chunk, Err: err}
	for c := first; c < last; c++ {
		for e := range b.extentsOf(int64(c)) {
			d.Ranges = append(d.Ranges, Range{e.page * PageSize, uint64(e.count) * PageSize})
		}
	}
	v.found[i] = append(v.found[i], d)
}
