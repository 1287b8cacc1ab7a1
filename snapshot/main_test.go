package snapshot

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	"filippo.io/age"
	"go.uber.org/goleak"

	"github.com/cryovisor/cryovisor/internal/testplugin"
)

func TestMain(m *testing.M) {
	testplugin.Main()
	goleak.VerifyTestMain(m)
}

// guest is a plain model of guest memory: the pages that are not zero.
type guest struct {
	size  uint64
	pages map[uint64][]byte // by page number
}

func newGuest(size uint64) *guest { return &guest{size: size, pages: map[uint64][]byte{}} }

// layout returns where RAM of that size lies: below 3 GiB, and from 4 GiB up.
func (g *guest) layout() []Range {
	const hole, resume = 3 << 30, 4 << 30
	if g.size <= hole {
		return []Range{{0, g.size}}
	}
	return []Range{{0, hole}, {resume, g.size - hole}}
}

// set makes a page's contents; a page of zeros is removed.
func (g *guest) set(page uint64, b []byte) {
	if allZero(b) {
		delete(g.pages, page)
		return
	}
	g.pages[page] = b
}

func (g *guest) clone() *guest {
	c := newGuest(g.size)
	for p, b := range g.pages {
		c.pages[p] = b
	}
	return c
}

var zeros [MaxChunkSize]byte

func (g *guest) view(gpa uint64, n int) ([]byte, error) {
	var out []byte
	for at := range n / PageSize {
		if b, ok := g.pages[gpa/PageSize+uint64(at)]; ok {
			if out == nil {
				out = make([]byte, n)
			}
			copy(out[at*PageSize:], b)
		}
	}
	if out == nil {
		return zeros[:n], nil
	}
	return out, nil
}

// page returns a page of one of several kinds: zero, random, repetitive, text.
func page(rnd *rand.Rand) []byte {
	b := make([]byte, PageSize)
	switch rnd.IntN(5) {
	case 0:
	case 1:
		fillRandom(rnd, b)
	case 2:
		copy(b, bytes.Repeat([]byte{byte(rnd.Uint32()), 1, 2, 3}, PageSize/4))
	case 3:
		b[rnd.IntN(PageSize)] = 1 // all but zero
	default:
		for i := range b {
			b[i] = "the quick brown fox "[i%20] ^ byte(rnd.IntN(2))
		}
	}
	return b
}

func fillRandom(rnd *rand.Rand, b []byte) {
	for i := range b {
		b[i] = byte(rnd.Uint32())
	}
}

func testRand(t testing.TB) *rand.Rand {
	seed := rand.Uint64()
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("seed %d", seed)
		}
	})
	return rand.New(rand.NewPCG(seed, 0))
}

// bench is a store, a key, and the directory.
type lab struct {
	*Store
	key *age.X25519Identity
	t   testing.TB
}

