package lz4block

import (
	"bytes"
	"math/rand/v2"
	"testing"

	"golang.org/x/sys/unix"
)

// guarded returns memory of up to size bytes between two pages that can't be accessed.
func guarded(t *testing.T, size int) []byte {
	t.Helper()
	const page = 4096
	size = (size + page - 1) &^ (page - 1)
	m, err := unix.Mmap(-1, 0, size+2*page, unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Munmap(m) })
	inner := m[page : page+size]
	if err := unix.Mprotect(inner, unix.PROT_READ|unix.PROT_WRITE); err != nil {
		t.Fatal(err)
	}
	return inner
}

// TestBounds puts inputs and blocks at either end of accessible memory, so that
// an access outside of them ends the process.
func TestBounds(t *testing.T) {
	const most = 150 << 10
	rnd := rand.New(rand.NewPCG(21, 22))
	in, out := guarded(t, most), guarded(t, Bound(most))
	var e Encoder
	for i := range 1500 {
		n := i
		if i >= 300 {
			n = rnd.IntN(1 << (9 + i%9))
		}
		n = min(n, most)
		plain := memory(rnd, n)
		for _, src := range [][]byte{in[len(in)-n:], in[:n:n]} {
			copy(src, plain)
			block := encode(t, &e, out[len(out)-Bound(n):], src)
			check(t, block, plain)
			size := len(block)
			if got := encode(t, &e, out[len(out)-size:], src); len(got) != size {
				t.Fatalf("%d bytes: %d in a room of %d", n, len(got), size)
			}
			if got := encode(t, &e, out[len(out)-size+1:], src); len(got) != 0 {
				t.Fatalf("%d bytes: %d in a room of %d", n, len(got), size-1)
			}
		}
	}
}

// TestRoom tries every length of dst.
func TestRoom(t *testing.T) {
	const canary = 0xa5
	rnd := rand.New(rand.NewPCG(23, 24))
	var e Encoder
	for _, n := range []int{0, 1, 20, 100, 1000, 4096, 20000} {
		src := memory(rnd, n)
		out := guarded(t, Bound(n)+1)
		want := bytes.Clone(encode(t, &e, make([]byte, Bound(n)), src))
		for room := range Bound(n) + 1 {
			for i := range out {
				out[i] = canary
			}
			dst := out[len(out)-room:]
			got := encode(t, &e, dst, src)
			if room < len(want) && len(got) != 0 || room >= len(want) && !bytes.Equal(got, want) {
				t.Fatalf("%d bytes, a block of %d: %d in a room of %d", n, len(want), len(got), room)
			}
			if before := out[:len(out)-room]; bytes.Count(before, []byte{canary}) != len(before) {
				t.Fatalf("%d bytes: written before a room of %d", n, room)
			}
		}
	}
}
