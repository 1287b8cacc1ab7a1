package blockdev_test

import (
	"bytes"
	"errors"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/cryovisor/cryovisor/blockdev"
)

const testChunk = 8192

// chunks is a source that holds every other chunk of a disk: its bytes are its number. It fails when it is told to.
type chunks struct {
	reads atomic.Int64
	fail  atomic.Bool
}

func (c *chunks) Lookup(off int64) (start, length, chunk int64, within int) {
	n := off / testChunk
	if n%2 == 1 {
		return n * testChunk, testChunk, -1, 0
	}
	return n * testChunk, testChunk, n, 0
}

func (c *chunks) ReadChunk(chunk int64) ([]byte, error) {
	c.reads.Add(1)
	if c.fail.Load() {
		return nil, syscall.EIO
	}
	return bytes.Repeat([]byte{byte(chunk + 1)}, testChunk), nil
}

// TestLayerFails: an error of the source is the read's, spoils nothing that needs no chunk, and is not remembered.
func TestLayerFails(t *testing.T) {
	src := &chunks{}
	l := blockdev.NewLayer(src, nil, 4*testChunk, 0)
	p := make([]byte, 100)
	src.fail.Store(true)
	if _, err := l.ReadAt(p, 2*testChunk); !errors.Is(err, syscall.EIO) {
		t.Fatal(err)
	}
	if n, err := l.ReadAt(p, testChunk); err != nil || n != len(p) || !bytes.Equal(p, make([]byte, len(p))) {
		t.Fatalf("%d, %v", n, err)
	}
	src.fail.Store(false)
	if _, err := l.ReadAt(p, 2*testChunk); err != nil || !bytes.Equal(p, bytes.Repeat([]byte{3}, len(p))) {
		t.Fatalf("%x, %v", p[:4], err)
	}
}

// TestLayerCache: a chunk is read once as long as there is room for it, and again when others have taken that.
func TestLayerCache(t *testing.T) {
	src := &chunks{}
	l := blockdev.NewLayer(src, nil, 64*testChunk, 2*testChunk)
	read := func(chunk int64, want int64) {
		t.Helper()
		before := src.reads.Load()
		p := make([]byte, 10)
		if _, err := l.ReadAt(p, chunk*testChunk+5); err != nil || p[0] != byte(chunk+1) {
			t.Fatalf("%x, %v", p, err)
		}
		if n := src.reads.Load() - before; n != want {
			t.Errorf("chunk %d: %d reads of the source, want %d", chunk, n, want)
		}
	}
	read(0, 1)
	read(2, 1)
	read(0, 0)
	read(4, 1) // 2 goes, which was used before 0
	read(0, 0)
	read(2, 1)
	read(4, 1)
}
