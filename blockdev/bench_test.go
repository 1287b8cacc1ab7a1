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
	dir := benchDir(b)
	base := newFullImage(b, filepath.Join(dir, "base"), size)
	for _, blockSize := range []int{4096, 16384, 65536} {
		o := overlayWrites{path: filepath.Join(dir, "overlay"), base: base, blockSize: blockSize}
		b.Run(fmt.Sprintf("block=%d/random4k", blockSize), func(b *testing.B) { o.run(b, 4096, 4096, true) })
		b.Run(fmt.Sprintf("block=%d/sequential128k", blockSize), func(b *testing.B) { o.run(b, 128<<10, 1024, false) })
	}
}

// benchDir makes a directory for the files of a benchmark.
func benchDir(b *testing.B) string {
	b.Helper()
	dir, err := os.MkdirTemp(cmp.Or(os.Getenv("CRYOVISOR_BENCH_DIR"), b.TempDir()), "cryovisor-bench-")
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
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

// BenchmarkOverlayWrite4K writes 4 KiB at random places of an overlay that has 256 MiB already: what it costs to note what changes,
// and to ask a Still, all of which has been read. "copied" is writes each of which is the first in its 256 KiB: it copies them.
func BenchmarkOverlayWrite4K(b *testing.B) {
	const size = 256 << 20
	o := fullOverlay(b, size)
	all := []blockdev.Extent{{Off: 0, Len: size}}
	b.Run("plain", func(b *testing.B) { write4K(b, o) })
	b.Run("tracked", func(b *testing.B) {
		o.TrackWrites(true)
		defer o.TrackWrites(false)
		write4K(b, o)
	})
	b.Run("frozen", func(b *testing.B) {
		s := mustFreeze(b, o, all)
		defer s.Close()
		p := make([]byte, 1<<20)
		for off := int64(0); off < size; off += int64(len(p)) {
			if _, err := s.ReadAt(p, off); err != nil {
				b.Fatal(err)
			}
		}
		write4K(b, o)
	})
	b.Run("copied", func(b *testing.B) {
		const writes = 64 // no more than there may be copies
		p := make([]byte, 4096)
		for b.Loop() {
			b.StopTimer()
			s := mustFreeze(b, o, all)
			b.StartTimer()
			for i := range int64(writes) {
				if _, err := o.WriteAt(p, i<<20); err != nil {
					b.Fatal(err)
				}
			}
			b.StopTimer()
			s.Close()
			b.StartTimer()
		}
		b.ReportMetric(float64(b.Elapsed().Nanoseconds())/1e3/float64(b.N*writes), "us/write")
		b.ReportMetric(0, "ns/op")
	})
}

func write4K(b *testing.B, o *blockdev.Overlay) {
	rnd := rand.New(rand.NewPCG(1, 0))
	p := make([]byte, 4096)
	for b.Loop() {
		if _, err := o.WriteAt(p, rnd.Int64N(o.Size()>>12)<<12); err != nil {
			b.Fatal(err)
		}
	}
}

// fullOverlay makes an overlay, on nothing, that has all of its blocks.
func fullOverlay(b *testing.B, size int64) *blockdev.Overlay {
	b.Helper()
	o := newOverlay(b, size)
	p := make([]byte, 1<<20)
	rand.NewChaCha8([32]byte{1}).Read(p)
	for off := int64(0); off < size; off += int64(len(p)) {
		if _, err := o.WriteAt(p, off); err != nil {
			b.Fatal(err)
		}
	}
	return o
}

func newOverlay(b *testing.B, size int64) *blockdev.Overlay {
	b.Helper()
	o, err := blockdev.CreateOverlay(filepath.Join(benchDir(b), "overlay"), nil, blockdev.OverlayOptions{Size: size})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = o.Remove() })
	return o
}

func mustFreeze(b *testing.B, o *blockdev.Overlay, blocks []blockdev.Extent) *blockdev.Still {
	b.Helper()
	s, err := o.Freeze(blocks, nil)
	if err != nil {
		b.Fatal(err)
	}
	return s
}

// BenchmarkTakeWrites asks which blocks of a TiB have changed: none, and 1000 anywhere.
func BenchmarkTakeWrites(b *testing.B) {
	const size = 1 << 40
	o := newOverlay(b, size)
	o.TrackWrites(true)
	for _, n := range []int{0, 1000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			for b.Loop() {
				b.StopTimer()
				for i := range int64(n) {
					if err := o.Discard(i*(size/1000)&^4095, 4096); err != nil {
						b.Fatal(err)
					}
				}
				b.StartTimer()
				if got := o.TakeWrites(); len(got) != n {
					b.Fatalf("%d extents", len(got))
				}
			}
		})
	}
}

// BenchmarkFreeze freezes a disk of a TiB of which some MiB have changed, in one piece: it is part of the time that a machine
// stands still.
func BenchmarkFreeze(b *testing.B) {
	o := newOverlay(b, 1<<40)
	for _, mib := range []int64{64, 1024, 16384} {
		b.Run(fmt.Sprintf("%dMiB", mib), func(b *testing.B) {
			for b.Loop() {
				s := mustFreeze(b, o, []blockdev.Extent{{Off: 0, Len: mib << 20}})
				b.StopTimer()
				s.Close()
				b.StartTimer()
			}
		})
	}
}
