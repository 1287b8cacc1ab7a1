package snapshot

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"filippo.io/age"
)

// DefaultChunkSize is how many bytes of guest memory share a chunk unless the
// caller chooses otherwise: the unit of compression and of a fetch. It is a
// compromise between the two. BenchmarkWrite and BenchmarkFetch, on realistic
// memory, 2 processors:
//
//	chunk    pause, CPU s/GiB    ratio    fetch, p50
//	 64 KiB  0.86                3.04      66 us
//	128 KiB  0.86                3.06     104 us
//	256 KiB  0.86                3.08     176 us
//
// A guest that resumes touches memory in runs: with chunks of 64 KiB it meets more
// faults, and its first sign comes no sooner.
const DefaultChunkSize = 128 << 10

// diskChunkSize is the most that blocks of disks have in common, in bytes: they are
// read at random (BenchmarkDisk/snapshot-1/read4k: 44 us, 61 us with 128 KiB).
const diskChunkSize = 64 << 10

// MaxChunkSize is the largest chunk size that the format allows, in bytes.
const MaxChunkSize = maxChunkPages * PageSize

// Options say how a snapshot is written.
type Options struct {
	// Recipients are who can open the snapshot; at least one. Those that age does not
	// take together are ErrRecipients: from Create if that can be told without
	// asking a plugin, else from Commit, when they are used.
	Recipients []age.Recipient
	// Parent, if not nil, makes the snapshot a diff: what Write does not
	// write is as it is in the parent, which must be in the same store. It may
	// be closed, but its packs must still be there when the Writer commits.
	Parent *Reader
	// Workers is how many goroutines compress and encrypt, each into its own
	// pack. 0 means GOMAXPROCS, at most 8.
	Workers int
	// ChunkSize in bytes of guest memory, whole pages up to MaxChunkSize; 0
	// means DefaultChunkSize. Disks have chunks of 64 KiB, or of this if it is less.
	ChunkSize int
	// Codec is how chunks are compressed, where that makes them smaller; 0
	// means CodecLZ4.
	Codec Codec
	// Progress, if not nil, is told how many of the bytes that a call of Write was asked to
	// write are done. It is called from one goroutine at a
	// time and should return soon.
	Progress func(done, total uint64)
}

// Info says what a Writer stored.
type Info struct {
	ID          ID     `json:"id"`
	RAMBytes    uint64 `json:"ram_bytes"`
	StoredBytes uint64 `json:"stored_bytes"` // on disk: the manifest and the packs that this snapshot wrote
	PagesStored uint64 `json:"pages_stored"` // guest pages written to its packs
	ZeroPages   uint64 `json:"zero_pages"`   // guest pages given to Write that were zero
	DiskBlocks  uint64 `json:"disk_blocks"`  // blocks of disks, of PageSize, written to its packs
	Chunks      int    `json:"chunks"`       // in the page map, ancestors' included

	// What the stages took. The first three are sums over the workers, so they
	// may exceed the time that passed.
	Scan     time.Duration `json:"scan_ns"`     // looking at pages: zero or not
	Compress time.Duration `json:"compress_ns"` // LZ4
	Seal     time.Duration `json:"seal_ns"`     // encryption, and writing to the packs
	Sync     time.Duration `json:"sync_ns"`     // packs to stable storage
	Manifest time.Duration `json:"manifest_ns"` // making, writing and syncing the manifest
}

// Writer writes one snapshot. Its methods may be called from any goroutine; they
// wait for each other. After an error, Abort is all that is left to do.
type Writer struct {
	store *Store
	opts  Options
	id    ID
	key   *age.X25519Identity // opens the packs

	mu       sync.Mutex
	err      error // why the Writer can't be used any more
	ended    bool  // committed or aborted
	workers  []*worker
	sections []Section
	ram      uint64
	wrote    bool
	linked   []string // packs that have their final names, until the manifest has

	// The page map so far. chunks[i].pack counts the parent's packs first, then
	// the workers'.
	inherited []packRecord
	chunks    []chunkRecord
	extents   []extent
	zeros     *extent // a chunk of zero pages, if there is one: first is 0
	info      Info

	// What was committed.
	header *Header
	tables *bodyTables
}

// Create starts a snapshot. The caller must call Abort, or Commit with success;
// calling Abort after Commit does nothing, so it can be deferred.
func (s *Store) Create(ctx context.Context, opts Options) (*Writer, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if err := opts.complete(); err != nil {
		return nil, err
	}
	if opts.Parent != nil && !opts.Parent.source.isDir(s.dir) {
		return nil, fmt.Errorf("%w: the parent, %s, is not in store %s", ErrInvalid, opts.Parent.Entry().Path, s.dir)
	}
	key, err := age.GenerateX25519Identity()
	if err != nil {
		return nil, err
	}
	if err := s.makeDirs(); err != nil {
		return nil, err
	}
	w := &Writer{store: s, opts: opts, id: NewID(), key: key}
	if p := opts.Parent; p != nil {
		w.inherited = p.body.packs
		w.chunks, w.extents = p.body.chunks.all(), p.body.extents.all()
		w.ram = p.header.RAMBytes
	}
	return w, nil
}

