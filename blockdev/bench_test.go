//go:build unix

package blockdev_test

import (
	"cmp"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/cryovisor/cryovisor/blockdev"
)

// BenchmarkOverlayBlockSize writes to a new overlay of 256 MiB over a raw image that is full: 4 KiB each at different random
// places, and 128 KiB each one after another. What the file takes afterwards is the price of larger blocks. The files go to the
// directory in $CRYOVISOR_BENCH_DIR, if it is set; a flush is not part of the time.
func BenchmarkOverlayBlockSize(b *testing.B) {
	const size = 256 << 20
	dir, err := os.MkdirTemp(cmp.Or(os.Getenv("CRYOVISOR_BENCH_DIR"), b.TempDir()), "cryovisor-bench-")
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = os.RemoveAll(dir) })
	base := newFullImage(b, filepath.Join(dir, "base"), size)
	for _, blockSize := range []int{4096, 16384, 65536} {
		o := overlayWrites{path: filepath.Join(dir, "overlay"), base: base, blockSize: blockSize}
		b.Run(fmt.Sprintf("block=%d/random4k", blockSize), func(b *testing.B) { o.run(b, 4096, 4096, true) })
		b.Run(fmt.Sprintf("block=%d/sequential128k", blockSize), func(b *testing.B) { o.run(b, 128<<10, 1024, false) })
	}
}

// overlayWrites is where overlays are made, and with which block size.
type overlayWrites struct {
	path      string
	base      *blockdev.File
	blockSize int
}

// run writes n different units, of some size in bytes, to an overlay.
func (w *overlayWrites) run(b *testing.B, unit, n int, random bool) {
	rnd := rand.New(rand.NewPCG(1, 0))
	p := make([]byte, unit)
	rand.NewChaCha8([32]byte{1}).Read(p)
	units := make([]int, w.base.Size()/int64(unit))
	for i := range units {
		units[i] = i
	}
	taken := int64(0)
	for b.Loop() {
		b.StopTimer()
		if random {
			rnd.Shuffle(len(units), func(i, j int) { units[i], units[j] = units[j], units[i] })
		}
		o, err := blockdev.CreateOverlay(w.path, w.base, blockdev.OverlayOptions{Size: w.base.Size(), BlockSize: w.blockSize})
		if err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
		for _, i := range units[:n] {
			if _, err := o.WriteAt(p, int64(i)*int64(unit)); err != nil {
				b.Fatal(err)
			}
		}
		b.StopTimer()
		taken = allocated(b, o)
		if err := o.Remove(); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/1e3/float64(b.N*n), "us/write")
	b.ReportMetric(float64(taken)/float64(n*unit), "allocated/written")
	b.ReportMetric(float64(taken)/(1<<20), "MiB-allocated")
	b.ReportMetric(0, "ns/op")
}

// newFullImage makes a raw image without holes, and opens it.
func newFullImage(b *testing.B, path string, size int) *blockdev.File {
	b.Helper()
	content := make([]byte, size)
	rand.NewChaCha8([32]byte{}).Read(content)
	if err := os.WriteFile(path, content, 0o600); err != nil {
		b.Fatal(err)
	}
	f, err := blockdev.OpenFile(path, blockdev.Options{ReadOnly: true})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		if err := f.Close(); err != nil {
			b.Error(err)
		}
	})
	return f
}

// allocated is the space that an overlay's file takes, in bytes.
func allocated(b *testing.B, o *blockdev.Overlay) int64 {
	b.Helper()
	err := o.Flush()
	info, serr := os.Stat(o.Path())
	if err = errors.Join(err, serr); err != nil {
		b.Fatal(err)
	}
	return info.Sys().(*syscall.Stat_t).Blocks * 512
}
