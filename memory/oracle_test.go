package memory_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"sort"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/cryovisor/cryovisor/memory"
)

// An oracle is a source whose every byte is known: each page that is not zero
// holds words that are a function of its address and the seed.
type oracle struct {
	size   uint64
	seed   uint64
	runs   []run           // ascending, touching each other, over the whole span
	chunks map[int64][]run // what is in a chunk

	fetches atomic.Int64
	mu      sync.Mutex
	trouble func(ctx context.Context, chunk int64) error // called by every Fetch, if set
}

type run struct {
	gpa, length uint64
	chunk       int64
}

// newOracle covers the data ranges with runs of up to 40 pages, in chunks of
// about 24.
func newOracle(rng *rand.Rand, size uint64, data ...memory.Range) *oracle {
	return newOracleOf(rng, 40, 24, size, data...)
}

// newOracleOf covers the data ranges with runs of random length, of which about
// a quarter is zero and the others are spread over chunks at random. All else is
// zero.
func newOracleOf(rng *rand.Rand, maxRun int, perChunk, size uint64, data ...memory.Range) *oracle {
	o := &oracle{size: size, seed: rng.Uint64(), chunks: make(map[int64][]run)}
	var pages uint64
	for _, d := range data {
		pages += d.Len / page
	}
	chunks := max(1, int64(pages/perChunk))
	at := uint64(0)
	for _, d := range data {
		o.add(at, d.GPA-at, -1)
		for at = d.GPA; at < d.End(); {
			n := min(uint64(1+rng.IntN(maxRun))*page, d.End()-at)
			chunk := rng.Int64N(chunks)
			if rng.IntN(4) == 0 {
				chunk = -1
			}
			o.add(at, n, chunk)
			at += n
		}
	}
	ranges := memory.Layout(size)
	o.add(at, ranges[len(ranges)-1].End()-at, -1)
	for _, r := range o.runs {
		if r.chunk >= 0 {
			o.chunks[r.chunk] = append(o.chunks[r.chunk], r)
		}
	}
	return o
}

func (o *oracle) add(gpa, length uint64, chunk int64) {
	if n := len(o.runs); n > 0 && o.runs[n-1].chunk == chunk {
		o.runs[n-1].length += length
	} else if length > 0 {
		o.runs = append(o.runs, run{gpa, length, chunk})
	}
}

func (o *oracle) find(gpa uint64) run {
	i := sort.Search(len(o.runs), func(i int) bool { return o.runs[i].gpa+o.runs[i].length > gpa })
	return o.runs[i]
}

func (o *oracle) Lookup(gpa uint64) (start, length uint64, chunk int64) {
	r := o.find(gpa)
	return r.gpa, r.length, r.chunk
}

func (o *oracle) Chunks() int64 {
	n := int64(0)
	for c := range o.chunks {
		n = max(n, c+1)
	}
	return n
}

func (o *oracle) Fetch(ctx context.Context, chunk int64, install func(uint64, []byte) error) error {
	o.fetches.Add(1)
	o.mu.Lock()
	trouble := o.trouble
	o.mu.Unlock()
	if trouble != nil {
		if err := trouble(ctx, chunk); err != nil {
			return err
		}
	}
	for _, r := range o.chunks[chunk] {
		if err := install(r.gpa, o.bytes(r.gpa, int(r.length))); err != nil {
			return err
		}
	}
	return nil
}

func (o *oracle) setTrouble(f func(ctx context.Context, chunk int64) error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.trouble = f
}

// bytes is what the n bytes at gpa, a multiple of 8, have to be.
func (o *oracle) bytes(gpa uint64, n int) []byte {
	p := make([]byte, n)
	for off := 0; off < n; off += page {
		part := p[off:min(off+page, n)]
		if o.find(gpa+uint64(off)).chunk < 0 {
			continue
		}
		for i := 0; i < len(part); i += 8 {
			binary.LittleEndian.PutUint64(part[i:], mix(o.seed^(gpa+uint64(off+i))))
		}
	}
	return p
}

// A model is what the memory of one machine has to hold: pages that were written
// and not discarded since, and what is beneath all others.
type model struct {
	beneath func(gpa uint64, n int) []byte
	written map[uint64][]byte // by address of the page
}

func newModel(beneath func(gpa uint64, n int) []byte) *model {
	return &model{beneath, make(map[uint64][]byte)}
}

// page is what the page at gpa holds.
func (m *model) page(gpa uint64) []byte {
	if p := m.written[gpa]; p != nil {
		return p
	}
	return m.beneath(gpa, page)
}

// write is a write inside of one page.
func (m *model) write(p []byte, gpa uint64) {
	at := gpa &^ (page - 1)
	if m.written[at] == nil {
		m.written[at] = bytes.Clone(m.beneath(at, page))
	}
	copy(m.written[at][gpa-at:], p)
}

// discard is what Memory.Discard has to do.
func (m *model) discard(gpa, n uint64) {
	for at := (gpa + page - 1) / page * page; at+page <= gpa+n; at += page {
		delete(m.written, at)
	}
}

// dirty is the dirty set, as a set of pages.
func (m *model) dirty() map[uint64]bool {
	set := make(map[uint64]bool)
	for gpa := range m.written {
		set[gpa] = true
	}
	return set
}

// mix is the finalizer of splitmix64.
func mix(x uint64) uint64 {
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}

// newImage makes an image of o that is closed at the end.
func newImage(t testing.TB, o *oracle) *memory.Image {
	t.Helper()
	img, err := memory.NewImage(o.size, o)
	if errors.Is(err, errors.ErrUnsupported) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := img.Close(); err != nil {
			t.Error(err)
		}
	})
	return img
}

// mapImage makes a Memory of img that is closed at the end. It skips where there
// is no userfaultfd to be had.
func mapImage(t testing.TB, img *memory.Image, opts memory.MapOptions) *memory.Memory {
	t.Helper()
	m, err := img.Map(context.Background(), opts)
	if errors.Is(err, memory.ErrNotPermitted) || errors.Is(err, memory.ErrKernel) || errors.Is(err, memory.ErrHugeShmem) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	})
	return m
}
