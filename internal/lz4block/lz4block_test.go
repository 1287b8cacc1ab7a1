package lz4block

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"testing"

	"github.com/pierrec/lz4/v4"
)

// memory returns n bytes with what encoders meet: repeats near and far, records,
// text of few letters, long runs, and noise.
func memory(rnd *rand.Rand, n int) []byte {
	b := make([]byte, 0, n+1<<12)
	for len(b) < n {
		size := 1 + rnd.IntN(1<<rnd.IntN(12))
		switch kind := rnd.IntN(6); {
		case kind == 0:
			b = append(b, bytes.Repeat([]byte{byte(rnd.Uint32())}, size)...)
		case kind == 1 && len(b) > 0:
			from := len(b) - 1 - rnd.IntN(min(len(b), 1<<(1+rnd.IntN(17))))
			for i := range size {
				b = append(b, b[from+i])
			}
		case kind == 2:
			base := rnd.Uint64()
			for range size/8 + 1 {
				b = binary.LittleEndian.AppendUint64(b, base|rnd.Uint64N(1<<(8*rnd.UintN(3)))<<4)
			}
		case kind == 3:
			for range size {
				b = append(b, "etaoin \n"[rnd.IntN(8)])
			}
		default:
			for range size {
				b = append(b, byte(rnd.Uint32()))
			}
		}
	}
	return b[:n:n]
}

// check checks that block is src's, by the library, and keeps the rules for the
// end of a block, which decoders differ in.
func check(t *testing.T, block, src []byte) {
	t.Helper()
	if len(block) == 0 || len(block) > Bound(len(src)) {
		t.Fatalf("%d bytes make a block of %d, not 1 to %d", len(src), len(block), Bound(len(src)))
	}
	plain := make([]byte, len(src))
	n, err := lz4.UncompressBlock(block, plain)
	if err != nil || !bytes.Equal(plain[:n], src) {
		t.Fatalf("a block of %d bytes is decoded to %d with %v, or to others", len(src), n, err)
	}
	literals, start := ending(t, block)
	if start >= 0 && (literals < lastLiterals || start > len(src)-lastStart) {
		t.Fatalf("%d bytes: last match at %d, %d literals at the end", len(src), start, literals)
	}
}

// ending returns how many literals are at the end of a block, and where its last
// match starts, or -1 if there is none.
func ending(t *testing.T, block []byte) (literals, start int) {
	t.Helper()
	at, plain, start := 0, 0, -1
	length := func(half int) int {
		for more := half == inToken; more; {
			half, more = half+int(block[at]), block[at] == 255
			at++
		}
		return half
	}
	for {
		token := int(block[at])
		at++
		literals = length(token >> 4)
		at, plain = at+literals, plain+literals
		if at == len(block) {
			return literals, start
		}
		start, at = plain, at+2
		plain += length(token&15) + minMatch
	}
}

// portable is Encode as it is without assembly.
func (e *Encoder) portable(dst, src []byte) int {
	clear(e.table[:])
	b := block{table: &e.table, dst: dst, src: src, offset: 1}
	return b.encode(b.find())
}

// encode encodes src in both ways, which must agree.
func encode(t *testing.T, e *Encoder, dst, src []byte) []byte {
	t.Helper()
	want := make([]byte, len(dst))
	m := new(Encoder).portable(want, src)
	n := e.Encode(dst, src)
	if n != m || !bytes.Equal(dst[:n], want[:m]) {
		t.Fatalf("%d bytes to at most %d: this processor's way makes %d, the portable %d, or others", len(src), len(dst), n, m)
	}
	return dst[:n]
}

func TestRoundTrip(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	var e Encoder // one for all: what is left of one input must not touch the next
	sizes := []int{65535, 65536, 65537, 70000, 128 << 10, 1 << 20, 4 << 20}
	for n := range 600 {
		sizes = append(sizes, n)
	}
	for range 600 {
		sizes = append(sizes, rnd.IntN(70001))
	}
	rnd.Shuffle(len(sizes), func(i, j int) { sizes[i], sizes[j] = sizes[j], sizes[i] })
	for _, n := range sizes {
		src := memory(rnd, n)
		check(t, encode(t, &e, make([]byte, Bound(n)), src), src)
	}
}

