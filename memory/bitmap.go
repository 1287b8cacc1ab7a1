package memory

import (
	"math/bits"
	"sync/atomic"
)

// A bitmap has one bit for each page of the guest physical address space.
// Setting one publishes what its setter did before.
type bitmap []atomic.Uint64

func newBitmap(n uint64) bitmap { return make(bitmap, (n+63)/64) }

func (b bitmap) get(i uint64) bool { return b[i/64].Load()&(1<<(i%64)) != 0 }

// set sets the bits [lo, hi), and says how many of them were not set.
func (b bitmap) set(lo, hi uint64) (changed int) {
	for lo < hi {
		n := min(64-lo%64, hi-lo)
		mask := (^uint64(0) >> (64 - n)) << (lo % 64)
		changed += bits.OnesCount64(mask &^ b[lo/64].Or(mask))
		lo += n
	}
	return changed
}

// clear clears the bits [lo, hi), and says how many of them were set.
func (b bitmap) clear(lo, hi uint64) (changed int) {
	for lo < hi {
		n := min(64-lo%64, hi-lo)
		mask := (^uint64(0) >> (64 - n)) << (lo % 64)
		changed += bits.OnesCount64(mask & b[lo/64].And(^mask))
		lo += n
	}
	return changed
}

// count is how many bits are set.
func (b bitmap) count() (n uint64) {
	for i := range b {
		n += uint64(bits.OnesCount64(b[i].Load()))
	}
	return n
}

// next returns the first i in [lo, hi) whose bit is want, or hi.
func (b bitmap) next(lo, hi uint64, want bool) uint64 {
	for lo < hi {
		w := b[lo/64].Load()
		if !want {
			w = ^w
		}
		if w >>= lo % 64; w != 0 {
			return min(lo+uint64(bits.TrailingZeros64(w)), hi)
		}
		lo += 64 - lo%64
	}
	return hi
}
