package snapshot

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"iter"
	"runtime"
	"slices"
	"strings"
	"sync"
)

const (
	bodyMagic      = "CRYOBODY"
	bodyFixed      = 64 // bytes before the first table
	packRecBytes   = 128
	chunkRecBytes  = 24
	extentRecBytes = 20
	sectionFixed   = 16

	identityBytes  = 74 // "AGE-SECRET-KEY-1" and 58 characters of Bech32
	identityPrefix = "AGE-SECRET-KEY-1"
	bech32Chars    = "QPZRY9X8GF2TVDW0S3JN54KHCE6MUA7L" // BIP 173

	sectionCritical = 1 // the only section flag of version 1
)

// Section is a named, versioned piece of data that the caller stores with the
// memory: guest configuration, vCPU state, device state. This package does not
// look into Data.
type Section struct {
	// Name is 1 to 64 of a-z, 0-9, '.', '-', '_' and '/', and unique.
	Name    string
	Version uint32
	// Critical means that a reader which does not know the section must refuse
	// the snapshot; see [Reader.CheckSections].
	Critical bool
	Data     []byte
}

// packRecord is what the body says of a pack.
type packRecord struct {
	id        ID
	origin    ID     // the snapshot that wrote it
	plainSize uint64 // of the plaintext, preamble included
	fileSize  uint64 // of the file
	identity  string // the age secret key that opens it
}

// chunkRecord is what the body says of a chunk.
type chunkRecord struct {
	offset uint64 // in the pack's plaintext
	pack   uint32 // index into the pack table
	length uint32 // stored bytes
	pages  uint32 // guest pages that it decodes to
	codec  Codec
}

// end is where the chunk ends in the pack's plaintext.
func (c chunkRecord) end() uint64 { return c.offset + uint64(c.length) }

// extent maps a run of guest pages to consecutive pages of a chunk.
type extent struct {
	page  uint64 // guest page: GPA / PageSize
	count uint32 // pages
	chunk uint32 // index into the chunk table
	first uint32 // page of the chunk that the run starts with
}

func (e extent) end() uint64 { return e.page + uint64(e.count) }

// continues reports whether e goes on exactly where p stops, in the guest and in the chunk.
func (e extent) continues(p extent) bool {
	return e.page == p.end() && e.chunk == p.chunk && e.first == p.first+p.count && e.page%diskPages != 0
}

// chunkTable and extentTable are tables as they are in the body. They are read
// in place: opening a snapshot builds nothing that grows with the guest's memory,
// and the first Fetch only the reverse index.
type (
	chunkTable  []byte
	extentTable []byte
)

func (t chunkTable) len() int { return len(t) / chunkRecBytes }

func (t chunkTable) at(i int) chunkRecord {
	b := t[i*chunkRecBytes:][:chunkRecBytes]
	le := binary.LittleEndian
	return chunkRecord{
		offset: le.Uint64(b),
		pack:   le.Uint32(b[8:]),
		length: le.Uint32(b[12:]),
		pages:  le.Uint32(b[16:]),
		codec:  Codec(le.Uint32(b[20:])),
	}
}

func (t extentTable) len() int { return len(t) / extentRecBytes }

func (t extentTable) at(i int) extent {
	b := t[i*extentRecBytes:][:extentRecBytes]
	le := binary.LittleEndian
	return extent{
		page:  le.Uint64(b),
		count: le.Uint32(b[8:]),
		chunk: le.Uint32(b[12:]),
		first: le.Uint32(b[16:]),
	}
}

// all returns the table as a slice of structs.
func (t extentTable) all() []extent {
	out := make([]extent, t.len())
	for i := range out {
		out[i] = t.at(i)
	}
	return out
}

func (t chunkTable) all() []chunkRecord {
	out := make([]chunkRecord, t.len())
	for i := range out {
		out[i] = t.at(i)
	}
	return out
}

// body is the plaintext of a manifest's encrypted part, parsed and checked.
type body struct {
	digest   [sha256.Size]byte // of the header that it belongs to
	packs    []packRecord
	chunks   chunkTable
	extents  extentTable
	sections []Section // Data points into the parsed bytes
	mapped   uint64    // guest pages that are not zero
	blocks   uint64    // blocks of disks

	maxStored, maxPages uint32 // of any chunk

	// The extents of chunk c are head[c], next[head[c]], ... until none, ascending, once index has returned.
	head, next []uint32
	indexing   sync.Once
}

