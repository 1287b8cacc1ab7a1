package blockdev

import (
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
)

// runsOf are the runs of a plain list.
func runsOf(in []bool) []Extent {
	var runs []Extent
	for i, is := range in {
		switch n := len(runs); {
		case !is:
		case n > 0 && runs[n-1].Off+runs[n-1].Len == int64(i):
			runs[n-1].Len++
		default:
			runs = append(runs, Extent{int64(i), 1})
		}
	}
	return runs
}

// TestBlockSet compares a set with a plain list.
func TestBlockSet(t *testing.T) {
	const blocks = 600000 // with three words of marks
	s := newBlockSet(blocks)
	rnd := rand.New(rand.NewPCG(1, 2))
	for round := range 20 {
		want := make([]bool, blocks)
		for range rnd.IntN(30) {
			first := rnd.Int64N(blocks)
			end := min(blocks, first+rnd.Int64N(1<<rnd.IntN(17))+1)
			s.add(first, end)
			for b := first; b < end; b++ {
				want[b] = true
			}
		}
		if got := s.take(); !slices.Equal(got, runsOf(want)) {
			t.Fatalf("round %d: took %v, want %v", round, got, runsOf(want))
		}
	}
	s.add(blocks-1, blocks)
	if got := s.take(); !slices.Equal(got, []Extent{{blocks - 1, 1}}) {
		t.Errorf("the last block: %v", got)
	}
}

// TestBlockSetWriters has several add blocks of one word, some of them the same ones: what was added is there to be taken.
func TestBlockSetWriters(t *testing.T) {
	const writers, rounds = 4, 100000
	s := newBlockSet(bitsPerWord)
	var mu sync.Mutex
	taken := make([]int, bitsPerWord)
	take := func() {
		mu.Lock()
		defer mu.Unlock()
		for _, run := range s.take() {
			for b := run.Off; b < run.Off+run.Len; b++ {
				taken[b]++
			}
		}
	}
	times := func(block int64) int {
		mu.Lock()
		defer mu.Unlock()
		return taken[block]
	}
	var wg sync.WaitGroup
	for w := range int64(writers) {
		wg.Go(func() {
			block := w / 2 * 8 // shared by two
			for i := range rounds {
				before := times(block)
				s.add(block, block+8)
				take() // unless another has taken it
				if times(block) == before {
					t.Errorf("round %d: block %d is not there", i, block)
					return
				}
			}
		})
	}
	wg.Wait()
	if left := s.take(); len(left) != 0 {
		t.Errorf("left: %v", left)
	}
}
