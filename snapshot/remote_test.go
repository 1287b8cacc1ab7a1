package snapshot

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"filippo.io/age"
)

// farBlobs are blobs that are far away: to open one and to read from one takes a trip. In a bubble of synctest, whose
// clock moves when everybody waits, the time that passes says how many requests had to wait for others.
type farBlobs struct {
	Blobs
	trip                         time.Duration
	opens, requests, bytes, busy atomic.Int64
	most                         atomic.Int64              // requests at a time
	fail                         func(request int64) error // may be nil
}

func (l *lab) far(trip time.Duration) *farBlobs {
	return &farBlobs{Blobs: dirBlobs{l.Dir(), osFiles{}}, trip: trip}
}

// request is what opening and reading have in common.
func (f *farBlobs) request() error {
	n := f.requests.Add(1)
	busy := f.busy.Add(1)
	for most := f.most.Load(); busy > most && !f.most.CompareAndSwap(most, busy); most = f.most.Load() {
	}
	time.Sleep(f.trip)
	f.busy.Add(-1)
	if f.fail != nil {
		return f.fail(n)
	}
	return nil
}

func (f *farBlobs) Open(name string) (Blob, error) {
	if err := f.request(); err != nil {
		return nil, err
	}
	f.opens.Add(1)
	b, err := f.Blobs.Open(name)
	return &farBlob{b, f}, err
}

type farBlob struct {
	Blob
	f *farBlobs
}

func (b *farBlob) ReadAt(p []byte, off int64) (int, error) {
	if err := b.f.request(); err != nil {
		return 0, err
	}
	b.f.bytes.Add(int64(len(p)))
	return b.Blob.ReadAt(p, off)
}

func (b *farBlob) Close() error {
	b.f.opens.Add(-1)
	return b.Blob.Close()
}

// cost runs f and returns how many requests it made, and in how many rounds, each of which waited for the one before.
func (f *farBlobs) cost(t *testing.T, what string, do func() error) (requests, rounds int64) {
	t.Helper()
	before, began := f.requests.Load(), time.Now()
	if err := do(); err != nil {
		t.Fatalf("%s: %v", what, err)
	}
	return f.requests.Load() - before, int64(time.Since(began) / f.trip)
}

func (l *lab) openFrom(blobs Blobs, id ID, opts OpenOptions) *Reader {
	l.t.Helper()
	r, err := OpenFrom(context.Background(), blobs, id, opts, l.key)
	if err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() { r.Close() })
	return r
}

// TestOpenFrom reads the same as from the directory, whatever the size of blocks and of the cache.
func TestOpenFrom(t *testing.T) {
	l, g, parent := family(t)
	for _, opts := range []OpenOptions{
		{}, {BlockSize: -1}, {BlockSize: 1000, CacheBytes: 1}, {BlockSize: 64 << 10, CacheBytes: 100 << 10, Requests: 1}, {BlockSize: 1 << 30},
	} {
		far := l.far(0)
		r := l.openFrom(far, parent.header.ID, opts)
		l.check(r, g)
		rep, err := r.Verify(t.Context(), nil)
		if err := errors.Join(err, rep.Err()); err != nil {
			t.Error(err)
		}
		if c := r.source.cache; c != nil && c.bytes > c.budget {
			t.Errorf("%+v: the cache has %d bytes", opts, c.bytes)
		}
		if c := r.source.cache; c != nil && far.most.Load() > int64(cap(c.slots)) {
			t.Errorf("%+v: %d requests at a time", opts, far.most.Load())
		}
		if e := r.Entry(); e.Path != manifestName(e.ID) || e.ManifestBytes != parent.Entry().ManifestBytes {
			t.Errorf("entry %+v", e)
		}
		if err := r.Close(); err != nil || far.opens.Load() != 0 {
			t.Errorf("%d blobs are open, %v", far.opens.Load(), err)
		}
	}
}