// complete checks the options and fills in the defaults.
func (o *Options) complete() error {
	if err := checkRecipients(o.Recipients); err != nil {
		return err
	}
	o.Recipients = slices.Clone(o.Recipients)
	if o.Workers <= 0 {
		o.Workers = min(runtime.GOMAXPROCS(0), 8)
	}
	o.Workers = min(o.Workers, maxWorkers)
	if o.ChunkSize == 0 {
		o.ChunkSize = DefaultChunkSize
	}
	if o.Codec == 0 {
		o.Codec = CodecLZ4
	}
	if o.Codec != CodecLZ4 && o.Codec != CodecStored {
		return fmt.Errorf("%w: %v", ErrInvalid, o.Codec)
	}
	if o.ChunkSize < PageSize || o.ChunkSize > MaxChunkSize || o.ChunkSize%PageSize != 0 {
		return fmt.Errorf("%w: chunk size %d is not whole pages up to %d", ErrInvalid, o.ChunkSize, MaxChunkSize)
	}
	return nil
}

const maxWorkers = 256

// ID returns the id that the snapshot will have.
func (w *Writer) ID() ID { return w.id }

// AddSection adds a section. The Writer keeps s.Data, which must not change
// before Commit.
func (w *Writer) AddSection(s Section) error {
	if err := w.enter(); err != nil {
		return err
	}
	defer w.mu.Unlock()
	switch {
	case !validSectionName(s.Name):
		return fmt.Errorf("%w: section name %q", ErrInvalid, s.Name)
	case len(w.sections) == maxSections:
		return fmt.Errorf("%w: more than %d sections", ErrInvalid, maxSections)
	case slices.ContainsFunc(w.sections, func(o Section) bool { return o.Name == s.Name }):
		return fmt.Errorf("%w: second section %q", ErrInvalid, s.Name)
	}
	w.sections = append(w.sections, s)
	return nil
}

// enter locks the Writer if it can still be used.
func (w *Writer) enter() error {
	w.mu.Lock()
	err := w.err
	if w.ended {
		err = fmt.Errorf("snapshot %v: writer %w", w.id, ErrClosed)
	}
	if err != nil {
		w.mu.Unlock()
	}
	return err
}

// Commit makes the snapshot durable and then visible, in this order. Without an
// error it is complete and on stable storage; with one, nothing of it is left.
// Cancelling ctx stops it between steps.
func (w *Writer) Commit(ctx context.Context) (Info, error) {
	if err := w.enter(); err != nil {
		return Info{}, err
	}
	defer w.mu.Unlock()
	if err := w.commit(ctx); err != nil {
		w.err = err
		return Info{}, errors.Join(err, w.discard())
	}
	_ = w.discard() // what it leaves is Collect's; the snapshot is there
	return w.info, nil
}