func newLab(t testing.TB) *lab {
	t.Helper()
	s, err := OpenStore(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	return &lab{s, newKey(t), t}
}

func newKey(t testing.TB) *age.X25519Identity {
	t.Helper()
	key, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func (l *lab) options() Options { return Options{Recipients: []age.Recipient{l.key.Recipient()}} }

// write stores ranges of g, with the sections that each test snapshot has.
func (l *lab) write(g *guest, ranges []Range, opts Options) (Info, error) {
	ctx := context.Background()
	w, err := l.Create(ctx, opts)
	if err != nil {
		return Info{}, err
	}
	defer w.Abort()
	for _, s := range testSections {
		if err := w.AddSection(s); err != nil {
			return Info{}, err
		}
	}
	if err := w.WriteMemory(ctx, g.size, ranges, g.view); err != nil {
		return Info{}, err
	}
	return w.Commit(ctx)
}

var testSections = []Section{
	{Name: "vcpu/0", Version: 3, Critical: true, Data: []byte("registers")},
	{Name: "config", Version: 1, Data: []byte("{}")},
	{Name: "empty", Version: 1},
}

func (l *lab) mustWrite(g *guest, ranges []Range, opts Options) Info {
	l.t.Helper()
	info, err := l.write(g, ranges, opts)
	if err != nil {
		l.t.Fatal(err)
	}
	return info
}

func (l *lab) open(id ID) *Reader {
	l.t.Helper()
	r, err := l.Open(context.Background(), id, l.key)
	if err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() { r.Close() })
	return r
}

// check compares everything that r says of memory with the model.
func (l *lab) check(r *Reader, g *guest) {
	l.t.Helper()
	seen := make(map[uint64]bool, len(g.pages))
	for c := range r.Chunks() {
		last := uint64(0)
		err := r.Fetch(context.Background(), c, func(gpa uint64, b []byte) error {
			if gpa < last {
				l.t.Errorf("chunk %d: installs out of order", c)
			}
			last = gpa
			for ; len(b) > 0; gpa, b = gpa+PageSize, b[PageSize:] {
				p := gpa / PageSize
				if seen[p] {
					l.t.Errorf("page %#x installed twice", p)
				}
				seen[p] = true
				if !bytes.Equal(b[:PageSize], g.pages[p]) {
					l.t.Fatalf("page %#x differs", p)
				}
				if start, n, in := r.Lookup(gpa + 7); in != c || start > gpa || start+n <= gpa {
					l.t.Fatalf("page %#x is in chunk %d, Lookup says %#x+%#x in %d", p, c, start, n, in)
				}
			}
			return nil
		})
		if err != nil {
			l.t.Fatal(err)
		}
	}
	if len(seen) != len(g.pages) {
		l.t.Fatalf("%d pages installed of %d", len(seen), len(g.pages))
	}
	l.checkBatch(r, g)
	l.checkLookup(r, g)
}

// checkBatch compares what one batch of everything installs.
func (l *lab) checkBatch(r *Reader, g *guest) {
	l.t.Helper()
	all := r.all()
	slices.Reverse(all)
	pages := 0
	err := r.FetchBatch(context.Background(), all, func(gpa uint64, b []byte) error {
		for ; len(b) > 0; gpa, b = gpa+PageSize, b[PageSize:] {
			pages++
			if !bytes.Equal(b[:PageSize], g.pages[gpa/PageSize]) {
				l.t.Fatalf("page %#x of a batch differs", gpa/PageSize)
			}
		}
		return nil
	})
	if err != nil || pages != len(g.pages) {
		l.t.Fatalf("%d pages installed of %d: %v", pages, len(g.pages), err)
	}
}

// checkLookup walks the whole address space by Lookup.
func (l *lab) checkLookup(r *Reader, g *guest) {
	l.t.Helper()
	mapped := uint64(0)
	for at := uint64(0); at < DiskStride; {
		start, n, c := r.Lookup(at)
		if start != at || n == 0 || n%PageSize != 0 {
			l.t.Fatalf("Lookup(%#x) = %#x+%#x", at, start, n)
		}
		if c >= 0 {
			mapped += n / PageSize
		}
		at += n
	}
	if mapped != uint64(len(g.pages)) || mapped != r.Header().PagesMapped {
		l.t.Fatalf("%d pages mapped, the header says %d, the guest has %d", mapped, r.Header().PagesMapped, len(g.pages))
	}
}

// files returns the names of all files in the store, without the lock.
func (l *lab) files() []string {
	l.t.Helper()
	var names []string
	err := filepath.WalkDir(l.Dir(), func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() && d.Name() != lockName {
			names = append(names, path)
		}
		return err
	})
	if err != nil {
		l.t.Fatal(err)
	}
	slices.Sort(names)
	return names
}

func mustBe(t testing.TB, err error, classes ...error) {
	t.Helper()
	for _, c := range classes {
		if !errors.Is(err, c) {
			t.Fatalf("error is %v, want %v", err, c)
		}
	}
}

func readFile(t testing.TB, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func writeFile(t testing.TB, path string, b []byte) {
	t.Helper()
	if err := os.WriteFile(path, b, fileMode); err != nil {
		t.Fatal(err)
	}
}

// barrier makes the first callers wait for each other, so that several workers
// are sure to have taken work.
type barrier struct {
	wait sync.WaitGroup
	mu   sync.Mutex
	met  int
}

// once waits at the first two calls.
func (b *barrier) once() {
	b.mu.Lock()
	b.met++
	first := b.met <= 2
	b.mu.Unlock()
	if first {
		b.wait.Done()
		b.wait.Wait()
	}
}

func nop(uint64, []byte) error { return nil }
