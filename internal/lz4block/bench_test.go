package lz4block_test

import (
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/pierrec/lz4/v4"

	"github.com/cryovisor/cryovisor/internal/lz4block"
	"github.com/cryovisor/cryovisor/internal/testvm"
)

const (
	chunk    = 128 << 10
	pageSize = 4096
)

// corpusMemory is n bytes of the pages of the benchmarks' guests that are not zero.
func corpusMemory(b *testing.B, n int) []byte {
	b.Helper()
	program, err := testvm.ProgramCorpus()
	if err != nil {
		b.Fatal(err)
	}
	c := testvm.NewCorpus(7, program)
	out, page := make([]byte, 0, n), make([]byte, pageSize)
	for i := uint64(0); len(out) < n; i++ {
		if c.Page(i, page) {
			out = append(out, page...)
		}
	}
	return out
}

// inputs are at least a chunk each.
func inputs(b *testing.B) map[string][]byte {
	b.Helper()
	root, err := exec.Command("go", "env", "GOROOT").Output()
	if err != nil {
		b.Skipf("no Go installation to take binaries and text from: %v", err)
	}
	read := func(pattern string) (out []byte) {
		files, _ := filepath.Glob(filepath.Join(strings.TrimSpace(string(root)), pattern))
		for _, f := range files {
			data, _ := os.ReadFile(f)
			out = append(out, data...)
		}
		if len(out) < chunk {
			b.Skipf("no Go installation to take %s from", pattern)
		}
		return out
	}
	rnd, noise := rand.New(rand.NewPCG(1, 2)), make([]byte, 8<<20)
	for i := range noise {
		noise[i] = byte(rnd.Uint32())
	}
	return map[string][]byte{
		"corpus":   corpusMemory(b, 48<<20),
		"binaries": read("bin/*"),
		"text":     read("src/net/http/*.go"),
		"noise":    noise,
	}
}

// BenchmarkEncode compares with the library's encoders, in chunks.
func BenchmarkEncode(b *testing.B) {
	var (
		own   lz4block.Encoder
		small lz4.Compressor
		large lz4.CompressorCCompat
	)
	dst := make([]byte, lz4block.Bound(chunk))
	ways := []struct {
		name   string
		encode func(src []byte) (int, error)
	}{
		{"lz4block", func(src []byte) (int, error) { return own.Encode(dst, src), nil }},
		{"pierrec", func(src []byte) (int, error) { return small.CompressBlock(src, dst) }},
		{"pierrec-ccompat", func(src []byte) (int, error) { return large.CompressBlock(src, dst) }},
	}
	for name, data := range inputs(b) {
		data = data[:len(data)/chunk*chunk]
		for _, way := range ways {
			b.Run(name+"/"+way.name, func(b *testing.B) {
				b.SetBytes(int64(len(data)))
				packed := 0
				for b.Loop() {
					packed = 0
					for at := 0; at < len(data); at += chunk {
						n, err := way.encode(data[at : at+chunk])
						if err != nil {
							b.Fatal(err)
						}
						if n == 0 { // the library's way to say that nothing is saved
							n = chunk
						}
						packed += n
					}
				}
				b.ReportMetric(float64(len(data))/float64(packed), "ratio")
			})
		}
	}
}
