package snapshot

import (
	"slices"
	"sync"
)

// blockCache is what a Reader has read lately of blobs that take long to answer. It asks for much at a time, for
// several ranges at the same time, and for nothing twice while it has it or waits for it.
type blockCache struct {
	block  int64         // bytes of a request, at most
	budget int64         // bytes to keep
	slots  chan struct{} // holds one for each request that is under way

	mu      sync.Mutex
	windows []*window // the one that was used last is the last
	bytes   int64     // in windows
}

// window is a range of a blob that was read, or is being read.
type window struct {
	fileRange
	blob  *sourceBlob
	users int // that hold it; under blockCache.mu

	ready chan struct{} // closed when the following are set
	data  []byte
	err   error
}

func newBlockCache(opts OpenOptions) *blockCache {
	if opts.BlockSize < 0 {
		return nil
	}
	or := func(n, otherwise int) int {
		if n <= 0 {
			return otherwise
		}
		return n
	}
	return &blockCache{
		block:  int64(or(opts.BlockSize, defaultBlockSize)),
		budget: int64(or(opts.CacheBytes, defaultCacheBytes)),
		slots:  make(chan struct{}, or(opts.Requests, defaultRequests)),
	}
}

// fileRange is a range of a blob.
type fileRange struct{ from, to int64 }

// ask has ranges of a blob read ahead, at the same time and by as few requests as possible, and not more of each than
// the cache may keep. What it returns holds them until it is released.
func (b *sourceBlob) ask(ranges ...fileRange) []*window {
	if b.cache == nil {
		return nil
	}
	align := int64(0)
	if b.Size() <= b.cache.block {
		align = b.cache.block // all of it costs no more requests than a part
	}
	var held []*window
	for _, r := range ranges {
		r.to = min(r.to, r.from+b.cache.budget)
		held = append(held, b.hold(r, align)...)
	}
	return held
}

// askAround has the blocks around a range of a blob read. What it returns holds them until it is released.
func (b *sourceBlob) askAround(r fileRange) []*window {
	if b.cache == nil {
		return nil
	}
	return b.hold(r, b.cache.block)
}

// hold returns the windows on r in ascending order, as far as b reaches. What is in none is asked for now, by requests
// that reach from one multiple of align to the next or, if align is 0, not beyond r.
func (b *sourceBlob) hold(r fileRange, align int64) []*window {
	c, size := b.cache, b.Size()
	var held []*window
	c.mu.Lock()
	defer c.mu.Unlock()
	for at, end := max(r.from, 0), min(r.to, size); at < end; {
		w := c.find(b, at)
		if w == nil {
			want := fileRange{at, min(at+c.block, end)}
			if align > 0 {
				want.from = at / align * align
				want.to = min(want.from+align, size)
			}
			w = c.add(b, at, want)
		}
		w.users++
		held = append(held, w)
		at = w.to
	}
	return held
}

// find returns the window of b that at is in, and makes it the last.
func (c *blockCache) find(b *sourceBlob, at int64) *window {
	for i, w := range slices.Backward(c.windows) {
		if w.blob == b && w.from <= at && at < w.to {
			c.windows = append(slices.Delete(c.windows, i, i+1), w)
			return w
		}
	}
	return nil
}

// add makes a window on as much of r around at as is in no other, and has it read. It must be held at once.
func (c *blockCache) add(b *sourceBlob, at int64, r fileRange) *window {
	for _, w := range c.windows {
		if w.blob == b && w.to <= at {
			r.from = max(r.from, w.to)
		} else if w.blob == b && w.from > at {
			r.to = min(r.to, w.from)
		}
	}
	w := &window{fileRange: r, blob: b, ready: make(chan struct{})}
	c.windows = append(c.windows, w)
	c.bytes += r.to - r.from
	go c.read(w)
	return w
}

// read fills a window.
func (c *blockCache) read(w *window) {
	defer close(w.ready)
	c.slots <- struct{}{}
	defer func() { <-c.slots }()
	w.data = make([]byte, w.to-w.from)
	if n, err := w.blob.request(w.data, w.from); n < len(w.data) {
		w.err = err
	}
}

func (c *blockCache) drop(i int) {
	c.bytes -= c.windows[i].to - c.windows[i].from
	c.windows = slices.Delete(c.windows, i, i+1)
}

// forget drops all of a blob.
func (c *blockCache) forget(b *sourceBlob) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for i := len(c.windows) - 1; i >= 0; i-- {
		if c.windows[i].blob == b {
			c.drop(i)
		}
	}
}

// shrink drops what was not used for longest and is not held, until the rest is within the budget.
func (c *blockCache) shrink() {
	for i := 0; i < len(c.windows) && c.bytes > c.budget; {
		if c.windows[i].users > 0 {
			i++
			continue
		}
		c.drop(i)
	}
}

// release ends a hold, when all of it has been read: nothing is under way for a blob that nobody holds a part of. What
// could not be read is forgotten with its last holder, and then asked for again.
func (b *sourceBlob) release(windows []*window) {
	if len(windows) == 0 {
		return
	}
	for _, w := range windows {
		<-w.ready
	}
	b.cache.mu.Lock()
	defer b.cache.mu.Unlock()
	for _, w := range windows {
		if w.users--; w.users == 0 && w.err != nil {
			b.cache.drop(slices.Index(b.cache.windows, w))
		}
	}
	b.cache.shrink()
}
