//go:build linux && amd64

package bench

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cryovisor/cryovisor/internal/testvm"
	"github.com/cryovisor/cryovisor/lifecycle"
	"github.com/cryovisor/cryovisor/memory"
	"github.com/cryovisor/cryovisor/snapshot"
	"github.com/cryovisor/cryovisor/vmm"
)

// stored makes a guest with that much memory and returns its snapshot.
func (r *rig) stored() snapshot.ID {
	r.b.Helper()
	m := r.boot()
	r.work(1)
	id := r.pause(m).ID
	r.must(m.Close())
	return id
}

// image opens a snapshot's memory, without a machine.
func (r *rig) image(id snapshot.ID) (*snapshot.Reader, *memory.Image) {
	r.b.Helper()
	reader, err := r.store.Open(context.Background(), id, r.key)
	r.must(err)
	img, err := memory.NewImage(r.worker.Config().Memory, reader)
	r.must(err)
	return reader, img
}

// BenchmarkFault measures page faults of a thread in a system call, one at a time: until it has the page, which is any page of a chunk of
// which none is there. The chunk is read, decrypted, decoded and installed. warm: the packs are in the host's page cache; cold: not (on tmpfs they always are).
func BenchmarkFault(b *testing.B) {
	r := newRig(b, 1<<30, 0)
	id := r.stored()
	for _, cold := range []bool{false, true} {
		b.Run(map[bool]string{false: "warm", true: "cold"}[cold], func(b *testing.B) {
			r.b = b
			var took []time.Duration
			for b.Loop() {
				b.StopTimer()
				if cold {
					r.dropCaches()
				}
				took = append(took, r.faults(id, 500)...)
				b.StartTimer()
			}
			b.ReportMetric(1000*percentile(took, 0.5), "p50-us")
			b.ReportMetric(1000*percentile(took, 0.99), "p99-us")
			b.ReportMetric(0, "ns/op")
		})
	}
}

// dropCaches writes the store out and has the kernel forget it.
func (r *rig) dropCaches() {
	r.b.Helper()
	unix.Sync()
	entries, err := os.ReadDir(r.store.Dir() + "/packs")
	r.must(err)
	for _, e := range entries {
		f, err := os.Open(r.store.Dir() + "/packs/" + e.Name())
		r.must(err)
		r.must(unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED))
		r.must(f.Close())
	}
}

// faults touches one page, anywhere in it, of each of n chunks in random order.
func (r *rig) faults(id snapshot.ID, n int) (took []time.Duration) {
	r.b.Helper()
	reader, img := r.image(id)
	mem, err := img.Map(context.Background(), memory.MapOptions{})
	r.must(err)
	sink, err := unix.MemfdCreate("sink", unix.MFD_CLOEXEC)
	r.must(err)
	random := rand.New(rand.NewPCG(seed, 0))
	for _, chunk := range random.Perm(int(reader.Chunks()))[:n] {
		runs := reader.Runs(int64(chunk))
		if len(runs) == 0 {
			continue
		}
		run := runs[random.IntN(len(runs))]
		gpa := run.GPA + random.Uint64N(run.Len/memory.PageSize)*memory.PageSize
		began := time.Now()
		_, _, errno := unix.Syscall6(unix.SYS_PWRITE64, uintptr(sink), mem.HostAddr(gpa), 1, 0, 0, 0)
		took = append(took, time.Since(began))
		if errno != 0 {
			r.b.Fatal(errno)
		}
	}
	r.must(mem.Close())
	r.must(img.Close())
	r.must(reader.Close())
	r.must(unix.Close(sink))
	return took
}

// BenchmarkPrefetch measures how fast all of a snapshot's memory comes, in GiB of RAM a second: its chunks in their order, as
// an eager resume has them.
func BenchmarkPrefetch(b *testing.B) {
	r := newRig(b, 1<<30, 0)
	id := r.stored()
	var took time.Duration
	for b.Loop() {
		b.StopTimer()
		reader, img := r.image(id)
		b.StartTimer()
		began := time.Now()
		r.must(img.Populate(context.Background()))
		took += time.Since(began)
		b.StopTimer()
		r.must(img.Close())
		r.must(reader.Close())
		b.StartTimer()
	}
	b.ReportMetric(float64(b.N)/took.Seconds(), "GiB/s")
	b.ReportMetric(0, "ns/op")
}

