//go:build unix

package snapshot

import (
	"bytes"
	"context"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"filippo.io/age"
)

// corpus returns n bytes that look like the memory of a machine at work: a
// quarter zero pages, the rest from the Go installation's binaries and sources
// and from heap-like structures of pointers and small integers.
func corpus(tb testing.TB, n int) []byte {
	tb.Helper()
	rnd := rand.New(rand.NewPCG(1, 2))
	root, err := exec.Command("go", "env", "GOROOT").Output()
	if err != nil {
		tb.Skipf("no Go installation to take realistic memory from: %v", err)
	}
	var files []byte
	_ = filepath.WalkDir(strings.TrimSpace(string(root)), func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() && len(files) < n/2 {
			b, _ := os.ReadFile(path)
			files = append(files, b...)
		}
		return nil
	})
	if len(files) < 16<<20 {
		tb.Skip("no Go installation to take realistic memory from")
	}
	mem := make([]byte, 0, n)
	for len(mem) < n {
		run := (1 + rnd.IntN(64)) * PageSize
		switch rnd.IntN(8) {
		case 0, 1:
			mem = append(mem, make([]byte, run)...)
		case 2, 3:
			mem = append(mem, heap(rnd, run)...)
		default:
			at := rnd.IntN(len(files) - run)
			mem = append(mem, files[at:at+run]...)
		}
	}
	return mem[:n]
}

// heap returns n bytes of pointers into one arena, lengths and padding.
func heap(rnd *rand.Rand, n int) []byte {
	var b bytes.Buffer
	for b.Len() < n {
		p := 0xc000000000 + rnd.Uint64N(1<<26)&^15
		for _, v := range []uint64{p, uint64(rnd.IntN(64)), 64, 0} {
			for s := 0; s < 64; s += 8 {
				b.WriteByte(byte(v >> s))
			}
		}
	}
	return b.Bytes()[:n]
}

// cpuSeconds returns what the process has used of the processors, which is what
// to compare on a machine that is shared.
func cpuSeconds() float64 {
	var u syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &u) // can't fail with these arguments
	return float64(u.Utime.Nano()+u.Stime.Nano()) / 1e9
}

