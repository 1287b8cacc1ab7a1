package snapshot

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"filippo.io/age"

	"github.com/cryovisor/cryovisor/internal/secondreader"
)

// wantTyped fails unless err is of one of the classes of errors for bad bytes.
func wantTyped(t *testing.T, err error) {
	t.Helper()
	if !errors.Is(err, ErrFormat) && !errors.Is(err, ErrVersion) && !errors.Is(err, ErrCorrupt) {
		t.Fatalf("untyped error %v", err)
	}
	if pe := (*ParseError)(nil); !errors.As(err, &pe) {
		t.Fatalf("error %v does not say where", err)
	}
}

// FuzzHeader: what parses must marshal to the same bytes. The checksum is
// repaired first, or the fuzzer would never get past it.
func FuzzHeader(f *testing.F) {
	h := Header{Version: Version, ID: ID{1}, Created: time.Unix(1700000000, 5).UTC(), RAMBytes: 1 << 30, PagesMapped: 7}
	f.Add(h.marshal())
	h.Parent, h.Packs, h.PackBytes = ID{2}, []ID{{3}, {4}}, 12345
	f.Add(h.marshal())
	h.Flags = 1 << 16
	f.Add(h.marshal())
	h.Version = Version + 1
	f.Add(h.marshal())
	f.Add([]byte(headerMagic))
	for _, m := range goldenManifests(f) {
		f.Add(m.header)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if size, _, err := parsePrefix(b); err == nil && size <= len(b) {
			reseal(b[:size])
		}
		h, err := parseHeader(b)
		if err != nil {
			wantTyped(t, err)
			return
		}
		out := h.marshal()
		if !bytes.Equal(out, b[:len(out)]) {
			t.Fatalf("%x parses to %+v, which is %x", b, h, out)
		}
		h2, raw, err := readHeader(bytes.NewReader(b))
		if err != nil || !bytes.Equal(raw, out) || h2.ID != h.ID {
			t.Fatalf("readHeader: %v", err)
		}
	})
}

// reseal puts the right checksum at the end of a header's bytes.
func reseal(b []byte) {
	sum := sha256.Sum256(b[:len(b)-digestBytes])
	copy(headerDigest(b), sum[:])
}

// seedBodies are small bodies that are right.
func seedBodies() [][]byte {
	key := identityPrefix + strings.Repeat("Q", identityBytes-len(identityPrefix))
	return [][]byte{
		(&bodyTables{}).marshal(),
		(&bodyTables{sections: []Section{{Name: "a", Data: []byte("x")}, {Name: "b/c", Version: 2, Critical: true}}}).marshal(),
		(&bodyTables{
			packs:  []packRecord{{ID{1}, ID{9}, 1 << 20, 2 << 20, key}, {ID{2}, ID{8}, 1 << 20, 2 << 20, key}},
			chunks: []chunkRecord{{preambleBytes, 0, 2 * PageSize, 2, CodecStored}, {500, 1, 100, 4, CodecLZ4}},
			extents: []extent{
				{0, 1, 1, 0},
				{1, 2, 0, 0},
				{9, 4, 1, 0},
			},
			sections: []Section{{Name: "a", Data: []byte("x")}},
		}).marshal(),
	}
}

// FuzzBody: what parses must marshal to the same bytes, and be safe to use.
func FuzzBody(f *testing.F) {
	for _, b := range seedBodies() {
		f.Add(b)
	}
	for _, m := range goldenManifests(f) {
		f.Add(m.body)
	}
	f.Fuzz(tryBody)
}

// FuzzManifest: this package and the reader that was written from docs/FORMAT.md accept the same manifests, and what they
// accept, marshalled again, is the same bytes.
func FuzzManifest(f *testing.F) {
	for _, m := range goldenManifests(f) {
		f.Add(m.header, m.body)
	}
	f.Fuzz(func(t *testing.T, header, body []byte) {
		if size, _, err := parsePrefix(header); err == nil && size <= len(header) {
			header = header[:size]
			reseal(header)
			if len(body) >= bodyFixed {
				copy(body[8:], headerDigest(header))
			}
		}
		h, p, err := parseManifest(header, body)
		if second := secondreader.Check(header, body); (err == nil) != (second == nil) {
			t.Fatalf("this reader: %v; the second: %v", err, second)
		}
		if err != nil {
			wantTyped(t, err)
			return
		}
		again := (&bodyTables{p.digest, p.packs, p.chunks.all(), p.extents.all(), p.sections}).marshal()
		if !bytes.Equal(h.marshal(), header) || !bytes.Equal(again, body) {
			t.Fatalf("%x %x parses to what is %x %x", header, body, h.marshal(), again)
		}
	})
}

