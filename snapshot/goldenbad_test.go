package snapshot

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"

	"filippo.io/age"
)

// forgery is a manifest that only somebody who has a key can make: header and body fit each other, and break one rule. It
// begins as one that breaks none: a diff, of a snapshot that wrote one pack, without changes.
type forgery struct {
	name, want string
	restore    string
	edit       func(h *Header, t *bodyTables)
	raw        func(body []byte) []byte // what tables can't express
	files      func(t *bodyTables) []edit
}

func (m *goldenMaker) forgeries(full ID, g *guest) {
	for _, set := range [][]forgery{m.odd(), m.badPacks(full), m.badChunks(), m.badExtents(), m.badSections(), m.badBodies()} {
		for _, f := range set {
			id, t := m.forge(full, NewID(), f)
			v := vector{Name: f.name, ID: id, Want: f.want, Restore: f.restore}
			if f.want == "ok" {
				v.Memory = digestPages(g.pages)
			}
			if f.files != nil {
				v.Edits = f.files(t)
			}
			m.add(v)
		}
	}
	a, b := NewID(), NewID()
	for _, x := range [][2]ID{{a, b}, {b, a}} {
		m.forge(full, x[0], forgery{edit: func(h *Header, _ *bodyTables) { h.Parent = x[1] }})
	}
	m.good("cycle in the ancestry", a, g)
}

// forge writes a forgery's manifest under an id.
func (m *goldenMaker) forge(from, id ID, f forgery) (ID, *bodyTables) {
	r, err := m.Open(context.Background(), from, m.own)
	if err != nil {
		m.Fatal(err)
	}
	defer r.Close()
	h := r.Header()
	h.Parent, h.ID, h.PackBytes, h.PagesStored = from, id, 0, 0
	t := &bodyTables{
		packs: slices.Clone(r.body.packs), chunks: r.body.chunks.all(), extents: r.body.extents.all(), sections: r.Sections(),
	}
	if f.edit != nil {
		f.edit(&h, t)
	}
	raw := h.marshal()
	t.digest = [digestBytes]byte(headerDigest(raw))
	body := t.marshal()
	if f.raw != nil {
		body = f.raw(body)
	}
	file := bytes.NewBuffer(raw)
	w, err := age.Encrypt(file, m.own.Recipient())
	if err != nil {
		m.Fatal(err)
	}
	if _, err := w.Write(body); err != nil {
		m.Fatal(err)
	}
	if err := w.Close(); err != nil {
		m.Fatal(err)
	}
	writeFile(m, m.ManifestPath(id), file.Bytes())
	return id, t
}

// odd are the cases that a reader must not refuse.
func (m *goldenMaker) odd() []forgery {
	return []forgery{
		{name: "flag that an old reader ignores", want: "ok", edit: func(h *Header, _ *bodyTables) { h.Flags = 1 << 16 }},
		{name: "no pages said to be stored, and 2^64-1", want: "ok", edit: func(h *Header, _ *bodyTables) { h.PagesStored-- }},
		{name: "unknown section that is not critical", want: "ok", edit: func(_ *Header, t *bodyTables) {
			t.sections = append(t.sections, Section{Name: "zzz", Version: 99})
		}},
		{name: "unknown critical section", want: "ok", restore: "ErrVersion", edit: func(_ *Header, t *bodyTables) {
			t.sections = append(t.sections, Section{Name: "zzz", Version: 1, Critical: true})
		}},
		{name: "newer version of a critical section", want: "ok", restore: "ErrVersion", edit: func(_ *Header, t *bodyTables) {
			t.sections[1].Version++
		}},
	}
}

