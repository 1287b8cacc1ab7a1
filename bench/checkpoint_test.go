//go:build linux && amd64

package bench

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/cryovisor/cryovisor/lifecycle"
	"github.com/cryovisor/cryovisor/memory"
)

// BenchmarkCheckpoint measures checkpoints of a guest that works on 64 MiB of its memory: how long it stands still, and how much slower
// it is from the call to the end. full is a machine's first, diff one after it; one-worker leaves the guest a processor of its own, of two.
func BenchmarkCheckpoint(b *testing.B) {
	for _, ram := range sizes {
		b.Run("full/"+gib(ram), func(b *testing.B) { benchCheckpoint(b, ram, 0, true) })
	}
	b.Run("full/4GiB/one-worker", func(b *testing.B) { benchCheckpoint(b, 4<<30, 1, true) })
	b.Run("diff/4GiB", func(b *testing.B) { benchCheckpoint(b, 4<<30, 0, false) })
}

func benchCheckpoint(b *testing.B, ram uint64, workers int, full bool) {
	r := newRig(b, ram, 64<<20)
	var m *lifecycle.Machine
	defer func() { r.must(m.Close()) }()
	var freeze, total []time.Duration
	var slower, looked float64
	for b.Loop() {
		b.StopTimer()
		if full && m != nil {
			r.must(m.Close())
			m = nil
		}
		if m == nil {
			m = r.boot()
			if !full {
				r.checkpoint(m, workers)
			}
		}
		r.work(2000) // over all of its working set, so that it is mapped
		usual := r.speed(func() { r.work(2000) })
		b.StartTimer()
		var p lifecycle.Paused
		during := r.speed(func() { p = r.checkpoint(m, workers) })
		b.StopTimer()
		freeze, total = append(freeze, p.Freeze), append(total, p.Total)
		slower += 100 * (1 - during/usual)
		looked += float64(p.CandidateBytes) / (1 << 20)
		b.StartTimer()
	}
	n := float64(b.N)
	b.ReportMetric(percentile(freeze, 0.5), "freeze-ms")
	b.ReportMetric(percentile(freeze, 1), "max-freeze-ms")
	b.ReportMetric(percentile(total, 0.5), "total-ms")
	b.ReportMetric(slower/n, "guest-slowdown-%")
	b.ReportMetric(looked/n, "dirty-MiB")
	b.ReportMetric(0, "ns/op")
}

func (r *rig) checkpoint(m *lifecycle.Machine, workers int) lifecycle.Paused {
	r.b.Helper()
	opts := r.options()
	opts.Workers = workers
	p, err := m.Checkpoint(context.Background(), r.store, opts)
	if errors.Is(err, memory.ErrNoWriteProtect) {
		r.b.Skip(err)
	}
	r.must(err)
	return p
}

// speed is how many reports a second the guest makes while do runs.
func (r *rig) speed(do func()) float64 {
	before, began := r.reports.Load(), time.Now()
	do()
	return float64(r.reports.Load()-before) / time.Since(began).Seconds()
}
