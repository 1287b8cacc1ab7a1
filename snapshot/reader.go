package snapshot

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"runtime"
	"slices"
	"sort"
	"sync"

	"filippo.io/age"
)

// Reader reads one snapshot. All methods may be called from any number of
// goroutines.
type Reader struct {
	source *source
	header *Header
	body   *body
	size   uint64 // of the manifest file

	packs   []*packReader
	buffers sync.Pool // of *fetchBuffers for one chunk
	batches sync.Pool // of *fetchBuffers for a span

	// open is held for reading while packs are in use.
	open   sync.RWMutex
	closed bool
}

// fetchBuffers are what one Fetch or FetchBatch needs: for what is read at once, and for the pages of the snapshot's
// largest chunk.
type fetchBuffers struct{ stored, plain []byte }

// reader makes a Reader of a header and a body that belong together. size is that of the manifest.
func (s *source) reader(h *Header, b *body, size uint64) *Reader {
	r := &Reader{source: s, header: h, body: b, size: size}
	for _, p := range b.packs {
		r.packs = append(r.packs, newPackReader(s, p))
	}
	r.buffers.New = func() any {
		return &fetchBuffers{make([]byte, b.maxStored), make([]byte, int(b.maxPages)*PageSize)}
	}
	r.batches.New = func() any {
		return &fetchBuffers{make([]byte, max(uint64(b.maxStored), s.spanBytes())), make([]byte, int(b.maxPages)*PageSize)}
	}
	return r
}

// decryptBody returns the plaintext of the age file in [from, to) of f.
func decryptBody(f io.ReaderAt, from, to int64, identities []age.Identity) ([]byte, error) {
	if len(identities) == 0 {
		return nil, fmt.Errorf("%w: no identity given", ErrKey)
	}
	plain, size, err := age.DecryptReaderAt(io.NewSectionReader(f, from, to-from), to-from, markIdentities(identities)...)
	if err != nil {
		return nil, decryptError(err)
	}
	if size > math.MaxInt {
		return nil, fmt.Errorf("%w: a body of %d bytes is too large for this processor", ErrFormat, size)
	}
	b := make([]byte, size) // no larger than the file
	if err := readParallel(plain, b); err != nil {
		return nil, decryptError(err)
	}
	return b, nil
}

