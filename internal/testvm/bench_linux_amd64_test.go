package testvm

import "testing"

// BenchmarkWorker measures steps of a warm guest: its memory has been touched.
func BenchmarkWorker(b *testing.B) {
	for name, vcpus := range map[string]int{"1vcpu": 1, "2vcpu": 2} {
		b.Run(name, func(b *testing.B) {
			w, err := NewWorker(WorkerConfig{Memory: 64 << 20, VCPUs: vcpus, WorkingSet: 16 << 20, Every: 10000})
			must(b, err)
			dev := NewDevice(w, nil, 100000, nil)
			m := newMachine(b, 64<<20, w.Image(), dev)
			m.start(b)
			ctx := testContext(b)
			_, err = dev.WaitHeld(ctx)
			must(b, err)
			b.ResetTimer()
			dev.SetLimit(100000 + uint64(b.N))
			_, err = dev.WaitHeld(ctx)
			must(b, err)
			b.ReportMetric(float64(b.N*vcpus)/b.Elapsed().Seconds(), "steps/s")
			m.halt()
		})
	}
}

// BenchmarkFill measures first touches: a guest that writes three quarters of
// its pages once.
func BenchmarkFill(b *testing.B) {
	const memory = 256 << 20
	w, err := NewWorker(WorkerConfig{Memory: memory, Fill: true})
	must(b, err)
	for b.Loop() {
		dev := NewDevice(w, nil, 0, nil)
		m := newMachine(b, memory, w.Image(), dev)
		m.start(b)
		_, err := dev.WaitHeld(testContext(b))
		must(b, err)
		m.halt()
	}
	b.ReportMetric(b.Elapsed().Seconds()*1e6/float64(b.N)/(0.75*memory/pageSize), "us/page")
}