func (m *goldenMaker) badPacks(full ID) []forgery {
	pack := func(edit func(p *packRecord)) func(*Header, *bodyTables) {
		return func(h *Header, t *bodyTables) {
			edit(&t.packs[0])
			h.Packs[0] = t.packs[0].id
		}
	}
	other, origin := NewID(), NewID()
	file := packName(m.pack(full))
	return []forgery{
		{
			name: "pack of another name", want: "ErrCorrupt", edit: pack(func(p *packRecord) { p.id = other }),
			files: func(*bodyTables) []edit { return []edit{{File: packName(other), Copy: file}} },
		},
		{name: "pack of another snapshot", want: "ErrCorrupt", edit: pack(func(p *packRecord) { p.origin = origin })},
		{name: "pack without an origin", want: "ErrFormat", edit: pack(func(p *packRecord) { p.origin = ID{} })},
		{name: "pack with another key", want: "ErrCorrupt", edit: pack(func(p *packRecord) { p.identity = newKey(m).String() })},
		{name: "pack key with a wrong checksum", want: "ErrFormat", edit: pack(func(p *packRecord) {
			last := "Q"
			if strings.HasSuffix(p.identity, last) {
				last = "P"
			}
			p.identity = p.identity[:identityBytes-1] + last
		})},
		{name: "pack key in lower case", want: "ErrFormat", edit: pack(func(p *packRecord) {
			p.identity = identityPrefix + strings.ToLower(p.identity[len(identityPrefix):])
		})},
		{name: "pack with a smaller file", want: "ErrCorrupt", edit: pack(func(p *packRecord) { p.fileSize-- })},
		{name: "pack with a larger plaintext", want: "ErrCorrupt", edit: pack(func(p *packRecord) { p.plainSize++ })},
		{name: "pack with a file that is too large", want: "ErrFormat", edit: pack(func(p *packRecord) { p.fileSize = 1<<60 + 1 })},
		{name: "pack with more plaintext than file", want: "ErrFormat", edit: pack(func(p *packRecord) { p.plainSize = p.fileSize })},
		{name: "reserved bytes of a pack", want: "ErrFormat", raw: put(bodyFixed+122, 1)},
		{name: "pack of another in a snapshot without a parent", want: "ErrFormat", edit: func(h *Header, _ *bodyTables) { h.Parent = ID{} }},
		{name: "sum of the packs", want: "ErrFormat", edit: func(h *Header, _ *bodyTables) { h.PackBytes = 1 }},
		{name: "sum of the packs that overflows", want: "ErrFormat", edit: hugePacks},
		{name: "pack that the header does not list", want: "ErrFormat", edit: func(h *Header, _ *bodyTables) { h.Packs[0] = NewID() }},
		{name: "pack without a chunk", want: "ErrFormat", edit: func(h *Header, t *bodyTables) {
			p := t.packs[0]
			p.id = ID(bytes.Repeat([]byte{0xff}, idBytes))
			t.packs, h.Packs = append(t.packs, p), append(h.Packs, p.id)
		}},
	}
}

// hugePacks are packs whose sizes add up to 2^64.
func hugePacks(h *Header, t *bodyTables) {
	like := t.packs[0]
	*t, h.Packs, h.PagesMapped = bodyTables{}, nil, 0
	for i := range uint32(16) {
		p := packRecord{id: ID{byte(i + 1)}, origin: h.ID, plainSize: 1 << 20, fileSize: maxFileBytes, identity: like.identity}
		t.packs, h.Packs = append(t.packs, p), append(h.Packs, p.id)
		t.chunks = append(t.chunks, chunkRecord{preambleBytes, i, PageSize, 1, CodecStored})
		t.extents = append(t.extents, extent{uint64(i), 1, i, 0})
		h.PagesMapped++
	}
}

// put overwrites bytes of a body.
func put(at int, b ...byte) func([]byte) []byte {
	return func(body []byte) []byte {
		copy(body[at:], b)
		return body
	}
}

func (m *goldenMaker) badChunks() []forgery {
	chunk := func(edit func(c *chunkRecord)) func(*Header, *bodyTables) {
		return func(_ *Header, t *bodyTables) {
			edit(&t.chunks[slices.IndexFunc(t.chunks, func(c chunkRecord) bool { return c.codec == CodecLZ4 })])
		}
	}
	return []forgery{
		{name: "chunk that inflates beyond its size", want: "ErrCorrupt", edit: inflating},
		{name: "chunk that inflates to less", want: "ErrCorrupt", edit: chunk(func(c *chunkRecord) { c.pages++ })},
		{name: "chunk that is no LZ4 block", want: "ErrCorrupt", edit: chunk(func(c *chunkRecord) { c.offset, c.length = c.offset+1, c.length-1 })},
		{name: "chunk that is too short for its pages", want: "ErrFormat", edit: chunk(func(c *chunkRecord) { c.pages = 1024 })},
		{name: "chunk of more than 1024 pages", want: "ErrFormat", edit: chunk(func(c *chunkRecord) { c.pages, c.length = 1025, 1<<20 })},
		{name: "LZ4 that saves nothing", want: "ErrFormat", edit: chunk(func(c *chunkRecord) { c.length = c.pages * PageSize })},
		{name: "stored chunk of another length", want: "ErrFormat", edit: chunk(func(c *chunkRecord) { c.codec = CodecStored })},
		{name: "unknown codec", want: "ErrFormat", edit: chunk(func(c *chunkRecord) { c.codec = 3 })},
		{name: "codec 0", want: "ErrFormat", edit: chunk(func(c *chunkRecord) { c.codec = 0 })},
		{name: "chunk in the preamble", want: "ErrFormat", edit: func(_ *Header, t *bodyTables) { t.chunks[0].offset = 47 }},
		{name: "chunk behind the pack's end", want: "ErrFormat", edit: func(_ *Header, t *bodyTables) {
			t.chunks[len(t.chunks)-1].offset = t.packs[0].plainSize - 1
		}},
		{name: "chunk whose end overflows", want: "ErrFormat", edit: func(_ *Header, t *bodyTables) {
			t.chunks[len(t.chunks)-1].offset = 1<<64 - 1
		}},
		{name: "overlapping chunks", want: "ErrFormat", edit: func(_ *Header, t *bodyTables) { t.chunks[1].offset-- }},
		{name: "chunk of a pack that there is not", want: "ErrFormat", edit: func(_ *Header, t *bodyTables) {
			t.chunks[len(t.chunks)-1].pack = 1
		}},
		{name: "chunk that nothing uses", want: "ErrFormat", edit: func(h *Header, t *bodyTables) {
			last := t.extents[len(t.extents)-1]
			t.extents = t.extents[:len(t.extents)-1]
			h.PagesMapped -= uint64(last.count)
		}},
	}
}

