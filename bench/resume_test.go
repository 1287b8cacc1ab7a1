//go:build linux && amd64

package bench

import (
	"context"
	"runtime"
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

// BenchmarkResume measures from opening the snapshot: until the vCPUs are set going, which is when the guest's first instruction
// runs or asks for its page (first-insn-ms, and its p99-ms), and until the guest's first port access, after at most 64 steps of
// its work on missing memory (first-sign-ms). Use -benchtime 100x or more for p99-ms to mean something.
func BenchmarkResume(b *testing.B) {
	for _, ram := range []uint64{1 << 30, 4 << 30, 16 << 30, 64 << 30} {
		b.Run("lazy/"+gib(ram), func(b *testing.B) { benchResume(b, ram, lifecycle.ResumeOptions{}, 0) })
		b.Run("pooled/"+gib(ram), func(b *testing.B) { benchResume(b, ram, lifecycle.ResumeOptions{}, 2) })
	}
	for _, ram := range sizes {
		b.Run("eager/"+gib(ram), func(b *testing.B) { benchResume(b, ram, lifecycle.ResumeOptions{Eager: true}, 0) })
	}
}

// benchResume resumes in VMs that are made now, or in those of a pool, which is full each time.
func benchResume(b *testing.B, ram uint64, opts lifecycle.ResumeOptions, pool int) {
	r, id := paused(b, ram)
	if pool > 0 {
		var err error
		opts.Pool, err = lifecycle.NewPool(ram, pool)
		r.must(err)
		defer func() { r.must(opts.Pool.Close()) }()
	}
	var insn, sign []time.Duration
	for b.Loop() {
		m, e, s := r.resumeWith(id, opts)
		insn, sign = append(insn, e), append(sign, s)
		b.StopTimer()
		r.must(m.Close())
		for pool > 0 && opts.Pool.Ready() < pool {
			runtime.Gosched()
		}
		b.StartTimer()
	}
	b.ReportMetric(percentile(insn, 0.5), "first-insn-ms")
	b.ReportMetric(percentile(insn, 0.99), "p99-ms")
	b.ReportMetric(percentile(sign, 0.5), "first-sign-ms")
	b.ReportMetric(0, "ns/op")
}

// paused makes a snapshot of a guest that works on 64 MiB of its memory. One of more than 4 GiB is sparse.
func paused(b *testing.B, ram uint64) (*rig, snapshot.ID) {
	r := newRig(b, ram, 64<<20)
	if ram > 4<<30 {
		r.content = sparse{r.content, ram / (1 << 30)}
		// A huge page for each run of 64 KiB would be all of the guest's RAM.
		r.must(unix.Prctl(unix.PR_SET_THP_DISABLE, 1, 0, 0, 0))
		defer func() { r.must(unix.Prctl(unix.PR_SET_THP_DISABLE, 0, 0, 0, 0)) }()
	}
	m := r.boot()
	id := r.pause(m).ID
	r.must(m.Close())
	return r, id
}

// sparse is content of which one run of 16 pages in many is kept, all over memory: as much as a guest of 1 GiB has.
type sparse struct {
	testvm.Content
	oneIn uint64
}

func (s sparse) Page(page uint64, dst []byte) bool {
	if page/16*0x9e3779b97f4a7c15>>32%s.oneIn != 0 {
		clear(dst)
		return false
	}
	return s.Content.Page(page, dst)
}

// BenchmarkResumeSteps says where a resume's time goes: medians of its steps, one after the other. (A resume makes the shell
// while it opens the snapshot.)
func BenchmarkResumeSteps(b *testing.B) {
	for _, ram := range []uint64{1 << 30, 4 << 30, 16 << 30, 64 << 30} {
		b.Run(gib(ram), func(b *testing.B) { benchSteps(b, ram) })
	}
}

func benchSteps(b *testing.B, ram uint64) {
	r, id := paused(b, ram)
	steps := []string{"shell-ms", "open-ms", "check-ms", "map-ms", "restore-ms", "start-ms"}
	took := map[string][]time.Duration{}
	for b.Loop() {
		hw, _ := r.hardware(id)
		times := []time.Time{time.Now()}
		done := func(err error) {
			r.must(err)
			times = append(times, time.Now())
		}
		shell, err := vmm.NewShell()
		done(err)
		origin, err := r.store.Open(context.Background(), id, r.key)
		r.must(err)
		state, err := stateOf(origin)
		done(err)
		done(shell.CheckHost(state, hw))
		image, err := memory.NewImage(ram, origin)
		r.must(err)
		mem, err := image.Map(context.Background(), memory.MapOptions{})
		done(err)
		vm, err := shell.Restore(state, mem, hw)
		done(err)
		done(vm.Resume())
		b.StopTimer()
		for i, step := range steps {
			took[step] = append(took[step], times[i+1].Sub(times[i]))
		}
		r.must(vm.Close())
		r.must(image.Close())
		r.must(origin.Close())
		b.StartTimer()
	}
	for _, step := range steps {
		b.ReportMetric(percentile(took[step], 0.5), step)
	}
	b.ReportMetric(0, "ns/op")
}

func stateOf(r *snapshot.Reader) (*vmm.State, error) {
	var sections []vmm.Section
	for _, s := range r.Sections() {
		if strings.HasPrefix(s.Name, "vmm/") {
			sections = append(sections, vmm.Section{Name: s.Name, Version: s.Version, Data: s.Data})
		}
	}
	return vmm.ParseState(sections)
}
