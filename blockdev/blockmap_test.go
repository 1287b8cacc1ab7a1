package blockdev

import (
	"math/rand/v2"
	"sync"
	"testing"
)

// TestBlockMapRuns compares runs with a plain list of states.
func TestBlockMapRuns(t *testing.T) {
	const blocks = 40000 // on three pages
	m, want := newBlockMap(blocks), make([]blockState, blocks)
	rnd := rand.New(rand.NewPCG(1, 2))
	for range 500 {
		first := rnd.Int64N(blocks)
		end := min(blocks, first+rnd.Int64N(1<<rnd.IntN(14))+1)
		state := []blockState{blockAbsent, blockData, blockZero}[rnd.IntN(3)]
		m.set(first, end, state)
		for b := first; b < end; b++ {
			want[b] = state
		}
		from := rnd.Int64N(blocks)
		got, to := m.run(from, blocks)
		next := from
		for next < blocks && want[next] == want[from] {
			next++
		}
		if got != want[from] || to != next || m.get(from) != want[from] {
			t.Fatalf("from block %d on: state %d up to %d, want %d up to %d", from, got, to, want[from], next)
		}
	}
}

// TestBlockMapWriters has writers change blocks of the same words at the same time: none must undo what another does, and every
// page that has changed must be known.
func TestBlockMapWriters(t *testing.T) {
	const writers, rounds = 4, 1000000
	m := newBlockMap(blocksPerWord)
	var wg sync.WaitGroup
	for w := range int64(writers) {
		wg.Go(func() {
			for i := range rounds {
				state := []blockState{blockData, blockZero}[i%2]
				m.set(w*8, w*8+8, state)
				if got, end := m.run(w*8, w*8+8); got != state || end != w*8+8 {
					t.Errorf("round %d: writer %d's blocks are %d up to %d, want %d", i, w, got, end, state)
					return
				}
			}
		})
	}
	wg.Wait()
	if pages := m.takeChanges(); len(pages) != 1 || pages[0].off != 0 {
		t.Errorf("%d pages have changed", len(pages))
	}
	if pages := m.takeChanges(); len(pages) != 0 {
		t.Errorf("%d pages have changed since", len(pages))
	}
}

// TestBlockMapReaders looks for runs at a block while others write it: a run is never empty, or a read of the disk would get
// nowhere.
func TestBlockMapReaders(t *testing.T) {
	const rounds = 1000000
	m := newBlockMap(blocksPerWord)
	var wg sync.WaitGroup
	for w := range 2 {
		wg.Go(func() {
			for i := range rounds {
				m.set(5, 6, []blockState{blockAbsent, blockData, blockZero}[(i+w)%3])
			}
		})
	}
	for range rounds {
		if state, end := m.run(5, blocksPerWord); end <= 5 || end > blocksPerWord {
			t.Fatalf("a run of state %d from block 5 up to %d", state, end)
		}
	}
	wg.Wait()
}
