package snapshot

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"testing"
	"time"

	"filippo.io/age"
)

// small makes a snapshot whose files are small enough to try every byte.
func small(t *testing.T) (*lab, *guest, Info) {
	l, g := newLab(t), newGuest(16*PageSize)
	for _, p := range []uint64{1, 2, 5} {
		g.set(p, bytes.Repeat([]byte{byte(p), 2, 3, 4}, PageSize/4))
	}
	opts := l.options()
	opts.Workers = 1
	return l, g, l.mustWrite(g, g.layout(), opts)
}

// isTyped reports whether err is of a class that says "these bytes are no good".
func isTyped(err error) bool {
	for _, c := range []error{ErrFormat, ErrVersion, ErrCorrupt, ErrKey} {
		if errors.Is(err, c) {
			return true
		}
	}
	return false
}

// tryAll opens the snapshot and verifies it, and returns what was found.
func tryAll(l *lab, id ID) error {
	r, err := l.Open(context.Background(), id, l.key)
	if err != nil {
		return err
	}
	defer r.Close()
	rep, err := r.Verify(context.Background(), nil)
	if err != nil {
		return err
	}
	return rep.Err()
}

// TestEveryByteOfManifest flips each byte of a manifest, and cuts it at each, in
// turn. No change may go unnoticed at Open.
func TestEveryByteOfManifest(t *testing.T) {
	l, _, info := small(t)
	path := l.ManifestPath(info.ID)
	everyByte(t, path, readFile(t, path), func() error {
		r, err := l.Open(context.Background(), info.ID, l.key)
		if err == nil {
			r.Close()
		}
		return err
	})
}

// TestEveryByteOfPack does the same to a pack, which Verify must notice.
func TestEveryByteOfPack(t *testing.T) {
	l, _, info := small(t)
	r := l.open(info.ID)
	path := r.packs[0].path
	everyByte(t, path, readFile(t, path), func() error {
		rep, err := r.reopen().Verify(context.Background(), nil)
		if err != nil {
			t.Fatal(err)
		}
		if err := rep.Err(); err != nil {
			if d := rep.Damage[0]; d.Path != path || len(d.Ranges) != 2 {
				t.Fatalf("damage %+v", d)
			}
			return err
		}
		return nil
	})
}

// reopen returns a Reader of the same manifest that has no pack open yet.
func (r *Reader) reopen() *Reader {
	for _, p := range r.packs {
		p.close()
	}
	return r
}

func everyByte(t *testing.T, path string, good []byte, try func() error) {
	t.Helper()
	if err := try(); err != nil {
		t.Fatalf("undamaged: %v", err)
	}
	for i := range good {
		bad := slices.Clone(good)
		bad[i] ^= 1 << (i % 8)
		writeFile(t, path, bad)
		if err := try(); !isTyped(err) {
			t.Fatalf("byte %d of %d flipped: %v", i, len(good), err)
		}
		writeFile(t, path, good[:i])
		if err := try(); !isTyped(err) {
			t.Fatalf("cut to %d of %d bytes: %v", i, len(good), err)
		}
	}
	writeFile(t, path, append(slices.Clone(good), 0))
	if err := try(); !isTyped(err) {
		t.Fatalf("a byte appended: %v", err)
	}
	writeFile(t, path, good)
	if err := try(); err != nil {
		t.Fatalf("restored: %v", err)
	}
}

func TestKeys(t *testing.T) {
	l, _, info := small(t)
	ctx := context.Background()
	_, err := l.Open(ctx, info.ID, newKey(t))
	mustBe(t, err, ErrKey)
	var nm *age.NoIdentityMatchError
	if !errors.As(err, &nm) {
		t.Errorf("%v does not tell what age said", err)
	}
	_, err = l.Open(ctx, info.ID)
	mustBe(t, err, ErrKey)
	if _, err := l.Header(info.ID); err != nil {
		t.Errorf("the header needs no key: %v", err)
	}
	_, err = l.Open(ctx, NewID(), l.key)
	mustBe(t, err, ErrNotFound, os.ErrNotExist)
}

