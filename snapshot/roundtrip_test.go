package snapshot

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"testing"

	"filippo.io/age"
)

func TestFullRoundTrip(t *testing.T) {
	for _, workers := range []int{1, 3} {
		for _, chunk := range []int{PageSize, 64 << 10, 0, MaxChunkSize} {
			for _, codec := range []Codec{0, CodecLZ4, CodecStored} {
				t.Run(fmt.Sprintf("workers=%d/chunk=%d/codec=%d", workers, chunk, codec), func(t *testing.T) {
					l, g := newLab(t), newGuest(6<<20)
					rnd := testRand(t)
					for p := range g.size / PageSize {
						g.set(p, page(rnd))
					}
					opts := l.options()
					opts.Workers, opts.ChunkSize, opts.Codec = workers, chunk, codec
					info := l.mustWrite(g, g.layout(), opts)
					r := l.open(info.ID)
					l.check(r, g)
					if want := uint64(len(g.pages)); info.PagesStored != want || info.ZeroPages != g.size/PageSize-want {
						t.Errorf("stored %d pages and %d zero, want %d stored", info.PagesStored, info.ZeroPages, want)
					}
					if int64(info.Chunks) != r.Chunks() {
						t.Errorf("%d chunks, Info says %d", r.Chunks(), info.Chunks)
					}
					if n := diskBytes(t, l.files()); n != info.StoredBytes || n != r.Entry().StoredBytes() {
						t.Errorf("%d bytes on disk, Info says %d, Entry %d", n, info.StoredBytes, r.Entry().StoredBytes())
					}
				})
			}
		}
	}
}

func diskBytes(t *testing.T, files []string) uint64 {
	n := uint64(0)
	for _, f := range files {
		fi, err := os.Stat(f)
		if err != nil {
			t.Fatal(err)
		}
		if fi.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s has mode %v", f, fi.Mode())
		}
		n += uint64(fi.Size())
	}
	return n
}

// TestDiffChain makes generations of diffs, with ranges that overlap those
// before at random and with pages that become zero. Each is checked at once, and
// again after its ancestors are deleted from the store.
func TestDiffChain(t *testing.T) {
	l, g, rnd := newLab(t), newGuest(8<<20), testRand(t)
	var parent *Reader
	var readers []*Reader
	var states []*guest
	generations := 11
	if testing.Short() {
		generations = 5
	}
	for range generations {
		dirty := randomRanges(rnd, g.size)
		if parent == nil {
			dirty = g.layout()
		}
		for _, d := range dirty {
			for p := d.GPA / PageSize; p < (d.GPA+d.Len)/PageSize; p++ {
				g.set(p, page(rnd))
			}
		}
		opts := l.options()
		opts.Parent, opts.ChunkSize = parent, (1+rnd.IntN(40))*PageSize
		r := l.open(l.mustWrite(g, dirty, opts).ID)
		l.check(r, g)
		if parent != nil && r.Header().Parent != parent.Header().ID {
			t.Fatal("wrong parent")
		}
		parent = r
		readers, states = append(readers, r), append(states, g.clone())
	}
	for i, r := range readers {
		l.check(r, states[i])
	}
	for _, r := range readers[:len(readers)-1] {
		if err := l.Delete(context.Background(), r.Header().ID); err != nil {
			t.Fatal(err)
		}
	}
	l.check(l.open(parent.Header().ID), g)
	if got, want := len(l.files()), 1+len(parent.Header().Packs); got != want {
		t.Errorf("%d files are left, %d are needed: %v", got, want, l.files())
	}
	if err := l.Delete(context.Background(), parent.Header().ID); err != nil {
		t.Fatal(err)
	}
	if left := l.files(); len(left) != 0 {
		t.Errorf("deleting everything left %v", left)
	}
}