const none = ^uint32(0)

// bodyTables are the body's parts in the form in which a Writer has them.
type bodyTables struct {
	digest   [sha256.Size]byte
	packs    []packRecord
	chunks   []chunkRecord
	extents  []extent
	sections []Section
}

// marshal returns the body's bytes.
func (t *bodyTables) marshal() []byte {
	size := bodyFixed + len(t.packs)*packRecBytes + len(t.chunks)*chunkRecBytes + len(t.extents)*extentRecBytes
	for _, s := range t.sections {
		size += sectionFixed + len(s.Name) + len(s.Data)
	}
	le := binary.LittleEndian
	b := make([]byte, 0, size)
	b = append(b, bodyMagic...)
	b = append(b, t.digest[:]...)
	b = le.AppendUint32(b, uint32(len(t.packs)))
	b = le.AppendUint32(b, uint32(len(t.chunks)))
	b = le.AppendUint32(b, uint32(len(t.extents)))
	b = le.AppendUint32(b, uint32(len(t.sections)))
	b = le.AppendUint64(b, 0) // reserved
	for _, p := range t.packs {
		b = p.append(b)
	}
	for _, c := range t.chunks {
		b = le.AppendUint64(b, c.offset)
		b = le.AppendUint32(b, c.pack)
		b = le.AppendUint32(b, c.length)
		b = le.AppendUint32(b, c.pages)
		b = le.AppendUint32(b, uint32(c.codec))
	}
	for _, e := range t.extents {
		b = le.AppendUint64(b, e.page)
		b = le.AppendUint32(b, e.count)
		b = le.AppendUint32(b, e.chunk)
		b = le.AppendUint32(b, e.first)
	}
	for _, s := range t.sections {
		b = s.append(b)
	}
	return b
}

func (p *packRecord) append(b []byte) []byte {
	b = append(b, p.id[:]...)
	b = append(b, p.origin[:]...)
	b = binary.LittleEndian.AppendUint64(b, p.plainSize)
	b = binary.LittleEndian.AppendUint64(b, p.fileSize)
	b = append(b, p.identity...)
	return append(b, make([]byte, packRecBytes-48-identityBytes)...)
}

func (s *Section) append(b []byte) []byte {
	flags := byte(0)
	if s.Critical {
		flags = sectionCritical
	}
	b = append(b, byte(len(s.Name)), flags, 0, 0)
	b = binary.LittleEndian.AppendUint32(b, s.Version)
	b = binary.LittleEndian.AppendUint64(b, uint64(len(s.Data)))
	b = append(b, s.Name...)
	return append(b, s.Data...)
}

// parseBody parses and checks a body. The result keeps b.
func parseBody(b []byte) (*body, error) {
	if len(b) < bodyFixed || !bytes.HasPrefix(b, []byte(bodyMagic)) {
		return nil, parseError(ErrFormat, "body", 0, "does not start with the magic number, or is too short")
	}
	le := binary.LittleEndian
	packs, chunks := uint64(le.Uint32(b[40:])), uint64(le.Uint32(b[44:]))
	extents, sections := uint64(le.Uint32(b[48:])), uint64(le.Uint32(b[52:]))
	if le.Uint64(b[56:]) != 0 {
		return nil, parseError(ErrFormat, "body", 56, "reserved bytes are not zero")
	}
	if packs > maxPacks || sections > maxSections {
		return nil, parseError(ErrFormat, "body", 40, "%d packs and %d sections are too many", packs, sections)
	}
	// The counts are 32 bits, so these sums can't overflow 64 bits.
	chunksAt := bodyFixed + packs*packRecBytes
	extentsAt := chunksAt + chunks*chunkRecBytes
	sectionsAt := extentsAt + extents*extentRecBytes
	if sectionsAt > uint64(len(b)) {
		return nil, parseError(ErrFormat, "body", 40, "tables of %d bytes in a body of %d", sectionsAt, len(b))
	}
	p := &body{
		digest:  [sha256.Size]byte(b[8:40]),
		chunks:  chunkTable(b[chunksAt:extentsAt]),
		extents: extentTable(b[extentsAt:sectionsAt]),
	}
	var err error
	if p.packs, err = parsePacks(b[bodyFixed:chunksAt]); err != nil {
		return nil, err
	}
	if err := p.checkTables(int(chunksAt), int(extentsAt)); err != nil {
		return nil, err
	}
	if p.sections, err = parseSections(b, int(sectionsAt), int(sections)); err != nil {
		return nil, err
	}
	return p, nil
}

