package testvm

import "encoding/binary"

// Pattern is the content that a worker writes itself: a quarter of the pages are
// zero, the others compress about as well as real memory does.
type Pattern struct{ seed uint64 }

// NewPattern returns the content that a worker of that seed writes with Fill.
func NewPattern(seed uint64) *Pattern { return &Pattern{seed} }

// Page implements Content.
func (p *Pattern) Page(page uint64, dst []byte) bool {
	h := scramble(page*multiplier + p.seed)
	if h&3 == 0 {
		clear(dst)
		return false
	}
	le := binary.LittleEndian
	x := h
	for ; len(dst) >= 64; dst = dst[64:] {
		x = xorshift(x)
		le.PutUint64(dst, x)
		x = xorshift(x)
		le.PutUint64(dst[8:], x)
		x = xorshift(x)
		le.PutUint64(dst[16:], uint64(uint32(x)))
		for i := 24; i < 64; i += 8 {
			le.PutUint64(dst[i:], h)
		}
	}
	return true
}

// xorshift is a step of Marsaglia's xorshift64 with 13, 7, 17.
func xorshift(x uint64) uint64 {
	x ^= x << 13
	x ^= x >> 7
	return x ^ x<<17
}