func TestExtremes(t *testing.T) {
	rnd := rand.New(rand.NewPCG(3, 4))
	noise := make([]byte, 1<<20)
	for i := range noise {
		noise[i] = byte(rnd.Uint32())
	}
	apart := func(distance int) []byte { // equal halves whose bytes are that far from each other
		return append(bytes.Clone(noise[:distance]), noise[:distance]...)
	}
	var e Encoder
	for name, src := range map[string][]byte{
		"nothing": {}, "a byte": {1}, "zeros": make([]byte, 4<<20), "noise": noise,
		"farthest": apart(65535), "too far": apart(65536), "beyond": apart(65537),
		"ones": bytes.Repeat([]byte{255}, 128<<10), "pairs": bytes.Repeat([]byte{1, 2}, 64<<10),
	} {
		t.Run(name, func(t *testing.T) {
			check(t, encode(t, &e, make([]byte, Bound(len(src))), src), src)
		})
	}
}

// TestLengths crosses every place where a length takes one more byte, for both
// lengths of a sequence.
func TestLengths(t *testing.T) {
	rnd := rand.New(rand.NewPCG(5, 6))
	var e Encoder
	for n := range 800 {
		first, rest := make([]byte, n), make([]byte, 2000)
		for _, b := range [][]byte{first, rest} {
			for i := range b {
				b[i] = byte(rnd.Uint32())
			}
		}
		literals := append(append(first, make([]byte, 40)...), rest[:40]...)
		match := append(append(bytes.Clone(rest), rest[100:][:n]...), first...)
		for _, src := range [][]byte{literals, match} {
			check(t, encode(t, &e, make([]byte, Bound(len(src))), src), src)
		}
	}
}

// TestDeterministic: no block depends on those before.
func TestDeterministic(t *testing.T) {
	rnd := rand.New(rand.NewPCG(7, 8))
	src := memory(rnd, 128<<10)
	var e Encoder
	want := bytes.Clone(encode(t, &e, make([]byte, Bound(len(src))), src))
	for range 50 {
		other := memory(rnd, rnd.IntN(256<<10))
		encode(t, &e, make([]byte, Bound(len(other))), other)
		if got := encode(t, &e, make([]byte, Bound(len(src))), src); !bytes.Equal(got, want) {
			t.Fatal("the same input made another block")
		}
	}
}

func TestEncodeAllocatesNothing(t *testing.T) {
	src := memory(rand.New(rand.NewPCG(9, 10)), 64<<10)
	dst := make([]byte, Bound(len(src)))
	e := new(Encoder)
	if n := testing.AllocsPerRun(10, func() { e.Encode(dst, src) }); n != 0 {
		t.Errorf("%v allocations for a block", n)
	}
}

func FuzzEncode(f *testing.F) {
	rnd := rand.New(rand.NewPCG(11, 12))
	for _, n := range []int{0, 1, 12, 13, 31, 64, 300, 5000} {
		f.Add(memory(rnd, n), uint16(1), uint16(n))
	}
	f.Add(make([]byte, 100), uint16(700), uint16(40))
	var e Encoder
	f.Fuzz(func(t *testing.T, part []byte, repeat, room uint16) {
		src := part // repeated, to reach the lengths where distances and entries wrap
		for len(part) > 0 && len(src) < int(repeat)<<2 {
			src = append(src[:len(src):len(src)], part...)
		}
		block := encode(t, &e, make([]byte, Bound(len(src))), src)
		check(t, block, src)
		if got := encode(t, &e, make([]byte, room), src); len(got) != 0 && len(got) != len(block) {
			t.Fatalf("the block has %d bytes, or %d in a room of %d", len(block), len(got), room)
		} else if len(got) == 0 && int(room) >= len(block) {
			t.Fatalf("a block of %d bytes does not fit %d", len(block), room)
		}
	})
}