// randomRanges returns ascending ranges of whole pages, some of them adjacent.
func randomRanges(rnd *rand.Rand, size uint64) []Range {
	var out []Range
	for p := uint64(rnd.IntN(50)); p < size/PageSize; {
		n := min(1+uint64(rnd.IntN(1<<rnd.IntN(8))), size/PageSize-p)
		out = append(out, Range{p * PageSize, n * PageSize})
		p += n + uint64(rnd.IntN(100))
	}
	return out
}

// TestSparse has 6 GiB of RAM around the 32-bit hole, and next to nothing in it.
func TestSparse(t *testing.T) {
	l, g, rnd := newLab(t), newGuest(6<<30), testRand(t)
	edges := []uint64{0, 1, 3<<30 - PageSize, 4 << 30, 4<<30 + PageSize, 7<<30 - PageSize}
	for _, gpa := range edges {
		g.set(gpa/PageSize, bytes.Repeat([]byte{1, byte(gpa >> 12)}, PageSize/2))
	}
	for range 2000 {
		p := rnd.Uint64N(6 << 30 / PageSize)
		if p >= 3<<30/PageSize {
			p += 1 << 30 / PageSize
		}
		g.set(p, page(rnd))
	}
	r := l.open(l.mustWrite(g, g.layout(), l.options()).ID)
	l.check(r, g)

	opts := l.options()
	opts.Parent = r
	g.set(4<<30/PageSize, make([]byte, PageSize))
	g.set(7<<30/PageSize-1, page(rand.New(rand.NewPCG(1, 1))))
	l.check(l.open(l.mustWrite(g, []Range{{4 << 30, PageSize}, {7<<30 - PageSize, PageSize}}, opts).ID), g)
	if start, n, c := r.Lookup(DiskStride); n != 0 || c != -1 || start != DiskStride {
		t.Errorf("Lookup beyond the address space: %#x %#x %d", start, n, c)
	}
}

func TestZeroMemoryNeedsNoPack(t *testing.T) {
	l, g := newLab(t), newGuest(1<<20)
	r := l.open(l.mustWrite(g, g.layout(), l.options()).ID)
	l.check(r, g)
	if len(l.files()) != 1 {
		t.Errorf("files: %v", l.files())
	}
	l.check(l.open(l.mustWrite(g, nil, l.options()).ID), g)
}

// TestWriteTwice overrules what an earlier WriteMemory stored, as a prepared pause does.
func TestWriteTwice(t *testing.T) {
	l, g, rnd := newLab(t), newGuest(2<<20), testRand(t)
	for p := range g.size / PageSize {
		g.set(p, page(rnd))
	}
	ctx := context.Background()
	w, err := l.Create(ctx, l.options())
	if err != nil {
		t.Fatal(err)
	}
	defer w.Abort()
	if err := w.WriteMemory(ctx, g.size, g.layout(), g.view); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		dirty := randomRanges(rnd, g.size)
		for _, d := range dirty {
			g.set(d.GPA/PageSize, page(rnd))
		}
		if err := w.WriteMemory(ctx, g.size, dirty, g.view); err != nil {
			t.Fatal(err)
		}
	}
	info, err := w.Commit(ctx)
	if err != nil {
		t.Fatal(err)
	}
	l.check(l.open(info.ID), g)
}

// TestScatteredPagesShareChunks: a diff of single pages must not make a chunk of each.
func TestScatteredPagesShareChunks(t *testing.T) {
	l, g := newLab(t), newGuest(4<<20)
	var dirty []Range
	for p := uint64(0); p < g.size/PageSize; p += 3 {
		g.set(p, bytes.Repeat([]byte{7}, PageSize))
		dirty = append(dirty, Range{p * PageSize, PageSize})
	}
	info := l.mustWrite(g, dirty, l.options())
	l.check(l.open(info.ID), g)
	if want := (len(dirty)*PageSize + DefaultChunkSize - 1) / DefaultChunkSize; info.Chunks != want {
		t.Errorf("%d chunks for %d pages, want %d", info.Chunks, len(dirty), want)
	}
}

