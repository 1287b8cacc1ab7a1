//go:build linux && amd64

package memory_test

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/cryovisor/cryovisor/memory"
	"golang.org/x/sys/unix"
)

// A linear source has chunks of one size, one after the other, whose contents
// cost nothing to make; or nothing but zeros.
type linear struct {
	size  uint64
	chunk []byte // nil: all zero
}

func (l *linear) Lookup(gpa uint64) (start, length uint64, chunk int64) {
	if l.chunk == nil {
		return 0, l.size, -1
	}
	n := uint64(len(l.chunk))
	return gpa / n * n, n, int64(gpa / n)
}

func (l *linear) Fetch(_ context.Context, chunk int64, install func(uint64, []byte) error) error {
	return install(uint64(chunk)*uint64(len(l.chunk)), l.chunk)
}

func (l *linear) Chunks() int64 {
	if l.chunk == nil {
		return 0
	}
	return int64(l.size) / int64(len(l.chunk))
}

// benchFaults has a system call touch one byte of each step of a new mapping. p50 and
// p99 are of a touch, seen from outside, and of the pager's part by its own account.
func benchFaults(b *testing.B, src *linear, step uint64, write bool) {
	p := []byte{1}
	var m *memory.Memory
	var tc *toucher
	gpa := src.size
	var spent memory.Stats
	var took []time.Duration
	drop := func() {
		if m == nil {
			return
		}
		s := m.Stats()
		spent.Faults += s.Faults
		spent.FaultTime += s.FaultTime
		for i, n := range s.Latency {
			spent.Latency[i] += n
		}
		tc.close()
		m.Close()
	}
	for b.Loop() {
		if gpa >= src.size {
			b.StopTimer()
			drop()
			img, err := memory.NewImage(src.size, src)
			if err != nil {
				b.Fatal(err)
			}
			m = mapImage(b, img, memory.MapOptions{})
			img.Close()
			if tc, err = newToucher(m); err != nil {
				b.Fatal(err)
			}
			gpa = 0
			b.StartTimer()
		}
		var err error
		start := time.Now()
		if write {
			err = tc.store(p, gpa)
		} else {
			_, err = tc.call(unix.SYS_PWRITE64, gpa, 1)
		}
		if err != nil {
			b.Fatal(err)
		}
		took = append(took, time.Since(start))
		gpa += step
	}
	drop()
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2].Nanoseconds())/1e3, "p50-us")
	b.ReportMetric(float64(took[len(took)*99/100].Nanoseconds())/1e3, "p99-us")
	b.ReportMetric(float64(spent.Latency.Quantile(0.99).Nanoseconds())/1e3, "pager-p99-us")
	b.ReportMetric(float64(spent.FaultTime.Microseconds())/float64(max(1, spent.Faults)), "pager-us/fault")
}

func BenchmarkFault(b *testing.B) {
	for _, size := range []uint64{4 << 10, 64 << 10, 128 << 10, 256 << 10} {
		b.Run(fmt.Sprintf("%dKiB", size>>10), func(b *testing.B) {
			chunk := make([]byte, size)
			for i := range chunk {
				chunk[i] = byte(i) | 1
			}
			benchFaults(b, &linear{256 * mib, chunk}, size, false)
		})
	}
	// Every page in turn, of which the first of each chunk is missing.
	b.Run("128KiB-all-pages", func(b *testing.B) {
		benchFaults(b, &linear{256 * mib, bytes.Repeat([]byte{1}, 128<<10)}, page, false)
	})
	b.Run("zero-window", func(b *testing.B) { benchFaults(b, &linear{size: 2 * gib}, mib, false) })
	b.Run("zero-page", func(b *testing.B) { benchFaults(b, &linear{size: 256 * mib}, page, false) })
}