func TestPackMissing(t *testing.T) {
	l, _, info := small(t)
	r := l.open(info.ID)
	path := r.packs[0].path
	if err := os.Rename(path, path+".away"); err != nil {
		t.Fatal(err)
	}
	err := r.Fetch(context.Background(), 0, nop)
	mustBe(t, err, ErrCorrupt, os.ErrNotExist)
	var fe *FileError
	if !errors.As(err, &fe) || fe.Path != path {
		t.Errorf("%v does not name the pack", err)
	}
	if err := os.Rename(path+".away", path); err != nil {
		t.Fatal(err)
	}
	if err := r.Fetch(context.Background(), 0, nop); err != nil {
		t.Errorf("the pack is back: %v", err)
	}
}

// TestPacksSwapped exchanges two packs of one snapshot, which have one key, and
// then a pack with one of another snapshot.
func TestPacksSwapped(t *testing.T) {
	l, g, rnd := newLab(t), newGuest(1<<20), testRand(t)
	for p := range g.size / PageSize {
		b := make([]byte, PageSize)
		fillRandom(rnd, b)
		g.set(p, b)
	}
	r := l.open(twoPacks(l, g))
	a, b := r.packs[0].path, r.packs[1].path
	first, second := readFile(t, a), readFile(t, b)
	for name, other := range map[string][]byte{
		"of the same snapshot": second,
		"of another snapshot":  readFile(t, l.open(twoPacks(l, g)).packs[0].path),
	} {
		writeFile(t, a, other)
		// Whatever the sizes are, the contents must give it away.
		p := newPackReader(r.source, r.packs[0].rec)
		p.rec.fileSize, p.rec.plainSize = uint64(len(other)), r.packs[1].rec.plainSize
		_, err := p.open()
		if err == nil {
			t.Errorf("pack %s went unnoticed", name)
		}
		mustBe(t, err, ErrCorrupt)
		mustBe(t, tryAll(l, r.header.ID), ErrCorrupt)
	}
	writeFile(t, a, first)
	if err := tryAll(l, r.header.ID); err != nil {
		t.Error(err)
	}
}

// twoPacks writes g by two workers. WriteMemory waits for nobody, so one worker
// might do everything: two calls make sure that each has something.
func twoPacks(l *lab, g *guest) ID {
	l.t.Helper()
	ctx := context.Background()
	opts := l.options()
	opts.Workers, opts.ChunkSize = 2, 64<<10
	w, err := l.Create(ctx, opts)
	if err != nil {
		l.t.Fatal(err)
	}
	defer w.Abort()
	var meet barrier
	meet.wait.Add(2)
	view := func(gpa uint64, n int) ([]byte, error) {
		meet.once()
		return g.view(gpa, n)
	}
	if err := w.WriteMemory(ctx, g.size, g.layout(), view); err != nil {
		l.t.Fatal(err)
	}
	info, err := w.Commit(ctx)
	if err != nil {
		l.t.Fatal(err)
	}
	if n := len(l.open(info.ID).packs); n != 2 {
		l.t.Fatalf("%d packs", n)
	}
	return info.ID
}

// TestManifestSwapped puts one snapshot's manifest, header or body in another's place.
func TestManifestSwapped(t *testing.T) {
	l, g, info := small(t)
	other := l.mustWrite(g, g.layout(), l.options())
	a, b := readFile(t, l.ManifestPath(info.ID)), readFile(t, l.ManifestPath(other.ID))
	sizeA, _, err := parsePrefix(a)
	if err != nil {
		t.Fatal(err)
	}
	sizeB, _, err := parsePrefix(b)
	if err != nil {
		t.Fatal(err)
	}
	for name, bytes := range map[string][]byte{
		"whole":         b,
		"body":          slices.Concat(a[:sizeA], b[sizeB:]),
		"header":        slices.Concat(b[:sizeB], a[sizeA:]),
		"forged header": slices.Concat(forge(t, a[:sizeA]), a[sizeA:]),
	} {
		writeFile(t, l.ManifestPath(info.ID), bytes)
		_, err := l.Open(context.Background(), info.ID, l.key)
		if !errors.Is(err, ErrCorrupt) {
			t.Errorf("%s swapped: %v", name, err)
		}
	}
}

// forge returns the header with another size of memory, and a checksum to match:
// what somebody without the key can do.
func forge(t *testing.T, b []byte) []byte {
	h, err := parseHeader(b)
	if err != nil {
		t.Fatal(err)
	}
	h.RAMBytes *= 2
	return h.marshal()
}