// TestOpenRounds: a manifest is read by requests at the same time.
func TestOpenRounds(t *testing.T) {
	l := newLab(t)
	for size, most := range map[int]int64{400 << 10: 2, 8 << 20: 10} { // page maps of 1 and of 20 GiB
		w, err := l.Create(t.Context(), l.options())
		if err != nil {
			t.Fatal(err)
		}
		defer w.Abort()
		if err := w.AddSection(Section{Name: "large", Data: make([]byte, size)}); err != nil {
			t.Fatal(err)
		}
		if err := w.WriteMemory(t.Context(), 0, nil, nil); err != nil {
			t.Fatal(err)
		}
		info, err := w.Commit(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		synctest.Test(t, func(t *testing.T) {
			far := l.far(time.Second)
			requests, rounds := far.cost(t, "open", func() error {
				r, err := OpenFrom(t.Context(), far, info.ID, OpenOptions{}, l.key)
				if err != nil {
					return err
				}
				return r.Close()
			})
			if requests > most || rounds > 2 {
				t.Errorf("%d bytes: %d requests in %d rounds", size, requests, rounds)
			}
		})
	}
}

// wide is a snapshot with 512 chunks of 64 KiB in one pack.
func wide(t *testing.T) (*lab, *guest, ID) {
	l, g, rnd := newLab(t), newGuest(32<<20), testRand(t)
	for p := range g.size / PageSize {
		b := make([]byte, PageSize)
		fillRandom(rnd, b[:64])
		g.set(p, b)
	}
	opts := l.options()
	opts.Workers, opts.ChunkSize, opts.Codec = 1, 64<<10, CodecStored
	return l, g, l.mustWrite(g, g.layout(), opts).ID
}

// TestFetchRounds: what one fetch costs, and what it saves the next.
func TestFetchRounds(t *testing.T) {
	l, _, id := wide(t)
	synctest.Test(t, func(t *testing.T) {
		far := l.far(time.Second)
		r := l.openFrom(far, id, OpenOptions{CacheBytes: 64 << 20})
		defer r.Close()
		far.bytes.Store(0)
		fetch := func(chunk int64) func() error {
			return func() error { return r.Fetch(t.Context(), chunk, nop) }
		}
		for _, step := range []struct {
			what             string
			do               func() error
			requests, rounds int64
		}{
			{"the first: open, the pack's ends, the chunk", fetch(200), 4, 3},
			{"its neighbour", fetch(201), 0, 0},
			{"far from it", fetch(400), 2, 1},
			{"the last, which lies in two blocks", fetch(511), 2, 1},
			{"the first again", fetch(200), 0, 0},
			{"at the same time", func() error { return together(8, fetch(300)) }, 2, 1},
		} {
			requests, rounds := far.cost(t, step.what, step.do)
			if requests > step.requests || rounds > step.rounds {
				t.Errorf("%s: %d requests in %d rounds", step.what, requests, rounds)
			}
		}
		for c := range r.Chunks() {
			if err := r.Fetch(t.Context(), c, nop); err != nil {
				t.Fatal(err)
			}
		}
		if size := int64(r.packs[0].rec.fileSize); far.bytes.Load() != size {
			t.Errorf("%d bytes of %d were read", far.bytes.Load(), size)
		}
	})
}

// TestFetchManyBlocks: all blocks that a chunk lies in are asked for at the same time.
func TestFetchManyBlocks(t *testing.T) {
	l, _, id := wide(t)
	synctest.Test(t, func(t *testing.T) {
		far := l.far(time.Second)
		r := l.openFrom(far, id, OpenOptions{BlockSize: 10_000})
		defer r.Close()
		if err := r.Fetch(t.Context(), 0, nop); err != nil {
			t.Fatal(err)
		}
		requests, rounds := far.cost(t, "fetch", func() error { return r.Fetch(t.Context(), 100, nop) })
		if requests > 15 || rounds > 1 {
			t.Errorf("%d requests in %d rounds", requests, rounds)
		}
	})
}

// together calls f n times at once.
func together(n int, f func() error) error {
	errs := make([]error, n)
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() { errs[i] = f() })
	}
	wg.Wait()
	return errors.Join(errs...)
}