func TestSections(t *testing.T) {
	l, g := newLab(t), newGuest(PageSize)
	r := l.open(l.mustWrite(g, nil, l.options()).ID)
	var names []string
	for _, s := range r.Sections() {
		names = append(names, s.Name)
	}
	if !slices.Equal(names, []string{"config", "empty", "vcpu/0"}) {
		t.Errorf("sections %q", names)
	}
	s, err := r.ReadSection("vcpu/0")
	if err != nil || s.Version != 3 || !s.Critical || string(s.Data) != "registers" {
		t.Errorf("section %+v, %v", s, err)
	}
	_, err = r.ReadSection("vcpu/1")
	mustBe(t, err, ErrNotFound)
	if err := r.CheckSections(func(name string, v uint32) bool { return name == "vcpu/0" && v <= 3 }); err != nil {
		t.Error(err)
	}
	mustBe(t, r.CheckSections(func(string, uint32) bool { return false }), ErrVersion)
}

func TestInvalidArguments(t *testing.T) {
	l := newLab(t)
	ctx := context.Background()
	for name, opts := range map[string]Options{
		"no recipient":    {},
		"odd chunk size":  {Recipients: l.options().Recipients, ChunkSize: 5000},
		"unknown codec":   {Recipients: l.options().Recipients, Codec: 99},
		"huge chunk size": {Recipients: l.options().Recipients, ChunkSize: 2 * MaxChunkSize},
		"foreign parent":  {Recipients: l.options().Recipients, Parent: func() *Reader { o := newLab(t); return o.open(o.mustWrite(newGuest(0), nil, o.options()).ID) }()},
	} {
		if _, err := l.Create(ctx, opts); !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	g := newGuest(16 * PageSize)
	for name, ranges := range map[string][]Range{
		"not a page":  {{1, PageSize}},
		"half a page": {{0, 100}},
		"descending":  {{PageSize, PageSize}, {0, PageSize}},
		"overlapping": {{0, 2 * PageSize}, {PageSize, PageSize}},
		"wraps":       {{DiskStride - PageSize, 1<<64 - PageSize}},
		"beyond":      {{DiskStride, PageSize}},
		"more":        {{0, 17 * PageSize}},
	} {
		_, err := l.write(g, ranges, l.options())
		if !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	w, err := l.Create(ctx, l.options())
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"", "Big", "sp ace", string(make([]byte, 65))} {
		mustBe(t, w.AddSection(Section{Name: name}), ErrInvalid)
	}
	if err := w.AddSection(Section{Name: "a"}); err != nil {
		t.Fatal(err)
	}
	mustBe(t, w.AddSection(Section{Name: "a"}), ErrInvalid)
	_, err = w.Commit(ctx) // without memory
	mustBe(t, err, ErrInvalid)
	mustBe(t, w.AddSection(Section{Name: "b"}), ErrClosed)
	if len(l.files()) != 0 {
		t.Errorf("left %v", l.files())
	}
}

// TestPackIsAnAgeFile opens packs with nothing but age and the key in the manifest.
func TestPackIsAnAgeFile(t *testing.T) {
	l, g, rnd := newLab(t), newGuest(1<<20), testRand(t)
	for p := range g.size / PageSize {
		g.set(p, page(rnd))
	}
	opts := l.options()
	opts.Codec, opts.Workers = CodecStored, 2
	r := l.open(l.mustWrite(g, g.layout(), opts).ID)
	for _, p := range r.body.packs {
		f, err := os.Open(l.PackPath(p.id))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		key, err := age.ParseX25519Identity(p.identity)
		if err != nil {
			t.Fatal(err)
		}
		plain, err := age.Decrypt(f, key)
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(plain)
		if err != nil {
			t.Fatal(err)
		}
		if uint64(len(b)) != p.plainSize || (len(b)-preambleBytes)%PageSize != 0 {
			t.Errorf("plaintext of %d bytes, the manifest says %d", len(b), p.plainSize)
		}
	}
}

// TestRecipients: any of several recipients opens the snapshot; a passphrase does, too.
func TestRecipients(t *testing.T) {
	l, g := newLab(t), newGuest(4*PageSize)
	g.set(2, bytes.Repeat([]byte{9}, PageSize))
	other := newKey(t)
	info := l.mustWrite(g, g.layout(), Options{Recipients: []age.Recipient{l.key.Recipient(), other.Recipient()}})
	for _, k := range []*age.X25519Identity{l.key, other} {
		r, err := l.Open(context.Background(), info.ID, newKey(t), k)
		if err != nil {
			t.Fatal(err)
		}
		l.check(r, g)
		r.Close()
	}
	pass, err := age.NewScryptRecipient("correct horse")
	if err != nil {
		t.Fatal(err)
	}
	pass.SetWorkFactor(10)
	info = l.mustWrite(g, g.layout(), Options{Recipients: []age.Recipient{pass}})
	id, err := age.NewScryptIdentity("correct horse")
	if err != nil {
		t.Fatal(err)
	}
	r, err := l.Open(context.Background(), info.ID, id)
	if err != nil {
		t.Fatal(err)
	}
	l.check(r, g)
	r.Close()
	wrong, err := age.NewScryptIdentity("battery staple")
	if err != nil {
		t.Fatal(err)
	}
	_, err = l.Open(context.Background(), info.ID, wrong)
	mustBe(t, err, ErrKey)
}

func TestConcurrentFetchAndClose(t *testing.T) {
	l, g, rnd := newLab(t), newGuest(4<<20), testRand(t)
	for p := range g.size / PageSize {
		g.set(p, page(rnd))
	}
	r := l.open(l.mustWrite(g, g.layout(), l.options()).ID)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for c := range r.Chunks() {
				err := r.Fetch(context.Background(), c, func(gpa uint64, b []byte) error {
					if !bytes.Equal(b[:PageSize], g.pages[gpa/PageSize]) {
						t.Errorf("page %#x differs", gpa/PageSize)
					}
					return nil
				})
				if err != nil && !errors.Is(err, ErrClosed) {
					t.Error(err)
				}
			}
		})
	}
	if err := r.Fetch(context.Background(), 0, nop); err != nil {
		t.Error(err)
	}
	r.Close()
	wg.Wait()
	mustBe(t, r.Fetch(context.Background(), 0, nop), ErrClosed)
	_, err := r.Verify(context.Background(), nil)
	mustBe(t, err, ErrClosed)
	if err := r.Close(); err != nil {
		t.Error(err)
	}
}