// inflating makes the map claim less of an LZ4 chunk than it decodes to.
func inflating(h *Header, t *bodyTables) {
	for i, e := range t.extents {
		if c := &t.chunks[e.chunk]; c.codec == CodecLZ4 && c.pages == e.count && c.pages > 1 {
			c.pages--
			t.extents[i].count--
			h.PagesMapped--
			return
		}
	}
	panic("no such chunk")
}

func (m *goldenMaker) badExtents() []forgery {
	last := func(edit func(e *extent)) func(*Header, *bodyTables) {
		return func(_ *Header, t *bodyTables) { edit(&t.extents[len(t.extents)-1]) }
	}
	return []forgery{
		{name: "map out of range", want: "ErrFormat", edit: last(func(e *extent) { e.page = MaxAddress / PageSize })},
		{name: "map out of range by a page", want: "ErrFormat", edit: last(func(e *extent) { e.page = MaxAddress/PageSize - uint64(e.count) + 1 })},
		{name: "map whose end overflows", want: "ErrFormat", edit: last(func(e *extent) { e.page = 1<<64 - 1 })},
		{name: "extent in memory and in a disk", want: "ErrFormat", edit: last(func(e *extent) { e.page = diskPages - 1 })},
		{name: "empty extent", want: "ErrFormat", edit: func(h *Header, t *bodyTables) {
			h.PagesMapped -= uint64(t.extents[0].count)
			t.extents[0].count = 0
		}},
		{name: "overlapping extents", want: "ErrFormat", edit: func(_ *Header, t *bodyTables) {
			t.extents[1].page = t.extents[0].end() - 1
		}},
		{name: "extents out of order", want: "ErrFormat", edit: func(_ *Header, t *bodyTables) {
			t.extents[0], t.extents[1] = t.extents[1], t.extents[0]
		}},
		{name: "extent of a chunk that there is not", want: "ErrFormat", edit: last(func(e *extent) { e.chunk = 1 << 31 })},
		{name: "extent that leaves its chunk", want: "ErrFormat", edit: last(func(e *extent) { e.first++ })},
		{name: "extent whose end in the chunk overflows", want: "ErrFormat", edit: last(func(e *extent) { e.first = 1<<32 - 1 })},
		{name: "two extents that are one", want: "ErrFormat", edit: func(_ *Header, t *bodyTables) {
			e := t.extents[0]
			a, b := e, e
			a.count, b.count, b.page, b.first = 1, e.count-1, e.page+1, e.first+1
			t.extents = append([]extent{a, b}, t.extents[1:]...)
		}},
		{name: "pages mapped", want: "ErrFormat", edit: func(h *Header, _ *bodyTables) { h.PagesMapped-- }},
		{name: "blocks mapped", want: "ErrFormat", edit: func(h *Header, _ *bodyTables) { h.BlocksMapped = 1 }},
	}
}