// TestBatchRounds: a batch asks for all that it needs at the same time, and for little more.
func TestBatchRounds(t *testing.T) {
	l, _, id := wide(t)
	const stored = 64 << 10
	size := int64(l.open(id).packs[0].rec.fileSize)
	every := func(n int64) (chunks []int64) {
		for c := int64(0); c < 512; c += n {
			chunks = append(chunks, c)
		}
		return chunks
	}
	for _, step := range []struct {
		what                    string
		opts                    OpenOptions
		chunks                  []int64
		requests, rounds, bytes int64
	}{
		// Each with the opening of the pack: 3 requests, 2 rounds, 192 KiB.
		{"everything, once", OpenOptions{}, every(1), 37 + 3, 3 + 2, size},
		{"a third, scattered", OpenOptions{BlockSize: 256 << 10}, every(3), 171 + 3, 11 + 2, 171*2*stored + 4*stored},
		{"32 at a time", OpenOptions{BlockSize: 256 << 10, Requests: 32}, every(3), 171 + 3, 6 + 2, 171*2*stored + 4*stored},
		{"with gaps that are worth reading", OpenOptions{}, every(3), 37 + 3, 3 + 2, size},
	} {
		synctest.Test(t, func(t *testing.T) {
			far := l.far(time.Second)
			r := l.openFrom(far, id, step.opts)
			defer r.Close()
			far.bytes.Store(0)
			requests, rounds := far.cost(t, step.what, func() error { return r.FetchBatch(t.Context(), step.chunks, nop) })
			if requests > step.requests || rounds > step.rounds || far.bytes.Load() > step.bytes {
				t.Errorf("%s: %d requests in %d rounds, %d bytes", step.what, requests, rounds, far.bytes.Load())
			}
		})
	}
}

// TestBatchesTogether: batches at the same time share the number of requests, and what several of them need.
func TestBatchesTogether(t *testing.T) {
	l, _, id := wide(t)
	synctest.Test(t, func(t *testing.T) {
		far := l.far(time.Second)
		r := l.openFrom(far, id, OpenOptions{CacheBytes: 64 << 20})
		defer r.Close()
		if err := r.Fetch(t.Context(), 0, nop); err != nil { // opens the pack
			t.Fatal(err)
		}
		var next atomic.Int64
		_, rounds := far.cost(t, "batches", func() error {
			return together(8, func() error { // each quarter twice
				i := next.Add(1) % 4 * 128
				return r.FetchBatch(t.Context(), r.all()[i:i+128], nop)
			})
		})
		if most, bytes := far.most.Load(), far.bytes.Load(); most != defaultRequests || rounds > 3 || bytes > 34<<20 {
			t.Errorf("%d requests at a time, %d rounds, %d bytes", most, rounds, bytes)
		}
	})
}

// TestBatchDecryptsOnce: in a batch of everything hardly a segment is read twice; one by one, most are.
func TestBatchDecryptsOnce(t *testing.T) {
	l, g, rnd := newLab(t), newGuest(32<<20), testRand(t)
	for p := range g.size / PageSize {
		b := make([]byte, PageSize)
		fillRandom(rnd, b[:PageSize/3])
		g.set(p, b)
	}
	opts := l.options()
	opts.Workers = 1
	far := l.far(0)
	r := l.openFrom(far, l.mustWrite(g, g.layout(), opts).ID, OpenOptions{BlockSize: -1})
	if err := r.Fetch(t.Context(), 0, nop); err != nil { // opens the pack
		t.Fatal(err)
	}
	far.bytes.Store(0)
	if err := r.FetchBatch(t.Context(), r.all(), nop); err != nil {
		t.Fatal(err)
	}
	if size := int64(r.packs[0].rec.fileSize); far.bytes.Load() > size+size/10 {
		t.Errorf("read %d bytes of a pack of %d", far.bytes.Load(), size)
	}
}

// TestFailingStorage fails each request in turn. That is never taken for damage, and the next try succeeds.
func TestFailingStorage(t *testing.T) {
	l, g, parent := family(t)
	causes := []error{errors.New("503 Slow Down"), io.ErrUnexpectedEOF, fmt.Errorf("Get: %w", io.EOF)}
	for _, opts := range []OpenOptions{{}, {BlockSize: -1}, {BlockSize: 64 << 10, Requests: 2}} {
		for n := int64(1); ; n++ {
			far, cause := l.far(0), causes[n%int64(len(causes))]
			far.fail = func(request int64) error {
				if request == n {
					return cause
				}
				return nil
			}
			failed := failOnce(l, far, parent.header.ID, opts, cause, g)
			if far.requests.Load() < n {
				break
			}
			if failed != 1 {
				t.Fatalf("%+v, request %d: %d calls failed", opts, n, failed)
			}
		}
	}
}

