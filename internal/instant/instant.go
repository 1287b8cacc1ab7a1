// Package instant keeps what a store of bytes, a guest's memory or its disk, held at one instant while the store goes on
// being changed: whoever is about to change a part of it first has that part copied, unless it has been read already.
// The instant is read once, in any order. What is copied and not yet read is bounded; who changes the store faster than the
// instant is read has to wait.
package instant

import (
	"cmp"
	"errors"
	"fmt"
	"math/bits"
	"sort"
	"sync"
)

const (
	// BlockSize is the unit in bytes of what belongs to an instant.
	BlockSize = 4096
	// UnitSize is how many bytes are copied together, aligned: whoever changes a block probably changes its neighbours, and
	// copying 256 KiB takes no longer than a few page faults.
	UnitSize = 64 * BlockSize
	// DefaultBuffers is how many units are copied and not yet read at most: 16 MiB.
	DefaultBuffers = 64
)

// Errors of ReadAt.
var (
	// ErrNotHeld says that a block does not belong to the instant, or has been read before.
	ErrNotHeld = errors.New("instant: block is not held")
	// ErrClosed says that the instant has been given up.
	ErrClosed = errors.New("instant: closed")
)

// Extent is a range in bytes.
type Extent struct{ Off, Len int64 }

// Config says what an instant is of.
type Config struct {
	// Size of the store in bytes. Its last block may be shorter than the others.
	Size int64
	// Blocks are those that belong to the instant: whole blocks, ascending and not overlapping.
	Blocks []Extent
	// Read reads the store as it is, inside Blocks. It is called from several goroutines.
	Read func(p []byte, off int64) error
	// Buffers is how many units are copied and not yet read at most; 0 means DefaultBuffers.
	Buffers int
	// Wanted, if not nil, is told of each unit that was copied: it had better be read soon, since it takes a buffer, for which
	// others may wait. Not all of it need belong to the instant. Wanted must not wait for anything.
	Wanted func(off, n int64)
}

// Instant is the contents of a store at the time of New. Its methods may be called from any number of goroutines.
type Instant struct {
	cfg    Config
	units  []unit        // ascending
	free   chan []byte   // buffers of UnitSize; nil ones have not been allocated
	closed chan struct{} // nobody reads it any more

	once sync.Once
	mu   sync.Mutex
	err  error // of the first copy that failed
}

// unit is UnitSize bytes of the store, a bit for each block.
type unit struct {
	index int64 // of its first byte, in UnitSize

	mu      sync.Mutex
	pending uint64 // blocks that are only in the store
	kept    uint64 // blocks that are in copy
	copy    []byte
}

// New begins an instant: now. Nobody may be changing the store. From here on, until Close, whoever changes a
// block calls Keep first.
func New(cfg Config) *Instant {
	n := cmp.Or(cfg.Buffers, DefaultBuffers)
	s := &Instant{
		cfg: cfg, units: cut(cfg.Blocks),
		free: make(chan []byte, n), closed: make(chan struct{}),
	}
	for range n {
		s.free <- nil
	}
	return s
}

// cut makes units of extents.
func cut(blocks []Extent) []unit {
	var units []unit
	for _, e := range blocks {
		for off, end := e.Off, e.Off+e.Len; off < end; {
			index := off / UnitSize
			next := min(end, (index+1)*UnitSize)
			if n := len(units); n == 0 || units[n-1].index != index {
				units = append(units, unit{index: index})
			}
			units[len(units)-1].pending |= maskOf(off, next)
			off = next
		}
	}
	return units
}

// maskOf are the bits of the blocks from off up to end, which are in one unit.
func maskOf(off, end int64) uint64 {
	first := off % UnitSize / BlockSize
	count := (end - off + BlockSize - 1) / BlockSize
	return ^uint64(0) >> (64 - count) << first
}

// Keep returns when the blocks of [off, off+n) may be changed, and with them all of the units that they are in: they have been
// read, or copied, or do not belong to the instant. When a copy fails they may be changed all the same, and it is the
// instant that is lost: ReadAt says so.
func (s *Instant) Keep(off, n int64) {
	for i := s.search(off); i < len(s.units) && s.units[i].index*UnitSize < off+n; i++ {
		s.keep(&s.units[i])
	}
}

