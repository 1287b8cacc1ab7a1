package snapshot

import (
	"bytes"
	"context"
	"errors"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"testing"
)

// pagesOf is what the snapshot says, chunk by chunk, that chunks hold.
func (l *lab) pagesOf(r *Reader, chunks []int64) map[uint64][]byte {
	l.t.Helper()
	pages := map[uint64][]byte{}
	for _, c := range chunks {
		if err := r.Fetch(context.Background(), c, collect(pages)); err != nil {
			l.t.Fatal(err)
		}
	}
	return pages
}

// collect returns a function that keeps what it installs.
func collect(pages map[uint64][]byte) func(uint64, []byte) error {
	return func(gpa uint64, b []byte) error {
		for ; len(b) > 0; gpa, b = gpa+PageSize, b[PageSize:] {
			pages[gpa] = bytes.Clone(b[:PageSize])
		}
		return nil
	}
}

// family makes three generations of a guest, so that the last has many packs, with chunks that nobody needs any more
// between those that are needed, and a disk among them.
func family(t testing.TB) (*lab, *guest, *Reader) {
	l, g, rnd := newLab(t), newGuest(8<<20), testRand(t)
	opts := l.options()
	opts.ChunkSize = 64 << 10
	disk := newTestDisk(0, true, 100*PageSize)
	for range 3 {
		dirty := g.layout()
		if opts.Parent != nil {
			dirty = randomRanges(rnd, g.size)
		}
		for _, d := range dirty {
			for p := d.GPA / PageSize; p < (d.GPA+d.Len)/PageSize; p++ {
				g.set(p, page(rnd))
			}
		}
		w, err := l.Create(t.Context(), opts)
		if err != nil {
			t.Fatal(err)
		}
		defer w.Abort()
		if err := errors.Join(w.WriteMemory(t.Context(), g.size, dirty, g.view), w.WriteDisk(t.Context(), disk.change(rnd))); err != nil {
			t.Fatal(err)
		}
		info, err := w.Commit(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		opts.Parent = l.open(info.ID)
	}
	return l, g, opts.Parent
}

// TestFetchBatch: a batch installs what its chunks hold, each once and whatever their order.
func TestFetchBatch(t *testing.T) {
	l, _, r := family(t)
	rnd := testRand(t)
	for range 50 {
		var chunks []int64
		for range rnd.IntN(60) {
			first := rnd.Int64N(r.Chunks())
			for c := first; c < min(first+rnd.Int64N(8), r.Chunks()); c++ {
				chunks = append(chunks, c)
			}
		}
		rnd.Shuffle(len(chunks), func(i, j int) { chunks[i], chunks[j] = chunks[j], chunks[i] })
		given := slices.Clone(chunks)
		got := map[uint64][]byte{}
		total := 0
		err := r.FetchBatch(t.Context(), chunks, func(gpa uint64, b []byte) error {
			total += len(b) / PageSize
			return collect(got)(gpa, b)
		})
		if err != nil {
			t.Fatal(err)
		}
		if want := l.pagesOf(r, chunks); !maps.EqualFunc(got, want, bytes.Equal) || total != len(want) {
			t.Fatalf("%d pages of %v, %d different ones; want %d", total, chunks, len(got), len(want))
		}
		if !slices.Equal(chunks, given) {
			t.Fatal("the caller's slice was changed")
		}
	}
}

// TestFetchBatches: several at a time restore everything.
func TestFetchBatches(t *testing.T) {
	_, g, r := family(t)
	var mu sync.Mutex
	got := map[uint64][]byte{}
	keep := collect(got)
	var wg sync.WaitGroup
	for part := range 4 {
		wg.Go(func() {
			var chunks []int64
			for c := int64(part); c < r.Chunks(); c += 4 {
				chunks = append(chunks, c)
			}
			err := r.FetchBatch(t.Context(), chunks, func(gpa uint64, b []byte) error {
				mu.Lock()
				defer mu.Unlock()
				return keep(gpa, b)
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if len(got) != len(g.pages) {
		t.Fatalf("%d pages of %d", len(got), len(g.pages))
	}
	for gpa, b := range got {
		if !bytes.Equal(b, g.pages[gpa/PageSize]) {
			t.Fatalf("page at %#x differs", gpa)
		}
	}
}

// all are the numbers of all chunks.
func (r *Reader) all() []int64 {
	chunks := make([]int64, r.Chunks())
	for i := range chunks {
		chunks[i] = int64(i)
	}
	return chunks
}

// shuffled are the numbers of all chunks, in random order.
func (r *Reader) shuffled(rnd *rand.Rand) []int64 {
	chunks := r.all()
	rnd.Shuffle(len(chunks), func(i, j int) { chunks[i], chunks[j] = chunks[j], chunks[i] })
	return chunks
}

// TestFetchBatchOfDisks: what holds no memory is not even read.
func TestFetchBatchOfDisks(t *testing.T) {
	_, _, r := family(t)
	var disks []int64
	for c := range r.Chunks() {
		if !r.holdsMemory(c) {
			disks = append(disks, c)
		}
	}
	for _, p := range r.packs {
		if err := os.Remove(p.path); err != nil {
			t.Fatal(err)
		}
	}
	if err := r.FetchBatch(t.Context(), disks, nop); err != nil || len(disks) == 0 {
		t.Errorf("%d chunks: %v", len(disks), err)
	}
}

func TestFetchBatchErrors(t *testing.T) {
	_, _, r := family(t)
	all := r.shuffled(testRand(t))
	calls := 0
	count := func(uint64, []byte) error { calls++; return nil }
	for _, c := range []int64{-1, r.Chunks()} {
		mustBe(t, r.FetchBatch(t.Context(), append(slices.Clone(all), c), count), ErrInvalid)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	mustBe(t, r.FetchBatch(ctx, all, count), context.Canceled)
	if calls != 0 {
		t.Errorf("%d runs were installed", calls)
	}
	if err := r.FetchBatch(t.Context(), nil, count); err != nil {
		t.Error(err)
	}
	full := errors.New("full")
	mustBe(t, r.FetchBatch(t.Context(), all, func(uint64, []byte) error {
		if calls++; calls == 10 {
			return full
		}
		return nil
	}), full)
	if calls != 10 {
		t.Errorf("%d runs were installed, the tenth failed", calls)
	}
	ctx, cancel = context.WithCancel(t.Context())
	defer cancel()
	seen := map[int64]bool{}
	mustBe(t, r.FetchBatch(ctx, all, func(gpa uint64, _ []byte) error {
		_, _, c := r.Lookup(gpa)
		seen[c] = true
		cancel()
		return nil
	}), context.Canceled)
	if len(seen) != 1 {
		t.Errorf("%d chunks were installed, ctx ended in the first", len(seen))
	}
	r.Close()
	mustBe(t, r.FetchBatch(t.Context(), all, count), ErrClosed)
}

// TestFetchBatchDamaged: what is damaged is not installed, and the error names the pack.
func TestFetchBatchDamaged(t *testing.T) {
	l, g, r := family(t)
	all := r.shuffled(testRand(t))
	for i, p := range r.memoryPacks() {
		good := readFile(t, p.path)
		for name, bad := range map[string][]byte{"bit": flipped(good), "cut": good[:len(good)/2], "missing": nil} {
			r.reopen()
			writeFile(t, p.path, bad)
			if bad == nil {
				os.Remove(p.path)
			}
			got := map[uint64][]byte{}
			err := r.FetchBatch(t.Context(), all, collect(got))
			mustBe(t, err, ErrCorrupt)
			var fe *FileError
			if !errors.As(err, &fe) || fe.Path != p.path {
				t.Fatalf("pack %d, %s: %v does not name the pack", i, name, err)
			}
			for gpa, b := range got {
				if !bytes.Equal(b, g.pages[gpa/PageSize]) {
					t.Fatalf("pack %d, %s: false page at %#x", i, name, gpa)
				}
			}
		}
		writeFile(t, p.path, good)
	}
	l.check(r.reopen(), g)
}

// memoryPacks are the packs that a Fetch of everything needs.
func (r *Reader) memoryPacks() []*packReader {
	var packs []*packReader
	for c := range r.Chunks() {
		p := r.packs[r.body.chunks.at(int(c)).pack]
		if n := len(packs); r.holdsMemory(c) && (n == 0 || packs[n-1] != p) {
			packs = append(packs, p)
		}
	}
	return packs
}

// flipped is b with a bit changed in each segment of age.
func flipped(b []byte) []byte {
	b = bytes.Clone(b)
	for i := len(b) - 1; i > 0; i -= 64 << 10 {
		b[i] ^= 1
	}
	return b
}