func TestFetchStopsAtInstallError(t *testing.T) {
	l, g := newLab(t), newGuest(4*PageSize)
	g.set(0, bytes.Repeat([]byte{1}, PageSize))
	g.set(2, bytes.Repeat([]byte{2}, PageSize))
	r := l.open(l.mustWrite(g, g.layout(), l.options()).ID)
	calls, stop := 0, errors.New("stop")
	err := r.Fetch(context.Background(), 0, func(uint64, []byte) error { calls++; return stop })
	if !errors.Is(err, stop) || calls != 1 {
		t.Errorf("%v after %d calls", err, calls)
	}
	for _, c := range []int64{-1, r.Chunks()} {
		mustBe(t, r.Fetch(context.Background(), c, nop), ErrInvalid)
	}
}

func TestProgress(t *testing.T) {
	l, g := newLab(t), newGuest(4<<20)
	for p := range g.size / PageSize {
		g.set(p, bytes.Repeat([]byte{5}, PageSize))
	}
	var last, total uint64
	report := func(done, of uint64) {
		if done < last || done > of {
			t.Errorf("progress went from %d to %d of %d", last, done, of)
		}
		last, total = done, of
	}
	opts := l.options()
	opts.Progress = report
	r := l.open(l.mustWrite(g, g.layout(), opts).ID)
	if last != g.size || total != g.size {
		t.Errorf("write ended at %d of %d", last, total)
	}
	last = 0
	rep, err := r.Verify(context.Background(), report)
	if err != nil || rep.Err() != nil || last != total || rep.Bytes != total {
		t.Errorf("verify: %v %+v, ended at %d of %d", err, rep, last, total)
	}
}
