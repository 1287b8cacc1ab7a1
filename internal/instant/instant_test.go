package instant_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/cryovisor/cryovisor/internal/instant"
)

// store is bytes that several goroutines change, a lock for each unit, as a disk or a memory has.
type store struct {
	locks [32]sync.RWMutex
	bytes []byte
}

func newStore(seed uint64, size int) *store {
	s := &store{bytes: make([]byte, size)}
	rng := rand.New(rand.NewPCG(seed, 1))
	for i := 0; i+8 <= size; i += 8 {
		binary.NativeEndian.PutUint64(s.bytes[i:], rng.Uint64())
	}
	return s
}

func (s *store) read(p []byte, off int64) error {
	lock := &s.locks[off/instant.UnitSize]
	lock.RLock()
	defer lock.RUnlock()
	copy(p, s.bytes[off:])
	return nil
}

func (s *store) write(off int64, b byte) {
	lock := &s.locks[off/instant.UnitSize]
	lock.Lock()
	defer lock.Unlock()
	s.bytes[off] = b
}

// someBlocks are random runs of the store's blocks.
func someBlocks(rng *rand.Rand, size int64) (out []instant.Extent) {
	for off := int64(0); off < size; {
		n := min((1+rng.Int64N(100))*instant.BlockSize, size-off)
		out = append(out, instant.Extent{Off: off, Len: n})
		off += n + (1+rng.Int64N(40))*instant.BlockSize
	}
	return out
}

// Whatever is written meanwhile, what is read is what was there; with so few buffers that writers have to wait.
func TestInstant(t *testing.T) {
	const size = 20*instant.UnitSize + 3*instant.BlockSize + 100
	for seed := range uint64(12) {
		s := newStore(seed, size)
		want := bytes.Clone(s.bytes)
		rng := rand.New(rand.NewPCG(seed, 2))
		blocks := someBlocks(rng, size)
		in := instant.New(instant.Config{Size: size, Blocks: blocks, Read: s.read, Buffers: 1 + int(seed%3)})
		var writers sync.WaitGroup
		stop := make(chan struct{})
		for w := range uint64(3) {
			writers.Go(func() {
				rng := rand.New(rand.NewPCG(seed, 10+w))
				for {
					select {
					case <-stop:
						return
					default:
					}
					off := rng.Int64N(size)
					in.Keep(off, 1)
					s.write(off, byte(rng.Uint32()))
				}
			})
		}
		got := bytes.Clone(want)
		for _, e := range blocks {
			clear(got[e.Off:][:e.Len])
		}
		readAll(t, in, rng, blocks, got)
		close(stop)
		writers.Wait()
		if !bytes.Equal(got, want) {
			t.Fatalf("seed %d: what was read is not what was there", seed)
		}
		if _, err := in.ReadAt(make([]byte, 1), blocks[0].Off); !errors.Is(err, instant.ErrNotHeld) {
			t.Fatalf("a block that was read before: %v", err)
		}
	}
}

// readAll reads blocks in pieces, in random order, by two goroutines.
func readAll(t *testing.T, in *instant.Instant, rng *rand.Rand, blocks []instant.Extent, into []byte) {
	t.Helper()
	var pieces []instant.Extent
	for _, e := range blocks {
		for e.Len > 0 {
			n := min((1+rng.Int64N(90))*instant.BlockSize, e.Len)
			pieces = append(pieces, instant.Extent{Off: e.Off, Len: n})
			e.Off, e.Len = e.Off+n, e.Len-n
		}
	}
	rng.Shuffle(len(pieces), func(i, j int) { pieces[i], pieces[j] = pieces[j], pieces[i] })
	var wg sync.WaitGroup
	for part := range 2 {
		wg.Go(func() {
			for i := part; i < len(pieces); i += 2 {
				p := pieces[i]
				if n, err := in.ReadAt(into[p.Off:][:p.Len], p.Off); err != nil || int64(n) != p.Len {
					t.Errorf("read %d bytes at %d: %d, %v", p.Len, p.Off, n, err)
				}
			}
		})
	}
	wg.Wait()
}

// What was copied is asked for, and frees the writer that waits when it is read.
func TestWanted(t *testing.T) {
	s := newStore(1, 4*instant.UnitSize)
	wanted := make(chan instant.Extent, 4)
	in := instant.New(instant.Config{
		Size: 4 * instant.UnitSize, Read: s.read, Buffers: 1,
		Blocks: []instant.Extent{{Off: 0, Len: 4 * instant.UnitSize}},
		Wanted: func(off, n int64) { wanted <- instant.Extent{Off: off, Len: n} },
	})
	in.Keep(instant.UnitSize+5, 1)
	e := <-wanted
	if (e != instant.Extent{Off: instant.UnitSize, Len: instant.UnitSize}) {
		t.Fatalf("wanted %+v", e)
	}
	waited := make(chan struct{})
	go func() {
		in.Keep(0, instant.UnitSize)
		close(waited)
	}()
	if _, err := in.ReadAt(make([]byte, e.Len), e.Off); err != nil {
		t.Fatal(err)
	}
	<-waited
	if e := <-wanted; e.Off != 0 {
		t.Fatalf("wanted %+v", e)
	}
}

// Close lets writers go that wait for a buffer.
func TestClose(t *testing.T) {
	s := newStore(1, 2*instant.UnitSize)
	copied := make(chan struct{}, 2)
	in := instant.New(instant.Config{
		Size: 2 * instant.UnitSize, Read: s.read, Buffers: 1,
		Blocks: []instant.Extent{{Off: 0, Len: 2 * instant.UnitSize}},
		Wanted: func(int64, int64) { copied <- struct{}{} },
	})
	waited := make(chan struct{})
	go func() {
		in.Keep(0, 2*instant.UnitSize) // two units, one buffer
		close(waited)
	}()
	<-copied
	in.Close()
	in.Close()
	<-waited
	if _, err := in.ReadAt(make([]byte, instant.BlockSize), 0); !errors.Is(err, instant.ErrClosed) {
		t.Fatalf("read after Close: %v", err)
	}
}

// A copy that fails costs the instant, not the write.
func TestCopyFails(t *testing.T) {
	lost := errors.New("lost")
	in := instant.New(instant.Config{
		Size: instant.UnitSize, Blocks: []instant.Extent{{Off: 0, Len: instant.UnitSize}},
		Read: func([]byte, int64) error { return lost }, Buffers: 1,
	})
	in.Keep(0, 1)
	in.Keep(0, 1)
	if _, err := in.ReadAt(make([]byte, instant.BlockSize), 0); !errors.Is(err, lost) {
		t.Fatalf("read: %v", err)
	}
}
