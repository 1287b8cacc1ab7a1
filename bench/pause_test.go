//go:build linux && amd64

package bench

import (
	"context"
	"fmt"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"testing"
	"time"

	"github.com/cryovisor/cryovisor/lifecycle"
)

// BenchmarkPause measures from the call until the snapshot is durable.
func BenchmarkPause(b *testing.B) {
	for _, ram := range fitting(b) {
		b.Run("full/"+gib(ram), func(b *testing.B) { benchFull(b, ram) })
	}
	for _, dirty := range []uint64{16 << 20, 64 << 20, 256 << 20} {
		b.Run(fmt.Sprintf("diff/4GiB/%dMiB", dirty>>20), func(b *testing.B) { benchDiff(b, 4<<30, dirty) })
	}
	for _, ram := range fitting(b) {
		b.Run("prepared/"+gib(ram), func(b *testing.B) { benchPrepared(b, ram) })
	}
}

func benchFull(b *testing.B, ram uint64) {
	r := newRig(b, ram, 0)
	m := r.boot()
	defer m.Close()
	var total, freeze time.Duration
	var peak uint64
	var p lifecycle.Paused
	for b.Loop() {
		b.StopTimer()
		own := watchMemory()
		b.StartTimer()
		p = r.pause(m)
		total, freeze = total+p.Total, freeze+p.Freeze
		b.StopTimer()
		peak = max(peak, own())
		r.delete(p.ID)
		r.must(m.VM.Resume())
		r.work(10)
		b.StartTimer()
	}
	n := float64(b.N)
	b.ReportMetric(total.Seconds()/n/(float64(ram)/(1<<30)), "s/GiB")
	b.ReportMetric(ms(freeze)/n, "freeze-ms")
	b.ReportMetric(float64(ram)/float64(p.StoredBytes), "stored-ratio")
	b.ReportMetric(float64(peak)/(1<<20), "peak-MiB")
	b.ReportMetric(0, "ns/op")
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// watchMemory returns a function that says how much more memory the Go runtime has taken from the system, at most, than it has now.
// A guest's memory is not the runtime's.
func watchMemory() (stop func() uint64) {
	debug.FreeOSMemory()
	sample := []metrics.Sample{{Name: "/memory/classes/total:bytes"}, {Name: "/memory/classes/heap/released:bytes"}}
	read := func() uint64 {
		metrics.Read(sample)
		return sample[0].Value.Uint64() - sample[1].Value.Uint64()
	}
	before := read()
	quit, peak := make(chan struct{}), make(chan uint64)
	go func() {
		most := uint64(0)
		tick := time.NewTicker(time.Millisecond)
		defer tick.Stop()
		for {
			most = max(most, read())
			select {
			case <-tick.C:
			case <-quit:
				peak <- most - min(most, before)
				return
			}
		}
	}()
	return func() uint64 {
		close(quit)
		return <-peak
	}
}

// benchDiff measures pauses of a guest that has written about dirty bytes since
// its resume.
func benchDiff(b *testing.B, ram, dirty uint64) {
	r := newRig(b, ram, dirty)
	m := r.boot()
	first := r.pause(m)
	r.must(m.Close())
	var total, freeze time.Duration
	var looked uint64
	for b.Loop() {
		b.StopTimer()
		m, _, _ = r.resume(first.ID, false)
		r.touch(m, dirty*9/10)
		b.StartTimer()
		p := r.pause(m)
		b.StopTimer()
		total, freeze, looked = total+p.Total, freeze+p.Freeze, looked+p.CandidateBytes
		r.must(m.Close())
		r.delete(p.ID)
		b.StartTimer()
	}
	n := float64(b.N)
	b.ReportMetric(ms(total)/n, "ms")
	b.ReportMetric(ms(freeze)/n, "freeze-ms")
	b.ReportMetric(float64(looked)/(1<<20)/n, "dirty-MiB")
	b.ReportMetric(0, "ns/op")
}

// touch lets the guest work until it has written that many bytes, or no more than before: it chooses its pages at random.
func (r *rig) touch(m *lifecycle.Machine, bytes uint64) {
	r.b.Helper()
	for last := uint64(0); ; {
		r.work(200)
		ranges, err := m.VM.Memory().Dirty(context.Background())
		r.must(err)
		touched := uint64(0)
		for _, g := range ranges {
			touched += g.Len
		}
		if touched >= bytes || touched == last {
			return
		}
		last = touched
	}
}

// benchPrepared measures the rest of the pause of an idle guest that Prepare was told of.
func benchPrepared(b *testing.B, ram uint64) {
	r := newRig(b, ram, 64<<20)
	m := r.boot()
	defer m.Close()
	r.work(100)
	r.device.SetLimit(0)
	_, err := r.device.WaitHeld(context.Background())
	r.must(err)
	var freeze, total, prepare time.Duration
	var left uint64
	for b.Loop() {
		b.StopTimer()
		began := time.Now()
		p, err := m.Prepare(context.Background(), r.store, r.options())
		r.must(err)
		prepare += time.Since(began)
		runtime.GC() // what is measured is not the collection of what the preparation left
		b.StartTimer()
		paused, err := p.Pause(context.Background())
		r.must(err)
		b.StopTimer()
		freeze, total, left = freeze+paused.Freeze, total+paused.Total, left+paused.CandidateBytes
		r.delete(paused.ID)
		r.must(m.Resume())
		b.StartTimer()
	}
	n := float64(b.N)
	b.ReportMetric(ms(freeze)/n, "freeze-ms")
	b.ReportMetric(ms(total)/n, "total-ms")
	b.ReportMetric(float64(left)/(1<<20)/n, "left-MiB")
	b.ReportMetric(prepare.Seconds()/n, "prepare-s")
	b.ReportMetric(0, "ns/op")
}