// parseManifest is what newReader does with a manifest, apart from decrypting it.
func parseManifest(header, plain []byte) (*Header, *body, error) {
	h, err := parseHeader(header)
	if err != nil {
		return nil, nil, err
	}
	p, err := parseBody(plain)
	if err != nil {
		return nil, nil, err
	}
	return h, p, p.checkHeader(h, header)
}

// manifest is a golden one, decrypted.
type manifest struct{ header, body []byte }

// goldenManifests are the manifests of testdata/golden, right and wrong ones, as seeds.
func goldenManifests(tb testing.TB) (out []manifest) {
	tb.Helper()
	for _, v := range readVectors(tb) {
		if len(v.Edits) > 0 || len(v.Keys) != 1 || v.Want == "ErrKey" || v.Want == "ErrNotFound" {
			continue
		}
		b := readFile(tb, filepath.Join(goldenStore, manifestName(v.ID)))
		size := int(binary.LittleEndian.Uint32(b[12:]))
		plain, err := age.Decrypt(bytes.NewReader(b[size:]), goldenKeys(tb, v.Keys)...)
		if err != nil {
			tb.Fatal(err)
		}
		body, err := io.ReadAll(plain)
		if err != nil {
			tb.Fatal(err)
		}
		out = append(out, manifest{b[:size], body})
	}
	if len(out) < 75 {
		tb.Fatalf("%d golden manifests; where are the others?", len(out))
	}
	return out
}

// FuzzBodyFields overwrites two fields of a right body, which gets further than
// changing bytes at random.
func FuzzBodyFields(f *testing.F) {
	f.Add(uint8(2), uint16(64), uint64(1), uint8(4), uint16(200), uint64(2), uint8(8))
	f.Add(uint8(2), uint16(44), uint64(1), uint8(4), uint16(48), uint64(4), uint8(4))
	f.Fuzz(func(t *testing.T, seed uint8, at1 uint16, v1 uint64, n1 uint8, at2 uint16, v2 uint64, n2 uint8) {
		seeds := seedBodies()
		b := seeds[int(seed)%len(seeds)]
		var v [8]byte
		binary.LittleEndian.PutUint64(v[:], v1)
		copy(b[int(at1)%len(b):], v[:1+n1%8])
		binary.LittleEndian.PutUint64(v[:], v2)
		copy(b[int(at2)%len(b):], v[:1+n2%8])
		tryBody(t, b)
	})
}

func tryBody(t *testing.T, b []byte) {
	p, err := parseBody(b)
	if err != nil {
		wantTyped(t, err)
		return
	}
	out := (&bodyTables{p.digest, p.packs, p.chunks.all(), p.extents.all(), p.sections}).marshal()
	if !bytes.Equal(out, b) {
		t.Fatalf("%x parses to what is %x", b, out)
	}
	walk(t, p)
}

// walk uses a parsed body as a Reader does: every lookup and every reverse
// lookup must agree, and stay within bounds.
func walk(t *testing.T, p *body) {
	r := &Reader{header: &Header{}, body: p}
	for at := uint64(0); at < DiskStride; {
		start, n, chunk := r.Lookup(at)
		if start != at || n == 0 || chunk >= r.Chunks() {
			t.Fatalf("Lookup(%#x) = %#x %#x %d", at, start, n, chunk)
		}
		at += n
	}
	for d := range MaxDisks {
		disk := r.Disk(d)
		for at := int64(0); at < DiskStride; {
			start, n, chunk, within := disk.Lookup(at)
			if start != at || n <= 0 || chunk >= r.Chunks() || within < 0 {
				t.Fatalf("disk %d: Lookup(%#x) = %#x %#x %d %d", d, at, start, n, chunk, within)
			}
			at += n
		}
	}
	total := 0
	p.index()
	for c := range p.head {
		rec := p.chunks.at(c)
		for i := p.head[c]; i != none; i = p.next[i] {
			e := p.extents.at(int(i))
			if int(e.chunk) != c || e.first+e.count > rec.pages {
				t.Fatalf("chunk %d: extent %+v of %+v", c, e, rec)
			}
			total++
		}
	}
	if total != p.extents.len() {
		t.Fatalf("%d extents are in the index of %d", total, p.extents.len())
	}
}