func TestNewerVersion(t *testing.T) {
	l, _, info := small(t)
	path := l.ManifestPath(info.ID)
	b := readFile(t, path)
	h, err := parseHeader(b)
	if err != nil {
		t.Fatal(err)
	}
	size := len(h.marshal())
	h.Version = Version + 1
	writeFile(t, path, append(h.marshal(), b[size:]...))
	_, err = l.Open(context.Background(), info.ID, l.key)
	mustBe(t, err, ErrVersion)
	h.Version, h.Flags = Version, 1
	writeFile(t, path, append(h.marshal(), b[size:]...))
	_, err = l.Header(info.ID)
	mustBe(t, err, ErrVersion)
}

// TestVerifyNamesWhatIsLost damages one of many chunks.
func TestVerifyNamesWhatIsLost(t *testing.T) {
	l, g, rnd := newLab(t), newGuest(4<<20), testRand(t)
	for p := range g.size / PageSize {
		b := make([]byte, PageSize)
		fillRandom(rnd, b)
		g.set(p, b)
	}
	opts := l.options()
	opts.Workers = 1
	r := l.open(l.mustWrite(g, g.layout(), opts).ID)
	b := readFile(t, r.packs[0].path)
	b[len(b)/2] ^= 1
	writeFile(t, r.packs[0].path, b)
	rep, err := r.Verify(context.Background(), nil)
	if err != nil {
		t.Fatal(err)
	}
	mustBe(t, rep.Err(), ErrCorrupt)
	lost := map[int64]bool{}
	for _, d := range rep.Damage {
		if d.Chunk < 0 || d.Pack != r.packs[0].rec.id || len(d.Ranges) == 0 {
			t.Errorf("damage %+v", d)
		}
		lost[d.Chunk] = true
	}
	if len(lost) == 0 || len(lost) > 2 {
		t.Errorf("%d chunks of %d reported for one flipped bit", len(lost), r.Chunks())
	}
	for c := range r.Chunks() {
		if err := r.Fetch(context.Background(), c, nop); (err != nil) != lost[c] {
			t.Errorf("chunk %d: Fetch says %v, Verify %v", c, err, lost[c])
		}
	}
}