// parsePacks parses the pack table, which starts at byte bodyFixed of the body.
func parsePacks(b []byte) ([]packRecord, error) {
	packs := make([]packRecord, 0, len(b)/packRecBytes)
	le := binary.LittleEndian
	for at := 0; at < len(b); at += packRecBytes {
		r := b[at:][:packRecBytes]
		p := packRecord{
			id:        ID(r[0:16]),
			origin:    ID(r[16:32]),
			plainSize: le.Uint64(r[32:]),
			fileSize:  le.Uint64(r[40:]),
			identity:  string(r[48 : 48+identityBytes]),
		}
		off := bodyFixed + at
		switch {
		case p.id.IsZero() || p.origin.IsZero():
			return nil, parseError(ErrFormat, "body", off, "pack without an id or an origin")
		case len(packs) > 0 && bytes.Compare(packs[len(packs)-1].id[:], p.id[:]) >= 0:
			return nil, parseError(ErrFormat, "body", off, "pack ids are not ascending")
		case p.plainSize <= preambleBytes || p.fileSize <= p.plainSize || p.fileSize > maxFileBytes:
			return nil, parseError(ErrFormat, "body", off+32, "pack sizes %d and %d are impossible", p.plainSize, p.fileSize)
		case !strings.HasPrefix(p.identity, identityPrefix) || strings.Trim(p.identity[len(identityPrefix):], bech32Chars) != "":
			return nil, parseError(ErrFormat, "body", off+48, "pack key is not an age X25519 secret key")
		case !allZero(r[48+identityBytes:]):
			return nil, parseError(ErrFormat, "body", off+48+identityBytes, "reserved bytes are not zero")
		}
		packs = append(packs, p)
	}
	return packs, nil
}

// share is how many records of a table are worth a goroutine: a tenth of a millisecond.
const share = 1 << 14

// shares is how many goroutines are to check n records.
func shares(n int) int { return max(1, min(runtime.GOMAXPROCS(0), n/share)) }

// checkTables checks the tables of chunks and of extents, which start at bytes chunksAt and extentsAt of the body, in
// parts and at the same time, as the page map of much memory takes milliseconds.
func (p *body) checkTables(chunksAt, extentsAt int) error {
	chunks := make([]chunkCheck, shares(p.chunks.len()))
	extents := make([]extentCheck, shares(p.extents.len()))
	var wg sync.WaitGroup
	for i := range chunks {
		n := p.chunks.len()
		wg.Go(func() { chunks[i] = p.checkChunks(chunksAt, n*i/len(chunks), n*(i+1)/len(chunks)) })
	}
	for i := range extents {
		n := p.extents.len()
		wg.Go(func() { extents[i] = p.checkExtents(extentsAt, n*i/len(extents), n*(i+1)/len(extents)) })
	}
	wg.Wait()
	if err := p.joinChunks(chunks, chunksAt); err != nil {
		return err
	}
	return p.joinExtents(extents, extentsAt)
}

// chunkCheck is what was found in a part of the chunk table.
type chunkCheck struct {
	err                 error
	maxStored, maxPages uint32
}

// checkChunks checks chunks from up to to of the table, which starts at byte base of
// the body: ordered by pack and offset, without overlaps, inside the packs.
func (p *body) checkChunks(base, from, to int) (found chunkCheck) {
	pack, end := int64(-1), uint64(0)
	if from > 0 {
		before := p.chunks.at(from - 1)
		pack, end = int64(before.pack), before.offset+uint64(before.length)
	}
	if pack >= int64(len(p.packs)) {
		return found // whoever checks that chunk says so
	}
	for i := from; i < to; i++ {
		c, off := p.chunks.at(i), base+i*chunkRecBytes
		if int64(c.pack) != pack {
			if int64(c.pack) != pack+1 || int64(c.pack) >= int64(len(p.packs)) {
				found.err = parseError(ErrFormat, "body", off+8, "chunk %d is in pack %d of %d, out of order", i, c.pack, len(p.packs))
				return found
			}
			pack, end = int64(c.pack), preambleBytes
		}
		size := p.packs[pack].plainSize
		if c.offset < end || c.offset > size || uint64(c.length) > size-c.offset {
			found.err = parseError(ErrFormat, "body", off, "chunk %d overlaps the one before it or leaves its pack", i)
			return found
		}
		end = c.offset + uint64(c.length)
		if err := c.checkSize(); err != nil {
			found.err = parseError(ErrFormat, "body", off+12, "chunk %d: %v", i, err)
			return found
		}
		found.maxStored, found.maxPages = max(found.maxStored, c.length), max(found.maxPages, c.pages)
	}
	return found
}

