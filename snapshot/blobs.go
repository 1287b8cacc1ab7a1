package snapshot

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"

	"filippo.io/age"
)

// Blobs is where the files of snapshots are read from: a directory, or an object store.
type Blobs interface {
	// Open opens the file that has this name in a store, such as "packs/<id>.pack", with forward slashes. The error
	// wraps fs.ErrNotExist if there is none. Open may be called from several goroutines.
	Open(name string) (Blob, error)
}

// Blob is an open file of Blobs. ReadAt is called from several goroutines, and must end by itself if it takes too
// long: nothing interrupts it. Any error but a plain io.EOF says that the storage failed, not that the bytes are bad.
type Blob interface {
	io.ReaderAt
	io.Closer
	Size() int64
}

// OpenOptions say how OpenFrom's blobs are read. The zero value is for a store that takes milliseconds to answer.
type OpenOptions struct {
	// BlockSize is how much is asked for at most at a time, and at once around what a single Fetch needs, as its
	// neighbours are likely to be next. 0 means 1 MiB. If it is negative, just what is needed is read, when it
	// is needed, as from a local file; the other options are then of no effect.
	BlockSize int
	// CacheBytes is how much of what was read is kept, besides what is in use. 0 means 32 MiB.
	CacheBytes int
	// Requests is how many may be under way at a time. 0 means 16.
	Requests int
}

// The defaults of OpenOptions.
const (
	defaultBlockSize  = 1 << 20
	defaultCacheBytes = 32 << 20
	defaultRequests   = 16
)

// OpenFrom is Store.Open for a snapshot that lies elsewhere. A Reader of it can't be the Parent of a Writer.
//
// When its storage fails, a Reader returns a *FileError whose Temporary method says that the call may be tried again;
// ErrCorrupt is only what the storage delivered and should not have.
func OpenFrom(ctx context.Context, blobs Blobs, id ID, opts OpenOptions, identities ...age.Identity) (*Reader, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	s := &source{blobs: blobs, cache: newBlockCache(opts)}
	return s.openReader(id, identities)
}

// dirBlobs are the files of the store in a directory.
type dirBlobs struct {
	dir   string
	files fileSystem
}

func (d dirBlobs) Open(name string) (Blob, error) { return d.files.Open(inDir(d.dir, name)) }

// inDir is the path of a file that has this name in the store in a directory.
func inDir(dir, name string) string { return filepath.Join(dir, filepath.FromSlash(name)) }

// source is where a Reader reads from, and by way of what.
type source struct {
	blobs Blobs
	cache *blockCache // nil: none
}

// openReader is Store.Open.
func (s *source) openReader(id ID, identities []age.Identity) (*Reader, error) {
	f, err := s.openManifest(manifestName(id))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	defer f.release(f.ask(fileRange{0, f.Size()}))
	m, err := readManifest(f, id, identities)
	if err != nil {
		return nil, fileError("open", s.path(manifestName(id)), err)
	}
	return s.reader(m.header, m.body, uint64(f.Size())), nil
}

// openManifest opens a manifest; that there is none is ErrNotFound.
func (s *source) openManifest(name string) (*sourceBlob, error) {
	f, err := s.open(name)
	if err != nil {
		return nil, fileError("open", s.path(name), notFound(err))
	}
	return f, nil
}

func (s *source) open(name string) (*sourceBlob, error) {
	b, err := s.blobs.Open(name)
	if err != nil {
		return nil, err
	}
	return &sourceBlob{b, s.cache}, nil
}

// isDir says whether the blobs are the store in a directory.
func (s *source) isDir(dir string) bool {
	d, ok := s.blobs.(dirBlobs)
	return ok && d.dir == dir
}

// path is the name of a blob for messages.
func (s *source) path(name string) string {
	if d, ok := s.blobs.(dirBlobs); ok {
		return inDir(d.dir, name)
	}
	return name
}

// spanBytes is how much of a plaintext is read at once in a batch: if it is far away, what a request brings.
func (s *source) spanBytes() uint64 {
	if s.cache == nil {
		return batchBytes
	}
	return uint64(max(s.cache.block-2*segmentBytes, segmentBytes))
}

// spanGap is how much that a batch does not need is read together with what is around it.
func (s *source) spanGap() uint64 {
	if s.cache == nil {
		return batchGap
	}
	return uint64(s.cache.block / 4)
}

// sourceBlob is an open blob, read by way of the cache if there is one. Its errors other than io.EOF are marked as
// those of the storage.
type sourceBlob struct {
	Blob
	cache *blockCache
}

// ReadAt implements io.ReaderAt.
func (b *sourceBlob) ReadAt(p []byte, off int64) (int, error) {
	if b.cache == nil {
		return b.request(p, off)
	}
	windows := b.askAround(fileRange{off, off + int64(len(p))})
	defer b.release(windows)
	n := 0
	for _, w := range windows {
		<-w.ready
		if w.err != nil {
			return n, w.err
		}
		n += copy(p[n:], w.data[off+int64(n)-w.from:])
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// Close implements io.Closer. Nobody may be reading.
func (b *sourceBlob) Close() error {
	if b.cache != nil {
		b.cache.forget(b)
	}
	return b.Blob.Close()
}

// request asks the storage.
func (b *sourceBlob) request(p []byte, off int64) (int, error) {
	n, err := b.Blob.ReadAt(p, off)
	switch {
	case n == len(p):
		return n, nil
	case err == nil:
		err = io.ErrUnexpectedEOF
	case err == io.EOF: //nolint:errorlint // an error that wraps it is a broken connection
		return n, err
	case errors.Is(err, io.EOF): // which must not look like the end of the blob
		err = fmt.Errorf("%w: %v", io.ErrUnexpectedEOF, err) //nolint:errorlint // on purpose
	}
	return n, &storageError{err}
}