func BenchmarkAccess(b *testing.B) {
	o := &linear{64 * mib, make([]byte, 64<<10)}
	img := newImageOf(b, o)
	m := mapImage(b, img, memory.MapOptions{})
	if err := m.Populate(context.Background()); err != nil {
		b.Fatal(err)
	}
	for _, n := range []int{2, 4096, 65536} {
		p := make([]byte, n)
		b.Run(fmt.Sprintf("read-%d", n), func(b *testing.B) {
			b.SetBytes(int64(n))
			for b.Loop() {
				if _, err := m.ReadAt(p, 12*mib); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func newImageOf(b *testing.B, src *linear) *memory.Image {
	img, err := memory.NewImage(src.size, src)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { img.Close() })
	return img
}

// BenchmarkFirstTouch has the kernel write to all pages of a machine that boots.
func BenchmarkFirstTouch(b *testing.B) {
	for _, small := range []bool{false, true} {
		b.Run(fmt.Sprintf("small=%v", small), func(b *testing.B) {
			b.SetBytes(gib)
			zero := make([]byte, mib)
			for b.Loop() {
				m, err := memory.New(gib, memory.Options{SmallPages: small})
				if err != nil {
					b.Fatal(err)
				}
				for gpa := int64(0); gpa < gib; gpa += mib {
					if _, err := m.WriteAt(zero, gpa); err != nil {
						b.Fatal(err)
					}
				}
				m.Close()
			}
		})
	}
}

// BenchmarkDirty looks for one written page in a hundred of 1 GiB.
func BenchmarkDirty(b *testing.B) {
	m := newCold(b, gib, memory.Options{SmallPages: true})
	for gpa := int64(0); gpa < gib; gpa += 100 * page {
		if _, err := m.WriteAt([]byte{1}, gpa); err != nil {
			b.Fatal(err)
		}
	}
	for b.Loop() {
		if _, err := m.Dirty(context.Background()); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkPopulate fills an image of 1 GiB from a source that costs nothing.
func BenchmarkPopulate(b *testing.B) {
	b.SetBytes(gib)
	src := &linear{gib, make([]byte, 256<<10)}
	for b.Loop() {
		img, err := memory.NewImage(src.size, src)
		if err != nil {
			b.Fatal(err)
		}
		if err := img.Populate(context.Background()); err != nil {
			b.Fatal(err)
		}
		img.Close()
	}
}

// BenchmarkMap makes and closes the memory of a machine, without touching it.
func BenchmarkMap(b *testing.B) {
	for _, size := range []uint64{gib, 16 * gib, 64 * gib} {
		b.Run(fmt.Sprintf("%dGiB", size/gib), func(b *testing.B) {
			img := newImageOf(b, &linear{size: size})
			for b.Loop() {
				m, err := img.Map(context.Background(), memory.MapOptions{})
				if err != nil {
					b.Fatal(err)
				}
				m.Close()
			}
		})
	}
}

// benchStillKinds are the kinds of memory whose pages differ to the kernel.
var benchStillKinds = map[string]func(b *testing.B, size uint64) *memory.Memory{
	"small": func(b *testing.B, size uint64) *memory.Memory {
		return newCold(b, size, memory.Options{SmallPages: true})
	},
	"huge": func(b *testing.B, size uint64) *memory.Memory { return newCold(b, size, memory.Options{}) },
	"memfd": func(b *testing.B, size uint64) *memory.Memory {
		return mapImage(b, newImageOf(b, &linear{size, make([]byte, 256<<10)}), memory.MapOptions{})
	},
}

func touchedFor(b *testing.B, machine func(*testing.B, uint64) *memory.Memory) *memory.Memory {
	b.Helper()
	m := machine(b, gib)
	for gpa := int64(0); gpa < gib; gpa += page {
		if _, err := m.WriteAt([]byte{1}, gpa); err != nil {
			b.Fatal(err)
		}
	}
	return m
}

// BenchmarkProtect protects 1 GiB while the machine would run, freezes it, and lets
// all go: when nobody has written meanwhile, when a tenth was, in 256 KiB each, and
// when Protect was told to expect nothing.
func BenchmarkProtect(b *testing.B) {
	for kind, machine := range benchStillKinds {
		m := touchedFor(b, machine)
		dirty := mustDirty(b, m)
		b.Run(kind+"/quiet", func(b *testing.B) { benchProtect(b, m, dirty, dirty, gib) })
		b.Run(kind+"/a tenth written", func(b *testing.B) { benchProtect(b, m, dirty, dirty, 10*unit) })
		b.Run(kind+"/unexpected", func(b *testing.B) { benchProtect(b, m, nil, dirty, gib) })
		m.Close()
	}
}

// benchProtect writes once in each step between Protect and Freeze.
func benchProtect(b *testing.B, m *memory.Memory, expected, dirty []memory.Range, step int64) {
	var times [3][]time.Duration
	for b.Loop() {
		start := time.Now()
		s := protect(b, m, expected)
		times[0] = append(times[0], time.Since(start))
		for gpa := int64(0); gpa < gib; gpa += step {
			if _, err := m.WriteAt([]byte{1}, gpa); err != nil {
				b.Fatal(err)
			}
		}
		start = time.Now()
		if err := s.Freeze(dirty); err != nil {
			b.Fatal(err)
		}
		times[1] = append(times[1], time.Since(start))
		start = time.Now()
		if err := s.Close(); err != nil {
			b.Fatal(err)
		}
		times[2] = append(times[2], time.Since(start))
	}
	for i, name := range []string{"protect", "freeze", "close"} {
		slices.Sort(times[i])
		b.ReportMetric(float64(times[i][len(times[i])/2].Microseconds())/1e3, name+"-ms/GiB")
	}
}

// BenchmarkStillFault has a system call write to memory that is protected, a page of
// each 256 KiB, while the Still is read behind it. p50 and p99 are of a write.
func BenchmarkStillFault(b *testing.B) {
	for kind, machine := range benchStillKinds {
		b.Run(kind, func(b *testing.B) {
			m := touchedFor(b, machine)
			tc := mustToucher(b, m)
			dirty := mustDirty(b, m)
			p := []byte{1}
			var took []time.Duration
			var s *still
			buf := make([]byte, unit)
			gpa := uint64(gib)
			for b.Loop() {
				if gpa >= gib {
					b.StopTimer()
					s = reopen(b, m, s, dirty)
					gpa = 0
					b.StartTimer()
				}
				start := time.Now()
				if err := tc.store(p, gpa); err != nil {
					b.Fatal(err)
				}
				took = append(took, time.Since(start))
				if _, err := s.ReadAt(buf, int64(gpa)); err != nil {
					b.Fatal(err)
				}
				gpa += unit
			}
			slices.Sort(took)
			b.ReportMetric(float64(took[len(took)/2].Nanoseconds())/1e3, "p50-us")
			b.ReportMetric(float64(took[len(took)*99/100].Nanoseconds())/1e3, "p99-us")
		})
	}
}

// reopen closes s and makes another Still of m.
func reopen(b *testing.B, m *memory.Memory, s *still, dirty []memory.Range) *still {
	b.Helper()
	if s != nil {
		if err := s.Close(); err != nil {
			b.Fatal(err)
		}
	}
	s = protect(b, m, dirty)
	if err := s.Freeze(dirty); err != nil {
		b.Fatal(err)
	}
	return s
}

// BenchmarkReclaim looks at an image of 1 GiB when its machine has written nothing
// (clean), gives it back when that has rewritten everything (all), and looks once more
// (idle).
func BenchmarkReclaim(b *testing.B) {
	src := &linear{gib, make([]byte, 128<<10)}
	pass := func(b *testing.B, img *memory.Image, want uint64) time.Duration {
		start := time.Now()
		if freed, err := img.Reclaim(context.Background()); err != nil || freed != want {
			b.Fatalf("freed %d bytes (%v), want %d", freed, err, want)
		}
		return time.Since(start)
	}
	var took [3]time.Duration
	for b.Loop() {
		img := newImageOf(b, src)
		m := mapImage(b, img, memory.MapOptions{})
		if err := m.Populate(context.Background()); err != nil {
			b.Fatal(err)
		}
		took[0] += pass(b, img, 0)
		for gpa := int64(0); gpa < gib; gpa += page {
			if _, err := m.WriteAt([]byte{1}, gpa); err != nil {
				b.Fatal(err)
			}
		}
		took[1] += pass(b, img, gib)
		took[2] += pass(b, img, 0)
		if n, err := img.Held(); err != nil || n != 0 {
			b.Fatalf("the image holds %d bytes (%v)", n, err)
		}
		m.Close()
		img.Close()
	}
	for i, name := range []string{"clean", "all", "idle"} {
		b.ReportMetric(float64(took[i].Microseconds())/1e3/float64(b.N), name+"-ms/GiB")
	}
}
