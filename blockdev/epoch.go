package blockdev

import (
	"math/bits"
	"sync"
	"sync/atomic"
)

// epoch is the blocks that have changed since someone asked last.
type epoch struct {
	on     atomic.Bool
	mu     sync.Mutex // of whoever begins, takes or ends it
	blocks *blockSet  // made when on is set first, and kept
}

// TrackWrites begins, or ends, to note which blocks change. What was noted before is forgotten.
func (o *Overlay) TrackWrites(on bool) {
	e := &o.epoch
	e.mu.Lock()
	defer e.mu.Unlock()
	if on && e.blocks == nil {
		e.blocks = newBlockSet(o.head.blocks())
	}
	if on {
		e.blocks.take()
	}
	e.on.Store(on)
}

// TakeWrites returns the blocks that have been written, discarded or zeroed since TrackWrites(true) or the last TakeWrites, and
// forgets them. They are ascending and merged, and whole blocks as those of Changes are. It may be called while the disk is
// written on: then whoever reads these blocks now, and those of every TakeWrites that follows, ends up with what the disk holds.
// Without TrackWrites there are none.
func (o *Overlay) TakeWrites() []Extent {
	e := &o.epoch
	e.mu.Lock()
	defer e.mu.Unlock()
	if !e.on.Load() {
		return nil
	}
	extents := e.blocks.take()
	for i := range extents {
		extents[i].Off <<= o.head.shift
		extents[i].Len <<= o.head.shift
	}
	return extents
}

// note marks the blocks of a change, if that is asked for. It must come after the change, failed or not, and before the call
// that makes it returns. A change that a TakeWrites has not found yet is then found by a later one; so a reader that has seen the
// block as it was before the change, or in its midst, is told to read it once more. Were the mark made first, a TakeWrites could
// take it, the reader could read what was there before, and nobody would tell it of the change. For the same reason, whether
// it is asked for is found out after the change: what is read after a TrackWrites(true) has the changes that were made before it.
func (o *Overlay) note(off, n int64) {
	if o.epoch.on.Load() {
		o.epoch.blocks.add(off>>o.head.shift, (off+n+o.head.blockSize()-1)>>o.head.shift)
	}
}

// blockSet is a set of blocks. Most of it stays memory that was never touched, and a mark for each bitsPerWord words says where
// to look, so that few blocks of a large disk are found at once. Adding needs no lock; one at a time takes.
type blockSet struct {
	words []atomic.Uint64 // a bit for each block
	marks []atomic.Uint64 // a bit for each group of bitsPerWord words
}

const bitsPerWord = 64

func newBlockSet(blocks int64) *blockSet {
	const perMark = bitsPerWord * bitsPerWord * bitsPerWord // blocks for each word of marks
	n := (blocks + perMark - 1) / perMark
	return &blockSet{make([]atomic.Uint64, n*bitsPerWord*bitsPerWord), make([]atomic.Uint64, n)}
}

// add adds the blocks from one up to another.
func (s *blockSet) add(block, end int64) {
	for block < end {
		word, first := block/bitsPerWord, block%bitsPerWord
		n := min(bitsPerWord-first, end-block)
		setBits(&s.words[word], ^uint64(0)>>(bitsPerWord-n)<<first)
		// After the block, so that whoever takes the mark finds the block; and if the block was there, too, as whoever has added
		// that may not have come to this.
		group := word / bitsPerWord
		setBits(&s.marks[group/bitsPerWord], 1<<(group%bitsPerWord))
		block += n
	}
}

// take empties the set, and returns what was in it as runs of blocks.
func (s *blockSet) take() []Extent {
	var runs []Extent
	for i := range s.marks {
		for marks := takeBits(&s.marks[i]); marks != 0; marks &= marks - 1 {
			group := i*bitsPerWord + bits.TrailingZeros64(marks)
			for word := group * bitsPerWord; word < (group+1)*bitsPerWord; word++ {
				runs = appendRuns(runs, int64(word)*bitsPerWord, takeBits(&s.words[word]))
			}
		}
	}
	return runs
}

// appendRuns appends the bits of a word, of which the first is that of a block, to runs of blocks that are before it.
func appendRuns(runs []Extent, block int64, word uint64) []Extent {
	for word != 0 {
		first := bits.TrailingZeros64(word)
		n := bits.TrailingZeros64(^(word >> first))
		word &^= ^uint64(0) >> (bitsPerWord - n) << first
		run := Extent{block + int64(first), int64(n)}
		if last := len(runs) - 1; last >= 0 && runs[last].Off+runs[last].Len == run.Off {
			runs[last].Len += run.Len
		} else {
			runs = append(runs, run)
		}
	}
	return runs
}

// setBits and takeBits write to a word only if that changes it: most often it does not.
func setBits(word *atomic.Uint64, mask uint64) {
	if word.Load()&mask != mask {
		word.Or(mask)
	}
}

func takeBits(word *atomic.Uint64) uint64 {
	if word.Load() == 0 {
		return 0
	}
	return word.Swap(0)
}