// BenchmarkWorkingSet measures how long a resumed guest takes to write to nine tenths of the pages of a working set of 256 MiB, which it
// chooses at random: resident is a machine that has them mapped already, eager has loaded all before it runs (which is not counted).
func BenchmarkWorkingSet(b *testing.B) {
	const set = 256 << 20
	r := newRig(b, 1<<30, set)
	first := r.stored()
	m, _, _ := r.resume(first, false)
	r.touch(m, set*9/10)
	record, err := m.WorkingSet(context.Background())
	r.must(err)
	r.must(m.Close())
	for _, c := range []struct {
		name string
		opts lifecycle.ResumeOptions
	}{
		{"lazy", lifecycle.ResumeOptions{Prefetch: lifecycle.PrefetchNone}},
		{"prefetched", lifecycle.ResumeOptions{WorkingSet: record}},
		{"eager", lifecycle.ResumeOptions{Eager: true}},
	} {
		b.Run(c.name, func(b *testing.B) {
			r.b = b
			var took []time.Duration
			var faults uint64
			for b.Loop() {
				m, _, _ := r.resumeWith(first, c.opts)
				began := time.Now()
				r.touch(m, set*9/10)
				took = append(took, time.Since(began))
				b.StopTimer()
				faults += m.VM.Memory().Stats().Faults
				r.must(m.Close())
				b.StartTimer()
			}
			b.ReportMetric(percentile(took, 0.5), "ms")
			b.ReportMetric(float64(faults)/float64(b.N), "faults")
			b.ReportMetric(0, "ns/op")
		})
	}
	b.Run("resident", func(b *testing.B) {
		r.b = b
		var took []time.Duration
		for b.Loop() {
			b.StopTimer()
			m := r.boot() // its memory has been written
			b.StartTimer()
			began := time.Now()
			r.touchTracked(m, set*9/10)
			took = append(took, time.Since(began))
			b.StopTimer()
			r.must(m.Close())
			b.StartTimer()
		}
		b.ReportMetric(percentile(took, 0.5), "ms")
		b.ReportMetric(0, "ns/op")
	})
}

// touchTracked is touch for a machine of which all memory was written before: it asks KVM.
func (r *rig) touchTracked(m *lifecycle.Machine, bytes uint64) {
	r.b.Helper()
	r.must(m.VM.TrackDirty(true))
	seen := make(map[uint64]bool)
	for uint64(len(seen))*memory.PageSize < bytes {
		r.work(200)
		ranges, err := m.VM.TakeDirty()
		r.must(err)
		for _, g := range ranges {
			for gpa := g.GPA; gpa < g.End(); gpa += memory.PageSize {
				seen[gpa] = true
			}
		}
	}
}

// BenchmarkRewrite measures what a resumed machine of 1 GiB takes of the host's memory (MemAvailable) when its guest has rewritten
// nine tenths of it, before and after what it holds twice is given back.
func BenchmarkRewrite(b *testing.B) {
	const ram = 1 << 30
	r := newRig(b, ram, 0)
	id := r.stored()
	var twice, once uint64
	var took time.Duration
	for b.Loop() {
		before := available(b)
		m, _, _ := r.resume(id, false)
		r.touch(m, ram*9/10)
		r.must(m.VM.Pause(context.Background()))
		twice += before - available(b)
		began := time.Now()
		_, err := m.Reclaim(context.Background())
		took += time.Since(began)
		r.must(err)
		once += before - available(b)
		r.must(m.Close())
	}
	n := float64(b.N)
	b.ReportMetric(float64(twice)/(1<<20)/n, "before-MiB")
	b.ReportMetric(float64(once)/(1<<20)/n, "after-MiB")
	b.ReportMetric(ms(took)/n, "reclaim-ms")
	b.ReportMetric(0, "ns/op")
}

// BenchmarkClone makes 100 machines of one template of 1 GiB, which do not work, and keeps them: the time for each, and what each takes
// of the host's memory (MemAvailable).
func BenchmarkClone(b *testing.B) {
	const clones = 100
	r := newRig(b, 1<<30, 16<<20)
	id := r.stored()
	var took []time.Duration
	var private uint64
	for b.Loop() {
		b.StopTimer()
		tpl, err := lifecycle.Open(context.Background(), r.store, id, r.key)
		r.must(err)
		before := available(b)
		var machines []*lifecycle.Machine
		for range clones {
			d := testvm.NewDevice(r.worker, r.states[id], 0, nil)
			began := time.Now()
			m, err := tpl.Resume(context.Background(), lifecycle.ResumeOptions{
				Hardware: vmm.Hardware{Ports: []vmm.Ports{d.Ports()}, AllowOvercommit: true},
			})
			took = append(took, time.Since(began))
			r.must(err)
			machines = append(machines, m)
		}
		private += before - min(before, available(b))
		for _, m := range machines {
			r.must(m.Close())
		}
		r.must(tpl.Close())
		b.StartTimer()
	}
	b.ReportMetric(percentile(took, 0.5), "ms/clone")
	b.ReportMetric(percentile(took, 0.99), "p99-ms")
	b.ReportMetric(float64(private)/1024/clones/float64(b.N), "private-KiB/clone")
	b.ReportMetric(0, "ns/op")
}

// available is how much memory the host could still give, in bytes.
func available(b *testing.B) uint64 {
	b.Helper()
	info, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		b.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(info), "MemAvailable:")
	kib := uint64(0)
	if _, err := fmt.Sscan(rest, &kib); err != nil {
		b.Fatal(err)
	}
	return kib << 10
}