func (w *Writer) commit(ctx context.Context) error {
	if !w.wrote {
		return fmt.Errorf("%w: WriteMemory was not called", ErrInvalid)
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	began := time.Now()
	if err := w.finishPacks(); err != nil {
		return err
	}
	w.info.Sync = time.Since(began)
	began = time.Now()
	header, tables := w.makeTables()
	manifest, err := w.stageManifest(header, tables)
	if err != nil {
		return fileError("write manifest", w.store.ManifestPath(w.id), err)
	}
	defer manifest.Discard() //nolint:errcheck // does nothing after Publish
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := w.publish(header, manifest); err != nil {
		return err
	}
	w.info.Manifest = time.Since(began)
	w.header, w.tables = header, tables
	return nil
}

// finishPacks ends and syncs all packs, at the same time.
func (w *Writer) finishPacks() error {
	errs := make([]error, len(w.workers))
	var wg sync.WaitGroup
	for i, k := range w.workers {
		if k.pack == nil {
			continue
		}
		wg.Go(func() {
			if err := k.pack.finish(); err != nil {
				errs[i] = fileError("write pack", w.store.PackPath(k.pack.id), err)
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// makeTables returns the header and the body in canonical form.
func (w *Writer) makeTables() (*Header, *bodyTables) {
	packs := slices.Clone(w.inherited)
	for _, k := range w.workers {
		p := packRecord{origin: w.id, identity: w.key.String()}
		if k.pack != nil {
			p.id, p.plainSize, p.fileSize = k.pack.id, k.pack.offset, k.pack.sink.n
		}
		packs = append(packs, p)
	}
	t := &bodyTables{sections: w.sections}
	t.packs, t.chunks, t.extents = compact(packs, w.chunks, w.extents)
	slices.SortFunc(t.sections, func(a, b Section) int { return strings.Compare(a.Name, b.Name) })
	h := &Header{
		Version:     Version,
		ID:          w.id,
		Created:     time.Now().UTC().Round(0), // as it is read back: without the monotonic clock
		RAMBytes:    w.ram,
		PagesStored: w.info.PagesStored + w.info.DiskBlocks,
	}
	if w.opts.Parent != nil {
		h.Parent = w.opts.Parent.header.ID
	}
	for _, p := range t.packs {
		h.Packs = append(h.Packs, p.id)
		if p.origin == w.id {
			h.PackBytes += p.fileSize
		}
	}
	for _, e := range t.extents {
		if e.page < diskPages {
			h.PagesMapped += uint64(e.count)
		} else {
			h.BlocksMapped += uint64(e.count)
		}
	}
	w.info.ID, w.info.RAMBytes, w.info.Chunks = w.id, w.ram, len(t.chunks)
	return h, t
}

// stageManifest writes and syncs the manifest, still without a name.
func (w *Writer) stageManifest(h *Header, t *bodyTables) (stagedFile, error) {
	if len(t.packs) > maxPacks || uint64(len(t.extents)) >= uint64(none) {
		return nil, fmt.Errorf("%w: %d packs and %d extents are more than the format allows; take a full snapshot",
			ErrInvalid, len(t.packs), len(t.extents))
	}
	if h.PagesMapped > h.RAMBytes/PageSize {
		return nil, fmt.Errorf("%w: %d pages written of a guest memory of %d bytes", ErrInvalid, h.PagesMapped, h.RAMBytes)
	}
	raw := h.marshal()
	t.digest = [sha256.Size]byte(headerDigest(raw))
	f, size, err := w.store.stageManifest(raw, t.marshal(), w.opts.Recipients)
	w.info.StoredBytes = size
	return f, err
}

// publish gives the packs and then the manifest their names. The lock keeps
// Collect and Delete from taking the packs for garbage in between.
func (w *Writer) publish(h *Header, manifest stagedFile) error {
	s := w.store
	unlock, err := s.lock(false)
	if err != nil {
		return err
	}
	defer unlock()
	if err := w.publishPacks(h); err != nil {
		return err
	}
	path := s.ManifestPath(w.id)
	if err := manifest.Publish(path); err != nil {
		return errors.Join(fileError("publish", path, err), w.unpublish(path, err))
	}
	if err := s.files.SyncDir(s.manifests()); err != nil {
		// Nobody may rely on a name that a crash can take back.
		return errors.Join(fileError("sync", s.manifests(), err), w.unpublish(path, err))
	}
	w.info.StoredBytes += h.PackBytes
	w.linked = nil
	return nil
}

// unpublish takes the manifest's name back, if it has got one in spite of the error because. If a manifest stays, or a crash
// can bring it back, it must keep its packs; Collect looks again.
func (w *Writer) unpublish(path string, because error) error {
	if errors.Is(because, ErrExists) { // somebody else's
		return nil
	}
	err := w.store.files.Remove(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err == nil {
		err = w.store.files.SyncDir(w.store.manifests())
	}
	if err != nil {
		w.linked = nil
	}
	return err
}

// publishPacks names the packs that the manifest needs, drops the others, and
// checks that those of the ancestors are still there.
func (w *Writer) publishPacks(h *Header) error {
	s := w.store
	needed := make(map[ID]bool, len(h.Packs))
	for _, id := range h.Packs {
		needed[id] = true
	}
	for _, p := range w.inherited {
		if !needed[p.id] {
			continue
		}
		path := s.PackPath(p.id)
		fi, err := s.files.Stat(path)
		if err == nil && uint64(fi.Size()) != p.fileSize {
			err = fmt.Errorf("%w: pack has %d bytes, not %d", ErrCorrupt, fi.Size(), p.fileSize)
		}
		if err != nil {
			return fileError("find the parent's pack", path, err)
		}
	}
	for _, k := range w.workers {
		if k.pack == nil || !needed[k.pack.id] {
			continue // discarded when the Writer ends
		}
		path := s.PackPath(k.pack.id)
		err := k.pack.file.Publish(path)
		if !errors.Is(err, ErrExists) {
			w.linked = append(w.linked, path) // perhaps in spite of an error
		}
		if err != nil {
			return fileError("publish", path, err)
		}
	}
	if len(w.linked) == 0 {
		return nil
	}
	if err := s.files.SyncDir(s.packs()); err != nil {
		return fileError("sync", s.packs(), err)
	}
	return nil
}

// Reader opens the snapshot that was committed: whoever wrote it needs no identity for that. The caller must Close it.
func (w *Writer) Reader() (*Reader, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.header == nil {
		return nil, fmt.Errorf("%w: snapshot %v was not committed", ErrInvalid, w.id)
	}
	b, err := parseBody(w.tables.marshal())
	if err != nil {
		return nil, err
	}
	return w.store.source().reader(w.header, b, w.info.StoredBytes-w.header.PackBytes), nil
}

// Abort ends the Writer and removes everything that it wrote. After Commit has
// succeeded, or a second time, it does nothing.
func (w *Writer) Abort() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.ended {
		return nil
	}
	return w.discard()
}

// discard removes what was not committed and releases everything.
func (w *Writer) discard() error {
	w.ended = true
	var errs []error
	for _, k := range w.workers {
		if k.pack != nil {
			errs = append(errs, k.pack.file.Discard())
		}
	}
	for _, path := range w.linked {
		if err := w.store.files.Remove(path); !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	w.workers, w.linked = nil, nil
	return errors.Join(errs...)
}
