package lifecycle

import (
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/cryovisor/cryovisor/snapshot"
)

// pagesOf are the pages of ranges, of one byte each.
func pagesOf(ranges []snapshot.Range) map[uint64]bool {
	out := map[uint64]bool{}
	for _, r := range ranges {
		for p := r.GPA; p < r.GPA+r.Len; p++ {
			out[p] = true
		}
	}
	return out
}

func someRanges(rng *rand.Rand) (out []snapshot.Range) {
	for at := rng.Uint64N(5); at < 60; {
		r := snapshot.Range{GPA: at, Len: 1 + rng.Uint64N(9)}
		out = append(out, r)
		at += r.Len + rng.Uint64N(9)
	}
	return out
}

func TestRanges(t *testing.T) {
	for seed := range uint64(2000) {
		rng := rand.New(rand.NewPCG(seed, 0))
		a, b := someRanges(rng), someRanges(rng)
		inA, inB := pagesOf(a), pagesOf(b)
		inside, outside := split(a, b)
		both := merge(slices.Concat(a, b))
		for _, list := range [][]snapshot.Range{inside, outside, both} {
			for i, r := range list {
				if r.Len == 0 || i > 0 && list[i-1].GPA+list[i-1].Len > r.GPA {
					t.Fatalf("seed %d: %v", seed, list)
				}
			}
		}
		in, out, or := pagesOf(inside), pagesOf(outside), pagesOf(both)
		for p := range uint64(80) {
			if in[p] != (inA[p] && inB[p]) || out[p] != (inA[p] && !inB[p]) || or[p] != (inA[p] || inB[p]) {
				t.Fatalf("seed %d: %v split by %v is %v and %v, merged %v", seed, a, b, inside, outside, both)
			}
		}
		if size(both) != uint64(len(or)) {
			t.Fatalf("seed %d: %v has %d bytes", seed, both, size(both))
		}
	}
}