// joinChunks is the end of the check of chunks: every pack is used. Of several errors the first counts.
func (p *body) joinChunks(parts []chunkCheck, base int) error {
	for _, part := range parts {
		if part.err != nil {
			return part.err
		}
		p.maxStored, p.maxPages = max(p.maxStored, part.maxStored), max(p.maxPages, part.maxPages)
	}
	used := 0
	if n := p.chunks.len(); n > 0 {
		used = int(p.chunks.at(n-1).pack) + 1
	}
	if used != len(p.packs) {
		return parseError(ErrFormat, "body", base, "pack %d holds no chunk", used)
	}
	return nil
}

// extentCheck is what was found in a part of the extent table.
type extentCheck struct {
	err            error
	mapped, blocks uint64
	used           []bool // by chunk
}

// checkExtents checks extents from up to to of the table, which starts at byte base of the body, from the last to the
// first: ascending, not overlapping, inside the chunks, nothing that could be one extent given as two.
func (p *body) checkExtents(base, from, to int) extentCheck {
	used := make([]bool, p.chunks.len())
	mapped, blocks := uint64(0), uint64(0)
	after := extent{page: MaxAddress / PageSize, chunk: none}
	if to < p.extents.len() {
		after = p.extents.at(to)
	}
	for i := to - 1; i >= from; i-- {
		e := p.extents.at(i)
		off := base + i*extentRecBytes
		var err error
		switch {
		case e.count == 0 || e.page > after.page || uint64(e.count) > after.page-e.page:
			err = parseError(ErrFormat, "body", off, "extent %d is empty, or overlaps or follows the next", i)
		case e.page/diskPages != (e.end()-1)/diskPages:
			err = parseError(ErrFormat, "body", off, "extent %d is in two address spaces", i)
		case int64(e.chunk) >= int64(len(used)):
			err = parseError(ErrFormat, "body", off+12, "extent %d is in chunk %d of %d", i, e.chunk, len(used))
		case after.continues(e):
			err = parseError(ErrFormat, "body", off, "extents %d and %d should be one", i, i+1)
		case uint64(e.first)+uint64(e.count) > uint64(p.chunks.pages(int(e.chunk))):
			err = parseError(ErrFormat, "body", off+16, "extent %d leaves its chunk", i)
		}
		if err != nil {
			return extentCheck{err: err}
		}
		used[e.chunk] = true
		if e.page < diskPages {
			mapped += uint64(e.count)
		} else {
			blocks += uint64(e.count)
		}
		after = e
	}
	return extentCheck{mapped: mapped, blocks: blocks, used: used}
}

// joinExtents is the end of the check of extents: every chunk is used. Of several errors the last counts.
func (p *body) joinExtents(parts []extentCheck, base int) error {
	if n := p.extents.len(); uint64(n) >= uint64(none) {
		return parseError(ErrFormat, "body", 48, "%d extents are too many", n)
	}
	used := make([]bool, p.chunks.len())
	for _, part := range slices.Backward(parts) {
		if part.err != nil {
			return part.err
		}
		p.mapped, p.blocks = p.mapped+part.mapped, p.blocks+part.blocks
		for i, u := range part.used {
			used[i] = used[i] || u
		}
	}
	unused := 0
	for _, u := range used {
		if !u {
			unused++
		}
	}
	if unused != 0 {
		return parseError(ErrFormat, "body", base, "%d chunks hold no page", unused)
	}
	return nil
}

