//go:build linux && amd64

package bench

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/cryovisor/cryovisor/internal/testvm"
	"github.com/cryovisor/cryovisor/lifecycle"
	"github.com/cryovisor/cryovisor/vmm"
)

// sandboxMemory is the RAM of the sandboxes, in bytes.
const sandboxMemory = 128 << 20

// newManager opens a Manager with a template of a guest that mostly sleeps.
func newManager(b *testing.B) *lifecycle.Manager {
	b.Helper()
	m, err := lifecycle.OpenManager(b.Context(), newDir(b), lifecycle.ManagerOptions{})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		if err := m.Close(context.Background()); err != nil {
			b.Error(err)
		}
	})
	im, err := testvm.Timer(testvm.TimerConfig{Memory: sandboxMemory, Period: 50e6, Every: 1 << 40})
	if err != nil {
		b.Fatal(err)
	}
	_, err = m.CreateTemplate(b.Context(), lifecycle.TemplateConfig{
		Name: "base", VM: vmm.Config{MemoryBytes: sandboxMemory, Boot: im.Program()},
	})
	if err != nil {
		b.Fatal(err)
	}
	return m
}

// BenchmarkSandbox is the life of a sandbox through the Manager, the catalog's writes included.
func BenchmarkSandbox(b *testing.B) {
	needKVM(b)
	m := newManager(b)
	times := make(map[string][]time.Duration)
	timed := func(what string, do func() error) {
		began := time.Now()
		if err := do(); err != nil {
			b.Fatal(err)
		}
		times[what] = append(times[what], time.Since(began))
	}
	for b.Loop() {
		var s *lifecycle.Sandbox
		timed("create", func() (err error) {
			s, err = m.Create(b.Context(), lifecycle.CreateOptions{Template: "base"})
			return err
		})
		for range 2 {
			timed("pause", func() error { _, err := s.Pause(b.Context()); return err })
			timed("connect", func() error { _, _, err := s.Connect(b.Context(), lifecycle.ConnectOptions{}); return err })
		}
		timed("kill", func() error { return s.Kill(b.Context()) })
	}
	for what, all := range times {
		slices.Sort(all)
		b.ReportMetric(ms(all[len(all)/2]), what+"-ms")
		b.ReportMetric(ms(all[len(all)*99/100]), what+"-p99-ms")
	}
	b.ReportMetric(0, "ns/op")
}

// BenchmarkSandboxes has 200 paused and 20 running sandboxes of 128 MiB at once, and connects to those that are paused.
func BenchmarkSandboxes(b *testing.B) {
	needKVM(b)
	m := newManager(b)
	for i := range 220 {
		s, err := m.Create(b.Context(), lifecycle.CreateOptions{Template: "base", Timeout: time.Hour})
		if err != nil {
			b.Fatal(err)
		}
		if i < 200 {
			if _, err := s.Pause(b.Context()); err != nil {
				b.Fatal(err)
			}
		}
	}
	page, err := m.List(lifecycle.ListOptions{States: []lifecycle.State{lifecycle.StatePaused}})
	if err != nil || len(page.Sandboxes) != 200 {
		b.Fatalf("%d paused, %v", len(page.Sandboxes), err)
	}
	var connects, pauses []time.Duration
	i := 0
	for b.Loop() {
		id := page.Sandboxes[i%200].ID
		i++
		began := time.Now()
		if _, _, err := m.Connect(b.Context(), id, lifecycle.ConnectOptions{}); err != nil {
			b.Fatal(err)
		}
		connects = append(connects, time.Since(began))
		began = time.Now()
		if _, err := m.Pause(b.Context(), id); err != nil {
			b.Fatal(err)
		}
		pauses = append(pauses, time.Since(began))
	}
	slices.Sort(connects)
	slices.Sort(pauses)
	b.ReportMetric(ms(connects[len(connects)/2]), "connect-ms")
	b.ReportMetric(ms(pauses[len(pauses)/2]), "pause-ms")
	b.ReportMetric(float64(m.Metrics().StoredBytes>>10)/220, "stored-KiB/sandbox")
	b.ReportMetric(0, "ns/op")
}

// BenchmarkList lists 10,000 paused sandboxes: all at once, and in pages of 100.
func BenchmarkList(b *testing.B) {
	needKVM(b)
	m := newManager(b)
	const n = 10_000
	for i := range n {
		s, err := m.Create(b.Context(), lifecycle.CreateOptions{Template: "base", Metadata: map[string]string{"n": fmt.Sprint(i), "who": "me"}})
		if err != nil {
			b.Fatal(err)
		}
		if _, err := s.Pause(b.Context()); err != nil {
			b.Fatal(err)
		}
	}
	for name, limit := range map[string]int{"all": 0, "pages": 100} {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				opts := lifecycle.ListOptions{States: []lifecycle.State{lifecycle.StatePaused}, Limit: limit}
				found := 0
				for more := true; more; more = opts.Token != "" {
					page, err := m.List(opts)
					if err != nil {
						b.Fatal(err)
					}
					found += len(page.Sandboxes)
					opts.Token = page.Next
				}
				if found != n {
					b.Fatalf("%d sandboxes", found)
				}
			}
		})
	}
}