// FuzzChunk decodes any bytes as a chunk of any size, into a buffer that is
// followed by bytes which must not change.
func FuzzChunk(f *testing.F) {
	var c compressor
	plain := bytes.Repeat([]byte("abcdefgh"), PageSize/8)
	stored, _ := c.compress(plain, CodecLZ4)
	f.Add(slices.Clone(stored), uint16(1))
	f.Add(slices.Clone(stored), uint16(2))
	f.Add([]byte{0x1f, 'a', 1, 0, 255, 255, 255}, uint16(1))
	f.Add([]byte{}, uint16(1))
	f.Fuzz(func(t *testing.T, stored []byte, pages uint16) {
		pages = pages%16 + 1
		rec := chunkRecord{pages: uint32(pages), length: uint32(len(stored)), codec: CodecLZ4}
		plain := int(pages) * PageSize
		buf := bytes.Repeat([]byte{0xa5}, plain+PageSize)
		out, err := decodeChunk(rec, stored, buf)
		if !allIs(buf[plain:], 0xa5) {
			t.Fatal("decoding wrote beyond the chunk")
		}
		if err != nil {
			wantTyped(t, err)
		} else if len(out) != plain {
			t.Fatalf("%d bytes", len(out))
		}
	})
}

func allIs(b []byte, c byte) bool {
	for _, x := range b {
		if x != c {
			return false
		}
	}
	return true
}

// FuzzPreamble: only one string of bytes is the preamble of a given pack.
func FuzzPreamble(f *testing.F) {
	f.Add(preamble(ID{1}, ID{2}))
	f.Add(preamble(ID{2}, ID{1}))
	f.Add([]byte(packMagic))
	f.Fuzz(func(t *testing.T, b []byte) {
		err := checkPreamble(b, ID{1}, ID{2})
		if err != nil {
			wantTyped(t, err)
		} else if !bytes.HasPrefix(b, preamble(ID{1}, ID{2})) {
			t.Fatalf("%x passes", b)
		}
	})
}

// FuzzWrite: any sequence of writes, into any generations, reads back as a plain
// model of memory and disks says.
func FuzzWrite(f *testing.F) {
	f.Add(uint64(1), uint8(3))
	f.Add(uint64(2), uint8(1))
	f.Fuzz(func(t *testing.T, seed uint64, generations uint8) {
		rnd := rand.New(rand.NewPCG(seed, 0))
		l, g := newLab(t), newGuest(256*PageSize)
		opts := l.options()
		opts.Workers, opts.ChunkSize = 1+rnd.IntN(3), (1+rnd.IntN(20))*PageSize
		disks := []*testDisk{newTestDisk(0, true, 100*PageSize+512), newTestDisk(7, false, 90*PageSize)}
		for range generations%4 + 1 {
			w, err := l.Create(context.Background(), opts)
			if err != nil {
				t.Fatal(err)
			}
			for range 1 + rnd.IntN(3) {
				dirty := randomRanges(rnd, g.size)
				for _, d := range dirty {
					for p := d.GPA / PageSize; p < (d.GPA+d.Len)/PageSize; p++ {
						g.set(p, page(rnd))
					}
				}
				if err := w.WriteMemory(context.Background(), g.size, dirty, g.view); err != nil {
					t.Fatal(err)
				}
				for _, d := range disks {
					if err := w.WriteDisk(context.Background(), d.change(rnd)); err != nil {
						t.Fatal(err)
					}
				}
			}
			info, err := w.Commit(context.Background())
			if err != nil {
				t.Fatal(err)
			}
			opts.Parent = l.open(info.ID)
			l.check(opts.Parent, g)
			for _, d := range disks {
				d.check(t, opts.Parent)
			}
		}
	})
}