// failOnce opens and reads a snapshot, each a second time if the first fails, and returns how many did.
func failOnce(l *lab, far *farBlobs, id ID, opts OpenOptions, cause error, g *guest) (failed int) {
	l.t.Helper()
	again := func(do func() error) {
		err := do()
		if err == nil {
			return
		}
		failed++
		var temp interface{ Temporary() bool }
		if isTyped(err) || !errors.As(err, &temp) || !temp.Temporary() {
			l.t.Fatalf("request %d: %v", far.requests.Load(), err)
		}
		if !errors.Is(err, cause) && (!errors.Is(cause, io.EOF) || !errors.Is(err, io.ErrUnexpectedEOF)) {
			l.t.Fatalf("request %d: %v is not %v", far.requests.Load(), err, cause)
		}
		if err := do(); err != nil {
			l.t.Fatalf("after request %d: %v", far.requests.Load(), err)
		}
	}
	var r *Reader
	again(func() (err error) {
		r, err = OpenFrom(l.t.Context(), far, id, opts, l.key)
		return err
	})
	defer r.Close()
	got := map[uint64][]byte{}
	again(func() error { return r.FetchBatch(l.t.Context(), r.all(), collect(got)) })
	if len(got) != len(g.pages) {
		l.t.Fatalf("%d pages of %d", len(got), len(g.pages))
	}
	return failed
}

// TestDamageFarAway: damage is told from failures.
func TestDamageFarAway(t *testing.T) {
	l, _, parent := family(t)
	id := parent.header.ID
	var paths []string
	for _, p := range parent.memoryPacks() {
		paths = append(paths, p.path)
	}
	for _, path := range append(paths, l.ManifestPath(id)) {
		good := readFile(t, path)
		for name, bad := range map[string][]byte{"bit": flipped(good), "cut": good[:len(good)/2]} {
			writeFile(t, path, bad)
			err := tryFar(l, id)
			var temp interface{ Temporary() bool }
			if !errors.Is(err, ErrCorrupt) || !errors.As(err, &temp) || temp.Temporary() {
				t.Errorf("%s, %s: %v", path, name, err)
			}
		}
		writeFile(t, path, good)
	}
	if err := tryFar(l, id); err != nil {
		t.Error(err)
	}
	_, err := OpenFrom(t.Context(), l.far(0), NewID(), OpenOptions{}, l.key)
	mustBe(t, err, ErrNotFound, fs.ErrNotExist)
}

// tryFar opens a snapshot and fetches everything.
func tryFar(l *lab, id ID) error {
	r, err := OpenFrom(context.Background(), l.far(0), id, OpenOptions{}, l.key)
	if err != nil {
		return err
	}
	defer r.Close()
	return r.FetchBatch(context.Background(), r.all(), nop)
}

// TestTemporary: only what the storage may get over is temporary.
func TestTemporary(t *testing.T) {
	for err, want := range map[error]bool{
		errors.New("connection reset"): true,
		ErrCorrupt:                     false,
		ErrFormat:                      false,
		ErrVersion:                     false,
		ErrKey:                         false,
		ErrNotFound:                    false,
		fs.ErrPermission:               false,
		fs.ErrNotExist:                 false,
	} {
		if got := (&FileError{Op: "read", Err: fmt.Errorf("wrapped: %w", err)}).Temporary(); got != want {
			t.Errorf("%v: %v", err, got)
		}
	}
}

// TestFarParent: a diff can't refer to packs that are not in its store.
func TestFarParent(t *testing.T) {
	l, _, parent := family(t)
	opts := Options{Recipients: []age.Recipient{l.key.Recipient()}}
	opts.Parent = l.openFrom(l.far(0), parent.header.ID, OpenOptions{})
	_, err := l.Create(t.Context(), opts)
	mustBe(t, err, ErrInvalid)
}
