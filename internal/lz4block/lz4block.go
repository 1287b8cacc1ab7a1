// Package lz4block encodes LZ4 blocks fast, at the ratio of other fast encoders.
// It is made for chunks of guest memory, of which 128 KiB is the usual size. A
// block is not a frame: it has no header and no checksum, and whoever decodes it
// must know its length and the input's.
//
// On amd64 the work is done by assembly that needs nothing but SSE2. Elsewhere
// it is done in Go. The output is a function of the input alone and is the same
// on all systems.
package lz4block

import (
	"encoding/binary"
	"math/bits"
)

// What follows is from https://github.com/lz4/lz4/blob/dev/doc/lz4_Block_format.md:
// a block is a row of sequences, each of literals and a match, which copies at
// least minMatch bytes from at most 65535 bytes before. The last sequence has no
// match. By the rules for the end of a block, its last 5 bytes are literals and
// its last match starts at least 12 bytes before the end.
const (
	minMatch     = 4
	lastLiterals = 5
	lastStart    = 12

	// Both lengths of a sequence share a byte, the token. A length that doesn't
	// fit its half goes on in bytes of its own, up to one that is not 255.
	inToken = 15
)

// How matches are sought. These decide the output, so gen must have the same.
const (
	tableBits = 13
	// hashMul hashes the low 6 bytes of a word, whose product with it is in the
	// high bits of the product of the whole: 2^48 by the golden ratio, shifted.
	hashMul = 0x9e3779b185eb << 16

	// Of stride bytes, two are looked at. The stride grows by one every 64 bytes
	// that have no match, so that incompressible memory is passed quickly.
	stride      = 3
	strideShift = 6

	// tail is how much of the input is behind the last byte where a search can
	// start: it looks for a match one byte further on, too.
	tail = lastStart + 1
)

// Encoder makes blocks. It holds the table of what was seen where, so that no
// call needs to allocate; nothing of one call has an influence on the next. The
// zero value is ready. An Encoder belongs to one goroutine at a time.
type Encoder struct {
	table table
}

// table has for each hash the low 16 bits of the position that had it last.
//
// The position itself is taken to be at most 65535 before the one that asks: its
// distance is then the difference modulo 2^16, and a distance of 0 means that
// there is none. An entry may thus be out of date, but never points outside of
// the input: up to position 65535 entries are those of lower positions or 0, and
// beyond, no distance leads before the input. What it points at is compared, as
// it must be for the collisions anyway.
type table [1 << tableBits]uint16

// Bound returns the size of the longest block that n bytes can make.
func Bound(n int) int {
	return n + n/255 + 16
}

// Encode writes the block of src to dst and returns its length, or 0 if dst is
// too short for it. With Bound(len(src)) bytes it never is. A dst shorter than
// src is the way to ask for a block only if it saves something; its contents are
// undefined after a 0. The two must not overlap and src must not change meanwhile.
func (e *Encoder) Encode(dst, src []byte) int {
	clear(e.table[:])
	b := block{table: &e.table, dst: dst, src: src, offset: 1}
	return b.encode(b.first())
}

// block is a block in the making.
type block struct {
	table    *table
	dst, src []byte
	used     int // bytes of dst
	done     int // bytes of src that are in dst

	// The match that comes next, src[start:end], and how far before it the same
	// bytes are. The offset is that of the match before until one is found.
	start, end, offset int
}

// encode makes the rest of the block. found says that there is a match already.
func (b *block) encode(found bool) int {
	for found {
		b.extend()
		if !b.putSequence() {
			return 0
		}
		found = b.find()
	}
	return b.finish()
}

// find looks for the next match and returns whether there is one. Its end is not
// final.
func (b *block) find() bool {
	src, t := b.src, b.table
	s, limit := max(b.done, 1), len(src)-tail
	if s > limit {
		return false
	}
	if s > 1 {
		t[hash(load64(src, s-2))] = uint16(s - 2)
	}
	for s <= limit {
		v := load64(src, s)
		near := &t[hash(v)]
		nearOffset := int(uint16(s) - *near)
		*near = uint16(s)
		next := &t[hash(v>>8)]
		nextOffset := int(uint16(s+1) - *next)
		*next = uint16(s + 1)
		switch {
		// Memory that is made of records of one type repeats at one distance.
		case load32(src, s+1-b.offset) == uint32(v>>8):
			b.match(s+1, b.offset)
			return true
		case load32(src, s-nearOffset) == uint32(v) && nearOffset != 0:
			b.match(s, nearOffset)
			return true
		case load32(src, s+1-nextOffset) == uint32(v>>8) && nextOffset != 0:
			b.match(s+1, nextOffset)
			return true
		}
		s += stride + (s-b.done)>>strideShift
	}
	return false
}

// match notes that the bytes at s are those at offset before, and how many bytes
// before s are the same too. It looks at 8 at most, if there are so many.
func (b *block) match(s, offset int) {
	b.start, b.end, b.offset = s, s+minMatch, offset
	if s-offset < 8 {
		return
	}
	differ := load64(b.src, s-8) ^ load64(b.src, s-8-offset)
	b.start -= min(bits.LeadingZeros64(differ)/8, s-b.done)
}

// extend moves the end of the match as far as it can be.
func (b *block) extend() {
	src, limit, end := b.src, len(b.src)-lastLiterals, b.end
	for ; end+8 <= limit; end += 8 {
		if differ := load64(src, end) ^ load64(src, end-b.offset); differ != 0 {
			b.end = end + bits.TrailingZeros64(differ)/8
			return
		}
	}
	for end < limit && src[end] == src[end-b.offset] {
		end++
	}
	b.end = end
}

// putSequence writes the literals up to the match and the match. It returns
// false, and has written nothing, if there is no room.
func (b *block) putSequence() bool {
	length := b.end - b.start - minMatch
	const offsetSize = 2
	if !b.putLiterals(b.start, length, offsetSize+lengthSize(length)) {
		return false
	}
	binary.LittleEndian.PutUint16(b.dst[b.used:], uint16(b.offset))
	b.used += offsetSize
	b.putLength(length)
	b.done = b.end
	return true
}

// finish writes the last sequence and returns the length of the block, or 0.
func (b *block) finish() int {
	if !b.putLiterals(len(b.src), 0, 0) {
		return 0
	}
	return b.used
}

// putLiterals writes the token and the literals up to start of a sequence whose
// match has the given length over minMatch. It returns false, and has written
// nothing, if they and another more bytes have no room.
func (b *block) putLiterals(start, length, more int) bool {
	literals := b.src[b.done:start]
	if 1+lengthSize(len(literals))+len(literals)+more > len(b.dst)-b.used {
		return false
	}
	b.dst[b.used] = byte(min(len(literals), inToken)<<4 | min(length, inToken))
	b.used++
	b.putLength(len(literals))
	b.used += copy(b.dst[b.used:], literals)
	return true
}

// lengthSize is how many bytes a length takes besides its part of the token.
func lengthSize(n int) int {
	if n < inToken {
		return 0
	}
	return (n-inToken)/255 + 1
}

// putLength writes the part of a length that is not in the token.
func (b *block) putLength(n int) {
	if n < inToken {
		return
	}
	for n -= inToken; n >= 255; n -= 255 {
		b.dst[b.used] = 255
		b.used++
	}
	b.dst[b.used] = byte(n)
	b.used++
}

func hash(v uint64) uint64 { return v * hashMul >> (64 - tableBits) }

func load32(b []byte, at int) uint32 { return binary.LittleEndian.Uint32(b[at:]) }

func load64(b []byte, at int) uint64 { return binary.LittleEndian.Uint64(b[at:]) }