// search finds the first unit that ends after off.
func (s *Instant) search(off int64) int {
	return sort.Search(len(s.units), func(i int) bool { return s.units[i].index >= off/UnitSize })
}

func (s *Instant) keep(u *unit) {
	u.mu.Lock()
	settled := u.pending == 0
	u.mu.Unlock()
	if settled || s.Err() != nil {
		return
	}
	// Without the unit's lock: whoever gives a buffer back may need it.
	var buf []byte
	select {
	case <-s.closed:
		return
	case buf = <-s.free:
	}
	if buf == nil {
		buf = make([]byte, UnitSize)
	}
	if !s.copyUnit(u, buf) {
		s.free <- buf
		return
	}
	if s.cfg.Wanted != nil {
		s.cfg.Wanted(u.index*UnitSize, UnitSize)
	}
}

// copyUnit copies what is pending of u to buf, and says whether buf is in use now.
func (s *Instant) copyUnit(u *unit, buf []byte) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.pending == 0 {
		return false
	}
	err := s.runs(u.index, u.pending, func(off, end int64) error {
		return s.cfg.Read(buf[off-u.index*UnitSize:end-u.index*UnitSize], off)
	})
	if err != nil {
		s.fail(err)
		return false
	}
	// What is kept already is in another buffer only if the unit was copied before, which leaves nothing pending.
	u.kept, u.pending, u.copy = u.pending, 0, buf
	return true
}

// runs calls f for each run of blocks of a mask.
func (s *Instant) runs(index int64, mask uint64, f func(off, end int64) error) error {
	for mask != 0 {
		first := bits.TrailingZeros64(mask)
		count := bits.TrailingZeros64(^(mask >> first))
		mask &^= ^uint64(0) >> (64 - count) << first
		off := index*UnitSize + int64(first)*BlockSize
		if err := f(off, min(off+int64(count)*BlockSize, s.cfg.Size)); err != nil {
			return err
		}
	}
	return nil
}

// ReadAt reads blocks of the instant, whole ones but for the last of the store, each once. Its errors are those of Config.Read, of
// a copy that failed, ErrNotHeld and ErrClosed.
func (s *Instant) ReadAt(p []byte, off int64) (int, error) {
	i := s.search(off)
	for n := 0; n < len(p); i++ {
		at := off + int64(n)
		end := min(off+int64(len(p)), (at/UnitSize+1)*UnitSize)
		if i == len(s.units) || s.units[i].index != at/UnitSize {
			return n, fmt.Errorf("%w: at %d", ErrNotHeld, at)
		}
		if err := s.read(&s.units[i], p[n:n+int(end-at)], at); err != nil {
			return n, err
		}
		n += int(end - at)
	}
	// If it was given up meanwhile, writers have not waited for this.
	if err := s.Err(); err != nil {
		return 0, err
	}
	return len(p), nil
}

// read reads a part of one unit.
func (s *Instant) read(u *unit, p []byte, off int64) error {
	mask := maskOf(off, off+int64(len(p)))
	u.mu.Lock()
	defer u.mu.Unlock()
	if mask&^(u.pending|u.kept) != 0 {
		return fmt.Errorf("%w: in the %d bytes at %d", ErrNotHeld, len(p), off)
	}
	err := s.runs(u.index, mask&u.pending, func(from, to int64) error {
		return s.cfg.Read(p[from-off:to-off], from)
	})
	if err != nil {
		return err
	}
	_ = s.runs(u.index, mask&u.kept, func(from, to int64) error {
		copy(p[from-off:to-off], u.copy[from-u.index*UnitSize:])
		return nil
	})
	u.pending &^= mask
	u.kept &^= mask
	if u.kept == 0 && u.copy != nil {
		s.free <- u.copy
		u.copy = nil
	}
	return nil
}

// Close gives the instant up, whether it has been read or not. Nobody waits in Keep any more, and nothing is copied.
func (s *Instant) Close() {
	s.once.Do(func() { close(s.closed) })
}

// Err is why the instant can't be read: ErrClosed, or the error of a copy that failed.
func (s *Instant) Err() error {
	select {
	case <-s.closed:
		return ErrClosed
	default:
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}

// fail records the first failure. Nothing is copied after it.
func (s *Instant) fail(err error) {
	s.mu.Lock()
	if s.err == nil {
		s.err = fmt.Errorf("instant: copy before a write: %w", err)
	}
	s.mu.Unlock()
}