// TestBadTables gives parseBody bodies that break one rule each.
func TestBadTables(t *testing.T) {
	id := func(b byte) ID { return ID{b} }
	key := newKey(t).String()
	good := func() *bodyTables {
		return &bodyTables{
			packs: []packRecord{
				{id(1), id(9), 1 << 20, 2 << 20, key},
				{id(2), id(8), 1 << 20, 2 << 20, key},
			},
			chunks: []chunkRecord{
				{preambleBytes, 0, 2 * PageSize, 2, CodecStored},
				{preambleBytes + 2*PageSize, 0, 100, 4, CodecLZ4},
				{500, 1, 100, 4, CodecLZ4},
			},
			extents: []extent{
				{0, 1, 1, 0}, {1, 2, 0, 0}, {3, 1, 1, 2}, {9, 4, 2, 0}, {20, 1, 1, 3},
			},
			sections: slices.SortedFunc(slices.Values(testSections), func(a, b Section) int { return bytes.Compare([]byte(a.Name), []byte(b.Name)) }),
		}
	}
	if _, err := parseBody(good().marshal()); err != nil {
		t.Fatal(err)
	}
	for name, breakIt := range map[string]func(b *bodyTables){
		"packs out of order":    func(b *bodyTables) { b.packs[0].id = id(3) },
		"pack twice":            func(b *bodyTables) { b.packs[0].id = id(2) },
		"pack without id":       func(b *bodyTables) { b.packs[0].id = ID{} },
		"pack without origin":   func(b *bodyTables) { b.packs[0].origin = ID{} },
		"pack too small":        func(b *bodyTables) { b.packs[0].fileSize = b.packs[0].plainSize },
		"pack too large":        func(b *bodyTables) { b.packs[0].fileSize = maxFileBytes + 1 },
		"pack key":              func(b *bodyTables) { b.packs[0].identity = "AGE-SECRET-KEY-2" + key[16:] },
		"pack key characters":   func(b *bodyTables) { b.packs[0].identity = key[:20] + "b" + key[21:] },
		"pack unused":           func(b *bodyTables) { b.chunks, b.extents = b.chunks[:2], b.extents[:3] },
		"chunk of no pack":      func(b *bodyTables) { b.chunks[2].pack = 2 },
		"chunks out of order":   func(b *bodyTables) { b.chunks[0], b.chunks[1] = b.chunks[1], b.chunks[0] },
		"chunks overlap":        func(b *bodyTables) { b.chunks[1].offset-- },
		"chunk in preamble":     func(b *bodyTables) { b.chunks[0].offset-- },
		"chunk beyond pack":     func(b *bodyTables) { b.chunks[2].offset = 1<<20 - 99 },
		"chunk wraps":           func(b *bodyTables) { b.chunks[2].offset = 1<<64 - 50 },
		"chunk of no page":      func(b *bodyTables) { b.chunks[2].pages = 0 },
		"chunk of many pages":   func(b *bodyTables) { b.chunks[2].pages = maxChunkPages + 1 },
		"stored chunk is short": func(b *bodyTables) { b.chunks[0].length-- },
		"LZ4 does not shrink":   func(b *bodyTables) { b.chunks[1].length = 4 * PageSize },
		"LZ4 beyond its ratio":  func(b *bodyTables) { b.chunks[1].length = 64 },
		"unknown codec":         func(b *bodyTables) { b.chunks[0].codec = 3 },
		"codec 0":               func(b *bodyTables) { b.chunks[0].codec = 0 },
		"chunk unused":          func(b *bodyTables) { b.extents = slices.Delete(b.extents, 1, 2) },
		"extent of no page":     func(b *bodyTables) { b.extents[0].count = 0 },
		"extents overlap":       func(b *bodyTables) { b.extents[3].page = 2 },
		"extents out of order":  func(b *bodyTables) { b.extents[3], b.extents[4] = b.extents[4], b.extents[3] },
		"extent of no chunk":    func(b *bodyTables) { b.extents[4].chunk = 3 },
		"extent leaves chunk":   func(b *bodyTables) { b.extents[4].first = 4 },
		"extent wraps chunk":    func(b *bodyTables) { b.extents[4].first = none },
		"extent beyond memory":  func(b *bodyTables) { b.extents[4].page = MaxAddress / PageSize },
		"extent wraps":          func(b *bodyTables) { b.extents[4].page = 1<<64 - 1 },
		"extents not joined": func(b *bodyTables) {
			b.extents = slices.Replace(b.extents, 1, 2, extent{1, 1, 0, 0}, extent{2, 1, 0, 1})
		},
		"sections out of order": func(b *bodyTables) { slices.Reverse(b.sections) },
		"section name":          func(b *bodyTables) { b.sections[0].Name = "Config" },
		"section without name":  func(b *bodyTables) { b.sections[0].Name = "" },
	} {
		b := good()
		breakIt(b)
		if _, err := parseBody(b.marshal()); !errors.Is(err, ErrFormat) {
			t.Errorf("%s: %v", name, err)
		} else if pe := (*ParseError)(nil); !errors.As(err, &pe) || pe.Part != "body" {
			t.Errorf("%s: %v does not say where", name, err)
		}
	}
	raw := good().marshal()
	for cut := range raw {
		if _, err := parseBody(raw[:cut]); !errors.Is(err, ErrFormat) {
			t.Fatalf("cut to %d of %d bytes: %v", cut, len(raw), err)
		}
	}
}

// TestBadPreamble: what only somebody who has a pack's key can make of its start.
func TestBadPreamble(t *testing.T) {
	origin, id := NewID(), NewID()
	if err := checkPreamble(preamble(origin, id), origin, id); err != nil {
		t.Fatal(err)
	}
	for name, bad := range map[string]struct {
		at   int
		put  byte
		want error
	}{
		"magic":        {7, 'c', ErrFormat},
		"version 0":    {8, 0, ErrFormat},
		"version 2":    {8, 2, ErrVersion},
		"version 257":  {9, 1, ErrVersion},
		"reserved":     {12, 1, ErrFormat},
		"last of them": {15, 1, ErrFormat},
		"origin":       {16, ^origin[0], ErrCorrupt},
		"id":           {47, ^id[15], ErrCorrupt},
	} {
		b := preamble(origin, id)
		b[bad.at] = bad.put
		if err := checkPreamble(b, origin, id); !errors.Is(err, bad.want) {
			t.Errorf("%s: %v, want %v", name, err, bad.want)
		}
	}
	for cut := range preambleBytes {
		if err := checkPreamble(preamble(origin, id)[:cut], origin, id); !errors.Is(err, ErrFormat) {
			t.Errorf("cut to %d bytes: %v", cut, err)
		}
	}
}

