//go:build linux && amd64

package bench

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"filippo.io/age"

	"github.com/cryovisor/cryovisor/lifecycle"
)

// BenchmarkResumeDuringPause measures how long a machine takes to run on whose pause is given up when half of its memory is
// written: from the call of Resume until it returns.
func BenchmarkResumeDuringPause(b *testing.B) {
	for _, ram := range sizes {
		b.Run(gib(ram), func(b *testing.B) {
			r := newRig(b, ram, 0)
			m := r.boot()
			defer m.Close()
			var took []time.Duration
			for b.Loop() {
				took = append(took, r.changeMind(m))
				b.StopTimer()
				r.work(10)
				b.StartTimer()
			}
			b.ReportMetric(percentile(took, 0.5), "ms")
			b.ReportMetric(percentile(took, 0.99), "p99-ms")
			b.ReportMetric(0, "ns/op")
		})
	}
}

// changeMind pauses a machine and resumes it in the midst of that.
func (r *rig) changeMind(m *lifecycle.Machine) time.Duration {
	r.b.Helper()
	half := make(chan struct{})
	var once sync.Once
	paused := make(chan error, 1)
	go func() {
		_, err := m.Pause(context.Background(), r.store, lifecycle.PauseOptions{
			Recipients: []age.Recipient{r.key.Recipient()},
			Progress: func(done, total uint64) {
				if done >= total/2 {
					once.Do(func() { close(half) })
				}
			},
		})
		paused <- err
	}()
	<-half
	began := time.Now()
	r.must(m.Resume())
	took := time.Since(began)
	if err := <-paused; !errors.Is(err, lifecycle.ErrResumed) {
		r.b.Fatal(err)
	}
	return took
}