// index builds the reverse index, once.
func (p *body) index() {
	p.indexing.Do(func() {
		p.head, p.next = make([]uint32, p.chunks.len()), make([]uint32, p.extents.len())
		for i := range p.head {
			p.head[i] = none
		}
		for i := len(p.next) - 1; i >= 0; i-- { // backwards, so that the lists come out ascending
			chunk := p.extents.chunk(i)
			p.next[i], p.head[chunk] = p.head[chunk], uint32(i)
		}
	})
}

// extentsOf yields the extents of a chunk, ascending.
func (p *body) extentsOf(chunk int64) iter.Seq[extent] {
	p.index()
	return func(yield func(extent) bool) {
		for i := p.head[chunk]; i != none && yield(p.extents.at(int(i))); i = p.next[i] {
		}
	}
}

// chunk is the field of a record that the index needs.
func (t extentTable) chunk(i int) uint32 {
	return binary.LittleEndian.Uint32(t[i*extentRecBytes+12:])
}

// pages is the field of a record that the check of every extent needs.
func (t chunkTable) pages(i int) uint32 {
	return binary.LittleEndian.Uint32(t[i*chunkRecBytes+16:])
}

// parseSections parses n sections that fill b from offset at to its end.
func parseSections(b []byte, at, n int) ([]Section, error) {
	var out []Section
	for i := range n {
		if len(b)-at < sectionFixed {
			return nil, parseError(ErrFormat, "body", at, "section %d is cut off", i)
		}
		r := b[at:]
		s := Section{Version: binary.LittleEndian.Uint32(r[4:]), Critical: r[1] == sectionCritical}
		nameLen, dataLen := int(r[0]), binary.LittleEndian.Uint64(r[8:])
		if r[1] > sectionCritical || r[2] != 0 || r[3] != 0 {
			return nil, parseError(ErrFormat, "body", at+1, "section %d has unknown flags", i)
		}
		rest := r[sectionFixed:]
		if nameLen > len(rest) || dataLen > uint64(len(rest)-nameLen) {
			return nil, parseError(ErrFormat, "body", at, "section %d is cut off", i)
		}
		s.Name = string(rest[:nameLen])
		end := nameLen + int(dataLen)
		s.Data = rest[nameLen:end:end]
		if !validSectionName(s.Name) || i > 0 && out[i-1].Name >= s.Name {
			return nil, parseError(ErrFormat, "body", at, "section name %q is invalid or out of order", s.Name)
		}
		out = append(out, s)
		at += sectionFixed + end
	}
	if at != len(b) {
		return nil, parseError(ErrFormat, "body", at, "%d bytes after the last section", len(b)-at)
	}
	return out, nil
}

func validSectionName(s string) bool {
	return s != "" && len(s) <= maxSectionName &&
		strings.Trim(s, "abcdefghijklmnopqrstuvwxyz0123456789.-_/") == ""
}

// checkHeader checks what the header and the body say of each other. b is the
// header's bytes. It is what makes the header trustworthy.
func (p *body) checkHeader(h *Header, b []byte) error {
	if !bytes.Equal(p.digest[:], headerDigest(b)) {
		return parseError(ErrCorrupt, "header", len(b)-digestBytes, "is not the one that was written with this body")
	}
	ids := make([]ID, 0, len(p.packs))
	own := uint64(0)
	for _, r := range p.packs {
		ids = append(ids, r.id)
		if r.origin == h.ID {
			if own += r.fileSize; own < r.fileSize {
				return parseError(ErrFormat, "body", bodyFixed, "the packs' sizes add up to more than 2^64")
			}
		} else if h.Parent.IsZero() {
			return parseError(ErrFormat, "body", bodyFixed, "a snapshot without a parent has another's pack %v", r.id)
		}
	}
	switch {
	case !slices.Equal(ids, h.Packs):
		return parseError(ErrFormat, "header", headerFixed, "pack list is not the body's")
	case own != h.PackBytes:
		return parseError(ErrFormat, "header", 68, "%d bytes in packs, the body says %d", h.PackBytes, own)
	case p.mapped != h.PagesMapped:
		return parseError(ErrFormat, "header", 84, "%d pages mapped, the body says %d", h.PagesMapped, p.mapped)
	case p.blocks != h.BlocksMapped:
		return parseError(ErrFormat, "header", 96, "%d blocks mapped, the body says %d", h.BlocksMapped, p.blocks)
	}
	return nil
}

func allZero(b []byte) bool {
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}