// TestBadPackList: the header's packs ascend, so that a set of them has one form.
func TestBadPackList(t *testing.T) {
	header := func(packs ...ID) []byte {
		return (&Header{Version: Version, ID: NewID(), Created: time.Unix(0, 0), Packs: packs}).marshal()
	}
	if _, err := parseHeader(header(ID{1}, ID{1, 1}, ID{2})); err != nil {
		t.Fatal(err)
	}
	for name, packs := range map[string][]ID{
		"twice":        {{1}, {1}},
		"descending":   {{1}, {3}, {2}},
		"zero":         {{}, {1}},
		"only at last": {{1}, {2, 1}, {2, 0, 1}},
	} {
		if _, err := parseHeader(header(packs...)); !errors.Is(err, ErrFormat) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestBadChunks(t *testing.T) {
	var c compressor
	plain := bytes.Repeat([]byte{1, 2, 3, 4, 5, 6, 7, 8}, 2*PageSize/8)
	stored, codec := c.compress(plain, CodecLZ4)
	rec := chunkRecord{pages: 2, length: uint32(len(stored)), codec: codec}
	buf := make([]byte, 8*PageSize)
	if got, err := decodeChunk(rec, stored, buf); err != nil || !bytes.Equal(got, plain) {
		t.Fatal(err)
	}
	for name, bad := range map[string]struct {
		pages  uint32
		stored []byte
	}{
		"too short":  {3, stored},
		"too long":   {1, stored},
		"cut":        {2, stored[:len(stored)-1]},
		"empty":      {2, nil},
		"not a LZ4":  {2, bytes.Repeat([]byte{0xff}, len(stored))},
		"more bytes": {2, append(slices.Clone(stored), 1)},
	} {
		_, err := decodeChunk(chunkRecord{pages: bad.pages, codec: CodecLZ4}, bad.stored, buf)
		if !errors.Is(err, ErrCorrupt) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func ExampleParseID() {
	_, err := ParseID("not an id")
	fmt.Println(errors.Is(err, ErrInvalid))
	// Output: true
}

// brokenIdentity fails, as a plugin does that can't be started.
type brokenIdentity struct{ err error }

func (b brokenIdentity) Unwrap([]*age.Stanza) ([]byte, error) { return nil, b.err }

// TestIdentityFails: a key that does not work is not damage.
func TestIdentityFails(t *testing.T) {
	l, _, info := small(t)
	broken := errors.New("the plugin does not start")
	_, err := l.Open(context.Background(), info.ID, brokenIdentity{broken})
	mustBe(t, err, ErrKey, broken)
	if errors.Is(err, ErrCorrupt) {
		t.Errorf("%v blames the snapshot", err)
	}
	r, err := l.Open(context.Background(), info.ID, brokenIdentity{broken}, l.key)
	if err != nil {
		t.Fatalf("a key that fits is tried first: %v", err)
	}
	r.Close()
}

// TestLargeBody has a body that several goroutines decrypt.
func TestLargeBody(t *testing.T) {
	l, rnd := newLab(t), testRand(t)
	for _, size := range []int{1<<20 - 500, 1 << 20, 3<<20 + 12345} {
		data := make([]byte, size)
		fillRandom(rnd, data)
		w, err := l.Create(context.Background(), l.options())
		if err != nil {
			t.Fatal(err)
		}
		if err := w.AddSection(Section{Name: "large", Data: data}); err != nil {
			t.Fatal(err)
		}
		if err := w.WriteMemory(context.Background(), 0, nil, nil); err != nil {
			t.Fatal(err)
		}
		info, err := w.Commit(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		s, err := l.open(info.ID).ReadSection("large")
		if err != nil || !bytes.Equal(s.Data, data) {
			t.Errorf("%d bytes: %v", size, err)
		}
		path := l.ManifestPath(info.ID)
		b := readFile(t, path)
		b[len(b)-size/3] ^= 1
		writeFile(t, path, b)
		_, err = l.Open(context.Background(), info.ID, l.key)
		mustBe(t, err, ErrCorrupt)
	}
}
