package testvm

import (
	"bytes"
	"testing"

	"github.com/pierrec/lz4/v4"
)

func programCorpus(t testing.TB) []byte {
	t.Helper()
	b, err := ProgramCorpus()
	must(t, err)
	return b
}

// TestContentIsLikeMemory checks what the contents promise: shares of zero pages
// and how well the others compress, so that measurements mean something.
func TestContentIsLikeMemory(t *testing.T) {
	for name, c := range map[string]Content{
		"corpus":  NewCorpus(7, programCorpus(t)),
		"pattern": NewPattern(7),
	} {
		for _, chunk := range []int{64 << 10, 256 << 10} {
			zeros, ratio := compress(t, c, 64<<20, chunk)
			t.Logf("%s: %.1f %% zero pages; LZ4, %d KiB chunks, the others: %.2f", name, zeros*100, chunk>>10, ratio)
			if zeros < 0.2 || zeros > 0.3 {
				t.Errorf("%s has %.2f of zero pages, want 0.2 to 0.3", name, zeros)
			}
			if ratio < 2.2 || ratio > 3.2 {
				t.Errorf("%s compresses to 1/%.2f, want 1/2.2 to 1/3.2", name, ratio)
			}
		}
	}
}

// compress returns the share of zero pages in size bytes of content, and how much
// smaller LZ4 makes the others, in chunks.
func compress(t testing.TB, c Content, size, chunk int) (zeros, ratio float64) {
	t.Helper()
	var z lz4.Compressor
	in, out := make([]byte, 0, chunk), make([]byte, lz4.CompressBlockBound(chunk))
	packed, stored, zero := 0, 0, 0
	flush := func() {
		n, err := z.CompressBlock(in, out)
		must(t, err)
		if n == 0 {
			n = len(in)
		}
		stored, packed, in = stored+len(in), packed+n, in[:0]
	}
	for p := range size / pageSize {
		n := len(in)
		if !c.Page(uint64(p), in[n:n+pageSize]) {
			zero++
			continue
		}
		if in = in[:n+pageSize]; len(in) == chunk {
			flush()
		}
	}
	return float64(zero*pageSize) / float64(size), float64(stored) / float64(packed)
}

func TestContentIsRepeatable(t *testing.T) {
	program := programCorpus(t)
	a, b, other := NewCorpus(7, program), NewCorpus(7, program), NewCorpus(8, program)
	seen := make(map[string]uint64)
	same := 0
	for p := range uint64(16 << 8) {
		x, y, z := make([]byte, pageSize), make([]byte, pageSize), make([]byte, pageSize)
		nonzero := a.Page(p, x)
		if nonzero != b.Page(p, y) || !bytes.Equal(x, y) {
			t.Fatalf("page %d is not always the same", p)
		}
		if nonzero == bytes.Equal(x, make([]byte, pageSize)) {
			t.Fatalf("page %d: Page returns %v", p, nonzero)
		}
		if first, ok := seen[string(x)]; nonzero && ok {
			t.Fatalf("pages %d and %d are equal", first, p)
		}
		seen[string(x)] = p
		if other.Page(p, z); bytes.Equal(x, z) {
			same++
		}
	}
	if same > 2048 { // zero pages of both
		t.Errorf("%d of 4096 pages don't depend on the seed", same)
	}
}

func BenchmarkContent(b *testing.B) {
	for name, c := range map[string]Content{"corpus": NewCorpus(7, programCorpus(b)), "pattern": NewPattern(7)} {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(pageSize)
			dst := make([]byte, pageSize)
			p := uint64(0)
			for b.Loop() {
				c.Page(p, dst)
				p++
			}
		})
	}
}

func BenchmarkModel(b *testing.B) {
	w, err := NewWorker(WorkerConfig{Memory: 1 << 30, Every: 1, AVX2: true})
	must(b, err)
	m := NewModel(w, NewCorpus(7, programCorpus(b)))
	for b.Loop() {
		m.Next(0)
	}
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "steps/s")
}
