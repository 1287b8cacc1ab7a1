package memory

import (
	"math/rand/v2"
	"slices"
	"testing"
)

func TestBitmap(t *testing.T) {
	const size = 300
	rng := rand.New(rand.NewPCG(5, 6))
	for range 200 {
		b, oracle := newBitmap(size), make([]bool, size)
		for range rng.IntN(8) {
			lo := rng.Uint64N(size)
			hi := lo + rng.Uint64N(size-lo+1)
			value := rng.IntN(3) > 0
			if value {
				b.set(lo, hi)
			} else {
				b.clear(lo, hi)
			}
			for i := lo; i < hi; i++ {
				oracle[i] = value
			}
		}
		for i, want := range oracle {
			if b.get(uint64(i)) != want {
				t.Fatalf("bit %d is %v", i, !want)
			}
			for _, value := range []bool{false, true} {
				hi := i + rng.IntN(size-i+1)
				next := slices.Index(oracle[i:hi], value)
				if next < 0 {
					next = hi - i
				}
				if got := b.next(uint64(i), uint64(hi), value); got != uint64(i+next) {
					t.Fatalf("next(%d, %d, %v) = %d, want %d", i, hi, value, got, i+next)
				}
			}
		}
	}
}
