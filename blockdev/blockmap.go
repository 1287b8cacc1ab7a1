package blockdev

import (
	"encoding/binary"
	"fmt"
	"io"
	"math/bits"
	"sync/atomic"
)

// blockState says where the contents of a block are. Its values are those in the file.
type blockState uint64

const (
	blockAbsent blockState = 0 // below
	blockData   blockState = 1 // in the file
	blockZero   blockState = 2 // nowhere
)

const (
	mapPageBytes  = 4096
	blocksPerWord = 32
	wordsPerPage  = mapPageBytes / 8
	stateMask     = 3
	everyBlock    = ^uint64(0) / stateMask // a state of 1 for each block of a word
)

// blockMap is the states of all blocks of an overlay, and which pages of it differ from those in the file. Readers need no
// lock. Writers of different blocks need none either; those of one block are kept apart by the overlay.
type blockMap struct {
	words   []atomic.Uint64
	changed []atomic.Uint64 // a bit for each page of words
}

func newBlockMap(blocks int64) *blockMap {
	pages := mapBytes(blocks) / mapPageBytes
	return &blockMap{make([]atomic.Uint64, pages*wordsPerPage), make([]atomic.Uint64, (pages+63)/64)}
}

// mapBytes is the size of a map in the file: whole pages.
func mapBytes(blocks int64) int64 {
	const perPage = wordsPerPage * blocksPerWord
	return (blocks + perPage - 1) / perPage * mapPageBytes
}

func (m *blockMap) get(block int64) blockState {
	return blockState(m.words[block/blocksPerWord].Load() >> (block % blocksPerWord * 2) & stateMask)
}

// run returns the state of a block and the first block after it, up to end, that is in another. While others write, that
// is a state that the block had: it is looked at once, so that a run is never empty.
func (m *blockMap) run(block, end int64) (blockState, int64) {
	shift := block % blocksPerWord * 2
	word := m.words[block/blocksPerWord].Load() >> shift
	state := blockState(word & stateMask)
	all := everyBlock * uint64(state)
	other := word ^ all>>shift
	for other == 0 {
		block += blocksPerWord - shift/2
		if block >= end {
			return state, end
		}
		shift = 0
		other = m.words[block/blocksPerWord].Load() ^ all
	}
	return state, min(end, block+int64(bits.TrailingZeros64(other)/2))
}

// set puts the blocks from one up to another in a state.
func (m *blockMap) set(block, end int64, state blockState) {
	for block < end {
		first := block % blocksPerWord
		n := min(blocksPerWord-first, end-block)
		mask := ^uint64(0) >> (64 - 2*n) << (2 * first)
		word := &m.words[block/blocksPerWord]
		for {
			// In one step: a reader must not see a state in between.
			old := word.Load()
			now := old&^mask | everyBlock*uint64(state)&mask
			if old == now {
				break
			}
			if word.CompareAndSwap(old, now) {
				// After the change, so that whoever takes the mark finds the change.
				page := block / (wordsPerPage * blocksPerWord)
				m.changed[page/64].Or(1 << (page % 64))
				break
			}
		}
		block += n
	}
}

// mapPage is a copy of a page of the map.
type mapPage struct {
	off   int64 // in the map, in bytes
	bytes []byte
}

// takeChanges returns copies of the pages that have changed since the last call.
func (m *blockMap) takeChanges() []mapPage {
	var pages []mapPage
	for i := range m.changed {
		for marks := m.changed[i].Swap(0); marks != 0; marks &= marks - 1 {
			page := int64(i*64 + bits.TrailingZeros64(marks))
			b := make([]byte, 0, mapPageBytes)
			for w := range wordsPerPage {
				b = binary.LittleEndian.AppendUint64(b, m.words[page*wordsPerPage+int64(w)].Load())
			}
			pages = append(pages, mapPage{page * mapPageBytes, b})
		}
	}
	return pages
}

// giveBack notes that pages are not in the file yet.
func (m *blockMap) giveBack(pages []mapPage) {
	for _, p := range pages {
		page := p.off / mapPageBytes
		m.changed[page/64].Or(1 << (page % 64))
	}
}

// load reads the map from the file.
func (m *blockMap) load(file io.ReaderAt, at int64) error {
	b := make([]byte, mapPageBytes)
	for page := 0; page*wordsPerPage < len(m.words); page++ {
		if n, err := file.ReadAt(b, at+int64(page)*mapPageBytes); n < len(b) {
			return fmt.Errorf("%w: its map is cut off: %w", ErrOverlay, err)
		}
		for i := range wordsPerPage {
			word := binary.LittleEndian.Uint64(b[8*i:])
			if word&(word>>1)&everyBlock != 0 {
				return fmt.Errorf("%w: its map has a block in no known state, near block %d",
					ErrOverlay, (page*wordsPerPage+i)*blocksPerWord)
			}
			if word != 0 { // else, most of a map stays memory that was never touched
				m.words[page*wordsPerPage+i].Store(word)
			}
		}
	}
	return nil
}