// readParallel fills b from the start of r, by several goroutines if it is
// large: the page map of much memory takes milliseconds to decrypt.
func readParallel(r io.ReaderAt, b []byte) error {
	const share = 512 << 10 // whole segments of age
	parts := max(1, min(runtime.GOMAXPROCS(0), len(b)/share))
	step := (len(b)/parts + share - 1) / share * share
	errs := make([]error, parts)
	var wg sync.WaitGroup
	for i := range parts {
		from := min(i*step, len(b))
		part := b[from:min(from+step, len(b))]
		if i == parts-1 {
			part = b[from:]
		}
		wg.Go(func() {
			if n, err := r.ReadAt(part, int64(from)); n < len(part) {
				errs[i] = err
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// Header returns the snapshot's header, authenticated.
func (r *Reader) Header() Header { return r.header.clone() }

// Entry returns the header and the manifest's place and size.
func (r *Reader) Entry() Entry {
	return Entry{Header: r.Header(), Path: r.source.path(manifestName(r.header.ID)), ManifestBytes: r.size}
}

// Sections returns all sections, ordered by name. The caller must not change Data.
func (r *Reader) Sections() []Section { return slices.Clone(r.body.sections) }

// ReadSection returns the section of that name, or an error wrapping ErrNotFound.
// The caller must not change Data.
func (r *Reader) ReadSection(name string) (Section, error) {
	for _, s := range r.body.sections {
		if s.Name == name {
			return s, nil
		}
	}
	return Section{}, fmt.Errorf("section %q of snapshot %v: %w", name, r.header.ID, ErrNotFound)
}

// CheckSections returns an error wrapping ErrVersion if the snapshot has a
// critical section that known does not accept. Whoever restores a machine from a
// snapshot calls it first.
func (r *Reader) CheckSections(known func(name string, version uint32) bool) error {
	for _, s := range r.body.sections {
		if s.Critical && !known(s.Name, s.Version) {
			return fmt.Errorf("snapshot %v: %w: section %q version %d is critical and not known here",
				r.header.ID, ErrVersion, s.Name, s.Version)
		}
	}
	return nil
}

// Chunks returns the number of chunks; they are numbered from 0.
func (r *Reader) Chunks() int64 { return int64(r.body.chunks.len()) }

// Lookup describes the run of guest memory around gpa that has one origin: the
// chunk that holds it, or chunk < 0 for a run that is known to be zero. start
// and length are in bytes, whole pages, and include gpa. A zero run may extend
// beyond the guest's RAM, up to DiskStride, and across holes in it. For a gpa
// from DiskStride up, length is 0.
func (r *Reader) Lookup(gpa uint64) (start, length uint64, chunk int64) {
	if gpa >= DiskStride {
		return gpa, 0, -1
	}
	run, chunk := r.body.lookup(gpa / PageSize)
	return run.page * PageSize, run.pages * PageSize, chunk
}

// run is consecutive pages of the page map that have one origin.
type run struct {
	page, pages uint64
	first       uint32 // page of the chunk that it starts with, if it is in one
}

// lookup finds the run around a page, and its chunk, which is -1 for what is in none.
func (p *body) lookup(page uint64) (run, int64) {
	t := p.extents
	n := t.len()
	after := sort.Search(n, func(i int) bool { return t.at(i).page > page })
	from := page / diskPages * diskPages
	to := from + diskPages
	if after > 0 {
		e := t.at(after - 1)
		if page < e.end() {
			return run{e.page, uint64(e.count), e.first}, int64(e.chunk)
		}
		from = max(from, e.end())
	}
	if after < n {
		to = min(to, t.at(after).page)
	}
	return run{from, to - from, 0}, -1
}

// Fetch reads and decodes a chunk and calls install for every run of guest pages
// that the snapshot takes from it, in ascending order of gpa. pages is valid only
// during the call. An error of install ends Fetch, which returns it. A chunk that
// holds nothing but blocks of disks is not even read.
//
// install must not Close the Reader. Errors of storage are a *FileError that
// names the pack; damage wraps ErrCorrupt.
func (r *Reader) Fetch(ctx context.Context, chunk int64, install func(gpa uint64, pages []byte) error) error {
	if chunk < 0 || chunk >= r.Chunks() {
		return fmt.Errorf("%w: chunk %d of %d", ErrInvalid, chunk, r.Chunks())
	}
	if err := r.enter(ctx); err != nil {
		return err
	}
	defer r.open.RUnlock()
	if !r.holdsMemory(chunk) {
		return nil
	}
	buf := r.buffers.Get().(*fetchBuffers)
	defer r.buffers.Put(buf)
	plain, err := r.decode(int(chunk), buf)
	if err != nil {
		return err
	}
	return r.install(chunk, plain, install)
}

// enter begins a use of the packs, which ends with open.RUnlock.
func (r *Reader) enter(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	r.open.RLock()
	if r.closed {
		r.open.RUnlock()
		return fmt.Errorf("snapshot %v: reader %w", r.header.ID, ErrClosed)
	}
	return nil
}

// holdsMemory says whether any guest page is in a chunk.
func (r *Reader) holdsMemory(chunk int64) bool {
	for e := range r.body.extentsOf(chunk) {
		return e.page < diskPages
	}
	return false
}

// install hands the guest pages that are taken from a chunk to a caller's function.
func (r *Reader) install(chunk int64, plain []byte, install func(gpa uint64, pages []byte) error) error {
	for e := range r.body.extentsOf(chunk) {
		if e.page >= diskPages {
			break
		}
		from, size := int(e.first)*PageSize, int(e.count)*PageSize
		if err := install(e.page*PageSize, plain[from:from+size:from+size]); err != nil {
			return err
		}
	}
	return nil
}

// decode returns the pages of a chunk, in buf.
func (r *Reader) decode(chunk int, buf *fetchBuffers) ([]byte, error) {
	c := r.body.chunks.at(chunk)
	stored := buf.stored[:c.length]
	if err := r.packs[c.pack].readAt(stored, c.offset); err != nil {
		return nil, err
	}
	return r.unpack(c, stored, buf.plain)
}

// unpack returns the pages of a chunk of which the stored bytes have been read, in these or in buf.
func (r *Reader) unpack(c chunkRecord, stored, buf []byte) ([]byte, error) {
	plain, err := decodeChunk(c, stored, buf)
	if err != nil {
		return nil, &FileError{Op: "decode chunk", Path: r.packs[c.pack].path, Offset: int64(c.offset), Err: err}
	}
	return plain, nil
}

// Runs are the runs of guest memory that the snapshot takes from a chunk, as Fetch would install them.
func (r *Reader) Runs(chunk int64) (runs []Range) {
	if chunk < 0 || chunk >= r.Chunks() {
		return nil
	}
	for e := range r.body.extentsOf(chunk) {
		if e.page < diskPages {
			runs = append(runs, Range{e.page * PageSize, uint64(e.count) * PageSize})
		}
	}
	return runs
}

// Close closes the packs, after it has waited for calls of Fetch, FetchBatch and Verify. What
// needs no packs can still be called. Close may be called again.
func (r *Reader) Close() error {
	r.open.Lock()
	defer r.open.Unlock()
	r.closed = true
	var first error
	for _, p := range r.packs {
		if err := p.close(); err != nil && first == nil {
			first = err
		}
	}
	return first
}