func (m *goldenMaker) badSections() []forgery {
	section := func(edit func(s *Section)) func(*Header, *bodyTables) {
		return func(_ *Header, t *bodyTables) { edit(&t.sections[len(t.sections)-1]) }
	}
	// What is in front of the data of the last section, "golden/state" with 9 bytes.
	at := func(field int, b ...byte) func([]byte) []byte {
		return func(body []byte) []byte { return put(len(body)-9-12-16+field, b...)(body) }
	}
	return []forgery{
		{name: "section with a name that is not allowed", want: "ErrFormat", edit: section(func(s *Section) { s.Name = "golden/State" })},
		{name: "section without a name", want: "ErrFormat", edit: func(_ *Header, t *bodyTables) { t.sections[0].Name = "" }},
		{name: "section with a name of 65 bytes", want: "ErrFormat", edit: section(func(s *Section) { s.Name = strings.Repeat("z", 65) })},
		{name: "sections out of order", want: "ErrFormat", edit: section(func(s *Section) { s.Name = "a" })},
		{name: "section twice", want: "ErrFormat", edit: section(func(s *Section) { s.Name = "golden/note" })},
		{name: "flag of a section", want: "ErrFormat", raw: at(1, 2)},
		{name: "reserved bytes of a section", want: "ErrFormat", raw: at(2, 0, 1)},
		{name: "section that ends behind the body", want: "ErrFormat", raw: at(8, 10)},
		{name: "section whose end overflows", want: "ErrFormat", raw: at(8, bytes.Repeat([]byte{0xff}, 8)...)},
		{name: "bytes behind the last section", want: "ErrFormat", raw: func(b []byte) []byte { return append(b, 0) }},
		{name: "section cut off", want: "ErrFormat", raw: func(b []byte) []byte { return b[:len(b)-1] }},
	}
}

func (m *goldenMaker) badBodies() []forgery {
	number := func(at int, n uint32) func([]byte) []byte {
		return put(at, binary.LittleEndian.AppendUint32(nil, n)...)
	}
	return []forgery{
		{name: "body without its magic", want: "ErrFormat", raw: put(0, 'c')},
		{name: "body of another header", want: "ErrCorrupt", raw: put(8, bytes.Repeat([]byte{1}, 32)...)},
		{name: "body that is empty", want: "ErrFormat", raw: func(b []byte) []byte { return nil }},
		{name: "body that ends in its fixed part", want: "ErrFormat", raw: func(b []byte) []byte { return b[:63] }},
		{name: "body that ends in its tables", want: "ErrFormat", raw: func(b []byte) []byte { return b[:300] }},
		{name: "body with more packs than the header", want: "ErrFormat", raw: number(40, 2)},
		{name: "body with more chunks than bytes", want: "ErrFormat", raw: number(44, 1<<32-1)},
		{name: "body with more extents than bytes", want: "ErrFormat", raw: number(48, 1<<32-2)},
		{name: "body with too many extents", want: "ErrFormat", raw: number(48, 1<<32-1)},
		{name: "body with too many sections", want: "ErrFormat", raw: number(52, 4097)},
		{name: "reserved bytes of a body", want: "ErrFormat", raw: put(56, 1)},
	}
}

// cut is a place in a file.
type cut struct {
	name string
	at   int
}

// damages are what somebody without a key, or an accident, makes of a good snapshot.
func (m *goldenMaker) damages(id ID) {
	none := NewID()
	m.add(vector{Name: "no such snapshot", ID: none, Want: "ErrNotFound"})
	file := manifestName(id)
	damage := func(name, want string, e edit) {
		if e.File == "" {
			e.File = file
		}
		m.add(vector{Name: name, ID: id, Want: want, Edits: []edit{e}})
	}
	damage("manifest removed", "ErrNotFound", edit{Remove: true})
	m.add(vector{Name: "manifest under another id", ID: none, Want: "ErrCorrupt", Edits: []edit{{File: manifestName(none), Copy: file}}})
	m.add(vector{Name: "wrong key", ID: id, Keys: []string{"other.txt"}, Want: "ErrKey"})
	m.add(vector{Name: "no key", ID: id, Keys: []string{}, Want: "ErrKey"})

	b := readFile(m, m.ManifestPath(id))
	size := int(binary.LittleEndian.Uint32(b[12:]))
	payload := size + bytes.Index(b[size:], []byte("\n--- ")) + 5 + 43 + 1 + 16
	m.headerFields(damage)
	damage("header: its own parent", "ErrFormat", edit{At: 36, Put: id.String(), Reseal: true})
	for _, n := range []int{8, 15, 16, 103, size - 1} {
		damage(fmt.Sprintf("header cut off at %d", n), "ErrCorrupt", edit{Truncate: &n})
	}
	for _, n := range []int{0, 7} {
		damage(fmt.Sprintf("header cut off at %d", n), "ErrFormat", edit{Truncate: &n})
	}
	for _, c := range []cut{{"its start", size}, {"its age header", size + 40}, {"its payload", payload + 100}, {"its end", -1}} {
		damage("body cut off at "+c.name, "ErrCorrupt", edit{Truncate: &c.at})
	}
	for _, n := range []int{20, 36, 52, 60, 68, 76, 84, 92, 96, 104, size - 32, size - 1} {
		damage(fmt.Sprintf("bit flipped in the header, byte %d", n), "ErrCorrupt", edit{At: n, Xor: 1})
	}
	// age finds the recipient that fits before it finds out that the list of them was changed.
	damage("bit flipped in the body's recipients", "ErrCorrupt|ErrKey", edit{At: size + 40, Xor: 1})
	for _, c := range []cut{{"age version", size}, {"age MAC", payload - 40}, {"nonce", payload - 1}, {"payload", payload}, {"last byte", -1}} {
		damage("bit flipped in the body: "+c.name, "ErrCorrupt", edit{At: c.at, Xor: 1})
	}
	damage("bytes behind the body", "ErrCorrupt", edit{Append: "00"})
}