// benchDir returns a directory on tmpfs if the system has one.
func benchDir(b *testing.B) string {
	dir, err := os.MkdirTemp("/dev/shm", "snapshot")
	if err != nil {
		return b.TempDir()
	}
	b.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func viewOf(mem []byte) View {
	return func(gpa uint64, n int) ([]byte, error) { return mem[gpa:][:n:n], nil }
}

func BenchmarkWrite(b *testing.B) {
	mem := corpus(b, 256<<20)
	key, _ := age.GenerateX25519Identity()
	for _, kib := range []int{64, 128, 256, 512} {
		for _, workers := range []int{1, 2} {
			b.Run(fmt.Sprintf("chunk=%dKiB/workers=%d", kib, workers), func(b *testing.B) {
				s, err := OpenStore(benchDir(b))
				if err != nil {
					b.Fatal(err)
				}
				b.SetBytes(int64(len(mem)))
				b.ReportAllocs()
				var info Info
				cpu := 0.0
				for b.Loop() {
					began := cpuSeconds()
					info = writeFull(b, s, key, mem, Options{ChunkSize: kib << 10, Workers: workers})
					cpu += cpuSeconds() - began
					b.StopTimer()
					if err := s.Delete(b.Context(), info.ID); err != nil {
						b.Fatal(err)
					}
					b.StartTimer()
				}
				gib := float64(len(mem)) / (1 << 30)
				b.ReportMetric(b.Elapsed().Seconds()/float64(b.N)/gib, "s/GiB")
				b.ReportMetric(cpu/float64(b.N)/gib, "cpu-s/GiB")
				b.ReportMetric(float64(len(mem))/float64(info.StoredBytes), "ratio")
			})
		}
	}
}

func writeFull(tb testing.TB, s *Store, key *age.X25519Identity, mem []byte, opts Options) Info {
	tb.Helper()
	ctx := context.Background()
	opts.Recipients = []age.Recipient{key.Recipient()}
	w, err := s.Create(ctx, opts)
	if err != nil {
		tb.Fatal(err)
	}
	defer w.Abort()
	size := uint64(len(mem))
	if err := w.WriteMemory(ctx, size, []Range{{0, size}}, viewOf(mem)); err != nil {
		tb.Fatal(err)
	}
	info, err := w.Commit(ctx)
	if err != nil {
		tb.Fatal(err)
	}
	return info
}

// BenchmarkDiff writes 64 MiB that were dirtied in runs of 16 pages all over 1 GiB.
func BenchmarkDiff(b *testing.B) {
	mem := corpus(b, 64<<20)
	const size = 1 << 30
	view := func(gpa uint64, n int) ([]byte, error) { return mem[gpa%uint64(len(mem)):][:n:n], nil }
	s, err := OpenStore(benchDir(b))
	if err != nil {
		b.Fatal(err)
	}
	key, _ := age.GenerateX25519Identity()
	opts := Options{Recipients: []age.Recipient{key.Recipient()}}
	pause := func(ranges []Range) ID {
		w, err := s.Create(b.Context(), opts)
		if err != nil {
			b.Fatal(err)
		}
		defer w.Abort()
		if err := w.WriteMemory(b.Context(), size, ranges, view); err != nil {
			b.Fatal(err)
		}
		info, err := w.Commit(b.Context())
		if err != nil {
			b.Fatal(err)
		}
		return info.ID
	}
	if opts.Parent, err = s.Open(b.Context(), pause([]Range{{0, size}}), key); err != nil {
		b.Fatal(err)
	}
	defer opts.Parent.Close()
	var dirty []Range
	for gpa := uint64(0); gpa < size; gpa += 1 << 20 {
		dirty = append(dirty, Range{gpa, 16 * PageSize})
	}
	cpu := cpuSeconds()
	for b.Loop() {
		id := pause(dirty)
		b.StopTimer()
		if err := s.Delete(b.Context(), id); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
	b.ReportMetric((cpuSeconds()-cpu)/float64(b.N)*1e3, "cpu-ms")
}

// BenchmarkFetch takes chunks in random order, as faults do.
func BenchmarkFetch(b *testing.B) {
	mem := corpus(b, 256<<20)
	key, _ := age.GenerateX25519Identity()
	for _, kib := range []int{64, 128, 256} {
		s, err := OpenStore(benchDir(b))
		if err != nil {
			b.Fatal(err)
		}
		info := writeFull(b, s, key, mem, Options{ChunkSize: kib << 10})
		b.Run(fmt.Sprintf("chunk=%dKiB", kib), func(b *testing.B) {
			r, err := s.Open(b.Context(), info.ID, key)
			if err != nil {
				b.Fatal(err)
			}
			defer r.Close()
			rnd := rand.New(rand.NewPCG(3, 4))
			took := make([]time.Duration, 0, 1<<16)
			b.ReportAllocs()
			cpu := cpuSeconds()
			for b.Loop() {
				began := time.Now()
				if err := r.Fetch(b.Context(), rnd.Int64N(r.Chunks()), nop); err != nil {
					b.Fatal(err)
				}
				took = append(took, time.Since(began))
			}
			b.ReportMetric((cpuSeconds()-cpu)/float64(b.N)*1e6, "cpu-us")
			slices.Sort(took)
			b.ReportMetric(float64(took[len(took)/2].Nanoseconds())/1e3, "p50-us")
			b.ReportMetric(float64(took[len(took)*99/100].Nanoseconds())/1e3, "p99-us")
		})
	}
}

// BenchmarkFetchAll restores everything, in order, from two goroutines: chunk by chunk, or by batches.
func BenchmarkFetchAll(b *testing.B) {
	mem := corpus(b, 1<<30)
	key, _ := age.GenerateX25519Identity()
	s, err := OpenStore(benchDir(b))
	if err != nil {
		b.Fatal(err)
	}
	info := writeFull(b, s, key, mem, Options{})
	r, err := s.Open(b.Context(), info.ID, key)
	if err != nil {
		b.Fatal(err)
	}
	defer r.Close()
	for _, size := range []int64{1, 16, 64, 256} {
		b.Run(fmt.Sprintf("batch=%d", size), func(b *testing.B) {
			cpu := cpuSeconds()
			for b.Loop() {
				fetchAll(b, r, size)
			}
			gib := float64(len(mem)) / (1 << 30)
			b.ReportMetric(gib/(b.Elapsed().Seconds()/float64(b.N)), "GiB/s")
			b.ReportMetric((cpuSeconds()-cpu)/float64(b.N)/gib, "cpu-s/GiB")
		})
	}
}

// fetchAll fetches all chunks from two goroutines, so many at a time.
func fetchAll(b *testing.B, r *Reader, size int64) {
	var next atomic.Int64
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			batch := make([]int64, 0, size)
			for from := next.Add(size) - size; from < r.Chunks(); from = next.Add(size) - size {
				batch = batch[:0]
				for c := from; c < min(from+size, r.Chunks()); c++ {
					batch = append(batch, c)
				}
				var err error
				if size == 1 {
					err = r.Fetch(b.Context(), from, nop)
				} else {
					err = r.FetchBatch(b.Context(), batch, nop)
				}
				if err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
}

// BenchmarkRemote reads from a store that takes 20 ms to answer and has no other limit: opens a snapshot of 1 GiB, and
// fetches a working set of 256 MiB, runs of chunks in random order, from two goroutines.
func BenchmarkRemote(b *testing.B) {
	mem := corpus(b, 1<<30)
	l := &lab{key: newKey(b), t: b}
	var err error
	if l.Store, err = OpenStore(benchDir(b)); err != nil {
		b.Fatal(err)
	}
	id := writeFull(b, l.Store, l.key, mem, Options{}).ID
	batches := func(r *Reader, chunks []int64) error { return r.FetchBatch(b.Context(), chunks, nop) }
	for name, fetch := range map[string]func(r *Reader, chunks []int64) error{
		"open":       nil,
		"batches":    batches,
		"one by one": fetchEach,
	} {
		b.Run(name, func(b *testing.B) {
			far := l.far(20 * time.Millisecond)
			for b.Loop() {
				r, err := OpenFrom(b.Context(), far, id, OpenOptions{}, l.key)
				if err != nil {
					b.Fatal(err)
				}
				if fetch != nil {
					halves(b, r, fetch)
				}
				r.Close()
			}
			b.ReportMetric(float64(far.requests.Load())/float64(b.N), "requests")
			b.ReportMetric(float64(far.bytes.Load())/float64(b.N)/(1<<20), "MiB")
		})
	}
}

func fetchEach(r *Reader, chunks []int64) error {
	for _, c := range chunks {
		if err := r.Fetch(context.Background(), c, nop); err != nil {
			return err
		}
	}
	return nil
}

// halves has two goroutines fetch half a working set each.
func halves(b *testing.B, r *Reader, fetch func(*Reader, []int64) error) {
	const chunks = 256 << 20 / DefaultChunkSize
	rnd := rand.New(rand.NewPCG(5, 6))
	var set []int64
	for len(set) < chunks {
		first := rnd.Int64N(r.Chunks() - 32)
		for n := range 1 + rnd.Int64N(32) {
			set = append(set, first+n)
		}
	}
	var wg sync.WaitGroup
	for _, half := range [][]int64{set[:len(set)/2], set[len(set)/2:]} {
		wg.Go(func() {
			if err := fetch(r, half); err != nil {
				b.Error(err)
			}
		})
	}
	wg.Wait()
}

// bigTables returns a page map of that much memory that is not zero: full chunks, each of
// three runs of pages, with a page of zeros after each run.
func bigTables(gib int, key string) *bodyTables {
	const pages = DefaultChunkSize / PageSize
	t := &bodyTables{}
	for p := range uint32(2) {
		t.packs = append(t.packs, packRecord{ID{byte(p + 1)}, ID{9}, 1 << 50, 1 << 51, key})
	}
	n := uint32(gib << 30 / DefaultChunkSize)
	for i := range n {
		t.chunks = append(t.chunks, chunkRecord{preambleBytes + uint64(i)*50000, 2 * i / n, 50000, pages, CodecLZ4})
	}
	for i := range n {
		// Two workers take turns, so neighbours in the guest are in different packs.
		e := extent{page: uint64(i) * (pages + 3), chunk: i/2 + i%2*(n/2)}
		for _, e.count = range []uint32{10, 12, pages - 22} {
			t.extents = append(t.extents, e)
			e.page, e.first = e.page+uint64(e.count)+1, e.first+e.count
		}
	}
	return t
}

// BenchmarkOpen opens manifests of much memory: read, decrypt, check, index.
func BenchmarkOpen(b *testing.B) {
	for _, gib := range []int{1, 4, 16} {
		b.Run(fmt.Sprintf("%dGiB", gib), func(b *testing.B) {
			s, err := OpenStore(benchDir(b))
			if err != nil {
				b.Fatal(err)
			}
			key, _ := age.GenerateX25519Identity()
			id := writeTables(b, s, key, gib)
			b.ReportAllocs()
			cpu := cpuSeconds()
			defer func() { b.ReportMetric((cpuSeconds()-cpu)/float64(b.N)*1e3, "cpu-ms") }()
			for b.Loop() {
				r, err := s.Open(b.Context(), id, key)
				if err != nil {
					b.Fatal(err)
				}
				r.Close()
			}
		})
	}
}

// writeTables publishes a manifest whose packs don't exist.
func writeTables(b *testing.B, s *Store, key *age.X25519Identity, gib int) ID {
	w, err := s.Create(b.Context(), Options{Recipients: []age.Recipient{key.Recipient()}})
	if err != nil {
		b.Fatal(err)
	}
	t := bigTables(gib, key.String())
	h := &Header{Version: Version, ID: w.id, Parent: ID{1}, Created: time.Now(), RAMBytes: uint64(gib) << 30, Packs: []ID{t.packs[0].id, t.packs[1].id}}
	for _, e := range t.extents {
		h.PagesMapped += uint64(e.count)
	}
	f, err := w.stageManifest(h, t)
	if err != nil {
		b.Fatal(err)
	}
	if err := f.Publish(s.ManifestPath(w.id)); err != nil {
		b.Fatal(err)
	}
	return w.id
}

func BenchmarkParseBody(b *testing.B) {
	key, _ := age.GenerateX25519Identity()
	raw := bigTables(16, key.String()).marshal()
	b.SetBytes(int64(len(raw)))
	for b.Loop() {
		if _, err := parseBody(raw); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkLookup(b *testing.B) {
	key, _ := age.GenerateX25519Identity()
	body, err := parseBody(bigTables(16, key.String()).marshal())
	if err != nil {
		b.Fatal(err)
	}
	r, rnd := &Reader{body: body}, rand.New(rand.NewPCG(1, 2))
	for b.Loop() {
		r.Lookup(rnd.Uint64N(16 << 30))
	}
}
