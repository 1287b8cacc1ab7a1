package blockdev

import (
	"errors"
	"fmt"
	"os"
	"sync"

	"github.com/cryovisor/cryovisor/internal/instant"
)

// A Still is what blocks of an overlay held at one moment, while the overlay is written on. Whoever is about to change a
// block first copies it, and its neighbours, unless they have been read. These copies take 16 MiB at most: who writes faster than
// the Still is read has to wait. Its methods may be called from any number of goroutines.
type Still struct {
	of   *Overlay
	in   *instant.Instant
	once sync.Once
}

// stillUnit is what a Still is read in.
const stillUnit = instant.BlockSize

// stillBuffers is how many copies there are at most, of 256 KiB each.
const stillBuffers = instant.DefaultBuffers

// Freeze keeps what blocks hold now, for Still.ReadAt. Nobody may be changing the disk, a machine's that stands still, until it
// returns. blocks are what Changes or TakeWrites say, or any multiples of 4096 bytes; ascending, and not overlapping. There
// is one Still at a time: until it is closed, Freeze fails with ErrFrozen.
//
// wanted, if not nil, is told of extents that had better be read soon, as a writer had to copy something of them, and others may have to
// wait until it has been read. They may have been read meanwhile, and not all of them need be held. It is called from several
// goroutines, and must not wait for anything.
func (o *Overlay) Freeze(blocks []Extent, wanted func(Extent)) (*Still, error) {
	return o.freeze(blocks, wanted, stillBuffers)
}

func (o *Overlay) freeze(blocks []Extent, wanted func(Extent), buffers int) (*Still, error) {
	held, err := o.clip(blocks)
	if err != nil {
		return nil, err
	}
	s := &Still{of: o}
	s.in = instant.New(instant.Config{
		Size: o.head.size, Blocks: held, Buffers: buffers,
		Read: func(p []byte, off int64) error {
			_, err := o.ReadAt(p, off)
			return err
		},
		Wanted: func(off, n int64) {
			if wanted != nil {
				wanted(Extent{off, min(n, o.head.size-off)})
			}
		},
	})
	if !o.still.CompareAndSwap(nil, s) {
		return nil, fmt.Errorf("freeze overlay %s: %w", o.path, ErrFrozen)
	}
	return s, nil
}

// clip checks blocks, and ends them with the disk.
func (o *Overlay) clip(blocks []Extent) ([]instant.Extent, error) {
	held := make([]instant.Extent, len(blocks))
	end, last := int64(0), o.head.blocks()<<o.head.shift
	for i, e := range blocks {
		if err := CheckRange("freeze", e.Off, e.Len, last); err != nil {
			return nil, err
		}
		n := min(e.Len, o.head.size-e.Off)
		if e.Off < end || !o.whole(e.Off, n) {
			return nil, fmt.Errorf("freeze %d bytes at %d of overlay %s: %w", e.Len, e.Off, o.path, ErrBlocks)
		}
		held[i], end = instant.Extent{Off: e.Off, Len: n}, e.Off+e.Len
	}
	return held, nil
}

// whole says whether a range is of whole units: the last may be cut short by the end of the disk.
func (o *Overlay) whole(off, n int64) bool {
	return off%stillUnit == 0 && (n%stillUnit == 0 || off+n == o.head.size)
}

// ReadAt reads blocks of the Still: multiples of 4096 bytes, but that the last of the disk may be shorter; each once. Errors:
// *RangeError, ErrBlocks, ErrNotHeld, os.ErrClosed after Close, and those of the disk, also for a block that a write should have
// kept; that write was made all the same.
func (s *Still) ReadAt(p []byte, off int64) (int, error) {
	n := int64(len(p))
	if err := CheckRange("read", off, n, s.of.head.size); err != nil {
		return 0, err
	}
	if !s.of.whole(off, n) {
		return 0, s.wrap(off, n, ErrBlocks)
	}
	_, err := s.in.ReadAt(p, off)
	switch {
	case err == nil:
		return len(p), nil
	case errors.Is(err, instant.ErrClosed):
		err = os.ErrClosed
	case errors.Is(err, instant.ErrNotHeld):
		err = ErrNotHeld
	}
	return 0, s.wrap(off, n, err)
}

func (s *Still) wrap(off, n int64, err error) error {
	return fmt.Errorf("blockdev: read %d bytes at %d of what overlay %s was: %w", n, off, s.of.path, err)
}

// Close ends the Still, whether it has been read or not: nothing is copied any more, and writers that wait go on.
func (s *Still) Close() {
	s.once.Do(func() {
		s.in.Close() // first: a ReadAt must know of it before a writer no longer finds the Still
		s.of.still.Store(nil)
	})
}

// keep has what a range holds kept before it is changed. It may wait for whoever reads the Still, so the caller must not have a
// lock yet. A write that changes more than its range, as one to a part of a block does, stays within the 256 KiB around it,
// which are kept together.
func (o *Overlay) keep(off, n int64) {
	if s := o.still.Load(); s != nil {
		s.in.Keep(off, n)
	}
}
