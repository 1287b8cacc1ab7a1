//go:build linux && amd64

package bench

import (
	"bufio"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/cryovisor/cryovisor/lifecycle"
)

// BenchmarkPoolIdle says what a VM that waits in a pool takes: of files, and of the kernel's memory, as far as that is counted apart. What others
// on the host do meanwhile is in the figure.
func BenchmarkPoolIdle(b *testing.B) {
	needKVM(b)
	for _, c := range []struct {
		ram uint64
		n   int
	}{{128 << 20, 256}, {1 << 30, 128}, {16 << 30, 16}, {64 << 30, 4}} {
		b.Run(fmt.Sprintf("%dMiB", c.ram>>20), func(b *testing.B) {
			var bytes, files float64
			for b.Loop() {
				memory, open := kernelBytes(b), openFiles(b)
				p, err := lifecycle.NewPool(c.ram, c.n)
				check(b, err)
				bytes += kernelBytes(b) - memory
				files += openFiles(b) - open
				check(b, p.Close())
			}
			per := float64(b.N) * float64(c.n)
			b.ReportMetric(bytes/per/1024, "KiB/VM")
			b.ReportMetric(files/per, "files/VM")
			b.ReportMetric(0, "ns/op")
		})
	}
}

// kernelBytes is what the kernel has taken for its own.
func kernelBytes(b *testing.B) (bytes float64) {
	b.Helper()
	f, err := os.Open("/proc/meminfo")
	check(b, err)
	defer f.Close()
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		name, value, _ := strings.Cut(lines.Text(), ":")
		switch name {
		case "Slab", "KernelStack", "PageTables", "SecPageTables", "VmallocUsed", "Percpu":
			var kib float64
			_, err := fmt.Sscanf(value, "%f kB", &kib)
			check(b, err)
			bytes += kib * 1024
		}
	}
	check(b, lines.Err())
	return bytes
}

func openFiles(b *testing.B) float64 {
	b.Helper()
	files, err := os.ReadDir("/proc/self/fd")
	check(b, err)
	return float64(len(files))
}