// headerFields are headers with a right checksum, and a field that is wrong.
func (m *goldenMaker) headerFields(damage func(name, want string, e edit)) {
	le := binary.LittleEndian
	u32 := func(n uint32) string { return hex.EncodeToString(le.AppendUint32(nil, n)) }
	u64 := func(n uint64) string { return hex.EncodeToString(le.AppendUint64(nil, n)) }
	damage("magic", "ErrFormat", edit{At: 0, Xor: 1})
	damage("version 0", "ErrFormat", edit{At: 8, Put: u32(0)})
	damage("version 2", "ErrVersion", edit{At: 8, Put: u32(2)})
	prefix := headerPrefix
	damage("version 2, of which nothing else is known", "ErrVersion", edit{Truncate: &prefix, At: 8, Put: u32(2)})
	for _, n := range []uint32{0, 135, 137, 136 + 16<<16 + 16, 1<<32 - 1} {
		damage(fmt.Sprintf("size of the header is %d", n), "ErrFormat", edit{At: 12, Put: u32(n)})
	}
	for _, f := range []struct {
		name, want string
		at         int
		put        string
	}{
		{"flag that an old reader must not ignore", "ErrVersion", 16, u32(1)},
		{"flags of both kinds", "ErrVersion", 16, u32(1<<31 | 1<<15)},
		{"no id", "ErrFormat", 20, u64(0) + u64(0)},
		{"creation before 1970", "ErrFormat", 52, u64(1 << 63)},
		{"RAM that is not whole pages", "ErrFormat", 60, u64(1<<18 + 1)},
		{"too much RAM", "ErrFormat", 60, u64(1<<48 + PageSize)},
		{"more pages than RAM", "ErrFormat", 84, u64(65)},
		{"packs that do not fit the size", "ErrFormat", 92, u32(2)},
		{"more blocks than disks", "ErrFormat", 96, u64(15<<36 + 1)},
		{"zero pack", "ErrFormat", 104, u64(0) + u64(0)},
		{"other RAM, with a checksum to match", "ErrCorrupt", 60, u64(1 << 20)},
	} {
		damage("header: "+f.name, f.want, edit{At: f.at, Put: f.put, Reseal: true})
	}
}

// packDamages are those of a pack of more than one segment.
func (m *goldenMaker) packDamages(id ID) {
	file := packName(m.pack(id))
	b := readFile(m, m.PackPath(m.pack(id)))
	payload := bytes.Index(b, []byte("\n--- ")) + 5 + 43 + 1 + 16
	add := func(name string, e edit) {
		e.File = file
		m.add(vector{Name: "pack: " + name, ID: id, Want: "ErrCorrupt", Edits: []edit{e}})
	}
	add("removed", edit{Remove: true})
	segment := payload + segmentBytes + segmentTag
	for _, c := range []cut{{"0", 0}, {"its age header", 40}, {"a segment", segment}, {"its end", -1}} {
		add("cut off at "+c.name, edit{Truncate: &c.at})
	}
	flips := []cut{
		{"age version", 0},
		{"recipient", 40},
		{"MAC", payload - 40},
		{"nonce", payload - 1},
		{"preamble", payload},
		{"chunk", payload + 4096},
		{"second segment", segment},
		{"last byte", -1},
	}
	for _, c := range flips {
		add("bit flipped in: "+c.name, edit{At: c.at, Xor: 1})
	}
	add("bytes behind it", edit{Append: "00"})
}
