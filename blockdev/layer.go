package blockdev

import (
	"container/list"
	"fmt"
	"strconv"
	"sync"

	"golang.org/x/sync/singleflight"
)

// Source is the blocks of a disk that a snapshot holds, in chunks. Its methods must be safe for concurrent use, and its answers
// must not change.
type Source interface {
	// Lookup describes the run of blocks around the byte at off that has one origin: the chunk that holds it, of which it begins at
	// byte within, or a negative chunk if the snapshot does not hold it. start and length are in bytes.
	Lookup(off int64) (start, length, chunk int64, within int)
	// ReadChunk returns what is in a chunk; the result is the caller's.
	ReadChunk(chunk int64) ([]byte, error)
}

// DefaultCacheBytes is how much of the chunks that were read a Layer remembers, in bytes. A guest caches what it reads itself: this
// is for reads that follow one another within a chunk.
const DefaultCacheBytes = 16 << 20

// Layer is a read-only disk: the blocks that a snapshot holds, and what they lie on. A read finds its blocks in one map, however
// many ancestors the snapshot has, and reads and decodes only the chunks that it needs.
type Layer struct {
	src   Source
	lower Device
	under int64
	size  int64
	cache chunkCache
}

// NewLayer returns a disk of size bytes. lower shows where the source holds nothing; it may be nil, which is zeros, as is what lies
// behind its end. Both stay the caller's and must outlive the Layer. cacheBytes 0 means DefaultCacheBytes.
func NewLayer(src Source, lower Device, size int64, cacheBytes int) *Layer {
	if cacheBytes == 0 {
		cacheBytes = DefaultCacheBytes
	}
	l := &Layer{src: src, lower: lower, size: size}
	l.cache.init(src.ReadChunk, cacheBytes)
	if lower != nil {
		l.under = lower.Size()
	}
	return l
}

// Size implements Device.
func (l *Layer) Size() int64 { return l.size }

// BlockSize implements Device.
func (l *Layer) BlockSize() int { return MinBlockSize }

// ReadOnly implements Device.
func (l *Layer) ReadOnly() bool { return true }

// ReadAt implements Device. Its errors are those of the source and of what is below.
func (l *Layer) ReadAt(p []byte, off int64) (int, error) {
	if err := CheckRange("read", off, int64(len(p)), l.size); err != nil {
		return 0, err
	}
	for n := 0; n < len(p); {
		at := off + int64(n)
		start, length, chunk, within := l.src.Lookup(at)
		part := p[n:min(int64(len(p)), start+length-off)]
		var err error
		if chunk < 0 {
			err = readBelow(l.lower, l.under, part, at)
		} else {
			err = l.cache.read(chunk, part, within+int(at-start))
		}
		if err != nil {
			return n, fmt.Errorf("blockdev: read %d bytes at %d of a snapshot's disk: %w", len(part), at, err)
		}
		n += len(part)
	}
	return len(p), nil
}

// readBelow fills p with what a lower device of some size shows, and zeros behind the end of that.
func readBelow(lower Device, size int64, p []byte, off int64) error {
	n := int(max(0, min(int64(len(p)), size-off)))
	clear(p[n:])
	if n == 0 {
		return nil
	}
	_, err := lower.ReadAt(p[:n], off)
	return err
}

// WriteAt implements Device: ErrReadOnly.
func (l *Layer) WriteAt([]byte, int64) (int, error) { return 0, l.refuse("write to") }

// Discard implements Device: ErrReadOnly.
func (l *Layer) Discard(int64, int64) error { return l.refuse("discard of") }

// WriteZeroes implements Device: ErrReadOnly.
func (l *Layer) WriteZeroes(int64, int64) error { return l.refuse("write zeroes to") }

func (l *Layer) refuse(op string) error {
	return fmt.Errorf("%w: %s a snapshot's disk", ErrReadOnly, op)
}

// Flush implements Device: there is nothing to do.
func (l *Layer) Flush() error { return nil }

// chunkCache is the chunks that were used last. Several reads of one chunk that is not there wait for one to fetch it.
type chunkCache struct {
	fetch  func(chunk int64) ([]byte, error)
	flight singleflight.Group

	mu     sync.Mutex
	room   int // bytes
	chunks map[int64]*list.Element
	used   list.List // of cachedChunk, the last used first
}

type cachedChunk struct {
	chunk int64
	plain []byte
}

func (c *chunkCache) init(fetch func(int64) ([]byte, error), room int) {
	c.fetch, c.room, c.chunks = fetch, room, map[int64]*list.Element{}
}

// read copies what is in a chunk from byte at on.
func (c *chunkCache) read(chunk int64, p []byte, at int) error {
	plain, err := c.get(chunk)
	if err == nil {
		copy(p, plain[at:])
	}
	return err
}

// get returns a chunk, which nobody may change.
func (c *chunkCache) get(chunk int64) ([]byte, error) {
	if plain := c.known(chunk); plain != nil {
		return plain, nil
	}
	plain, err, _ := c.flight.Do(strconv.FormatInt(chunk, 10), func() (any, error) {
		plain, err := c.fetch(chunk)
		if err == nil {
			c.add(chunk, plain)
		}
		return plain, err
	})
	return plain.([]byte), err
}

func (c *chunkCache) known(chunk int64) []byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	e := c.chunks[chunk]
	if e == nil {
		return nil
	}
	c.used.MoveToFront(e)
	return e.Value.(cachedChunk).plain
}

func (c *chunkCache) add(chunk int64, plain []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.chunks[chunk] != nil {
		return
	}
	c.chunks[chunk] = c.used.PushFront(cachedChunk{chunk, plain})
	c.room -= len(plain)
	for c.room < 0 && c.used.Len() > 1 {
		old := c.used.Remove(c.used.Back()).(cachedChunk)
		delete(c.chunks, old.chunk)
		c.room += len(old.plain)
	}
}
