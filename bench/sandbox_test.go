//go:build linux && amd64

package bench

import (
	"context"
	"fmt"
	"net/http/httptest"
	"path/filepath"
	"runtime"
	"slices"
	"testing"
	"time"

	"golang.org/x/time/rate"

	"github.com/cryovisor/cryovisor/internal/testvm"
	"github.com/cryovisor/cryovisor/lifecycle"
	"github.com/cryovisor/cryovisor/server"
	"github.com/cryovisor/cryovisor/server/client"
	"github.com/cryovisor/cryovisor/vmm"
)

// sandboxMemory is the RAM of the sandboxes, in bytes.
const sandboxMemory = 128 << 20

// newManager opens a Manager with a template of a guest that mostly sleeps.
func newManager(b *testing.B) *lifecycle.Manager {
	b.Helper()
	return managerOf(b, newDir(b), lifecycle.ManagerOptions{}, lifecycle.TemplateConfig{})
}

// managerOf is newManager with options, and a template with some hardware.
func managerOf(b *testing.B, dir string, opts lifecycle.ManagerOptions, cfg lifecycle.TemplateConfig) *lifecycle.Manager {
	b.Helper()
	m, err := lifecycle.OpenManager(b.Context(), dir, opts)
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
	cfg.Name, cfg.VM.MemoryBytes, cfg.VM.Boot = "base", sandboxMemory, im.Program()
	if _, err = m.CreateTemplate(b.Context(), cfg); err != nil {
		b.Fatal(err)
	}
	return m
}

// stopwatch collects times by what they are of.
type stopwatch struct {
	b     *testing.B
	times map[string][]time.Duration
}

func newStopwatch(b *testing.B) *stopwatch {
	return &stopwatch{b: b, times: make(map[string][]time.Duration)}
}

func (s *stopwatch) time(what string, do func() error) {
	began := time.Now()
	if err := do(); err != nil {
		s.b.Fatal(err)
	}
	s.times[what] = append(s.times[what], time.Since(began))
}

func (s *stopwatch) report() {
	for what, all := range s.times {
		slices.Sort(all)
		s.b.ReportMetric(ms(all[len(all)/2]), what+"-ms")
		s.b.ReportMetric(ms(all[len(all)*99/100]), what+"-p99-ms")
	}
	s.b.ReportMetric(0, "ns/op")
}

// BenchmarkSandbox is the life of a sandbox, the catalog's writes included: through the Manager, and through the API over HTTP.
func BenchmarkSandbox(b *testing.B) {
	needKVM(b)
	b.Run("library", func(b *testing.B) {
		m := newManager(b)
		watch := newStopwatch(b)
		for b.Loop() {
			var s *lifecycle.Sandbox
			watch.time("create", func() (err error) {
				s, err = m.Create(b.Context(), lifecycle.CreateOptions{Template: "base"})
				return err
			})
			for range 2 {
				watch.time("pause", func() error { _, err := s.Pause(b.Context()); return err })
				watch.time("connect", func() error { _, _, err := s.Connect(b.Context(), lifecycle.ConnectOptions{}); return err })
			}
			watch.time("kill", func() error { return s.Kill(b.Context()) })
		}
		watch.report()
	})
	b.Run("http", func(b *testing.B) { benchSandbox(b, newManager(b), 0) })
	// As the command serves them: each machine may have sockets, which the next one of the sandbox needs.
	for _, pool := range []int{0, 2} {
		b.Run(fmt.Sprintf("serve/pool=%d", pool), func(b *testing.B) {
			dir := newDir(b)
			benchSandbox(b, managerOf(b, dir, lifecycle.ManagerOptions{Connect: server.Hardware(dir), Pool: pool}, lifecycle.TemplateConfig{}), pool)
		})
		b.Run(fmt.Sprintf("serve-vsock/pool=%d", pool), func(b *testing.B) {
			dir := newDir(b)
			benchSandbox(b, managerOf(b, dir, lifecycle.ManagerOptions{Connect: server.Hardware(dir), Pool: pool}, lifecycle.TemplateConfig{
				Labels: map[string]string{server.LabelVsock: "3"},
				VM:     vmm.Config{Hardware: vmm.Hardware{Vsock: &vmm.Vsock{CID: 3, Path: filepath.Join(dir, "vsock")}}},
			}), pool)
		})
	}
}

// benchSandbox is the life of a sandbox over HTTP, with each connect right after a pause, or when the Manager's pool is full.
func benchSandbox(b *testing.B, m *lifecycle.Manager, pool int) {
	b.Helper()
	c := newClient(b, m)
	watch := newStopwatch(b)
	for b.Loop() {
		var s client.Sandbox
		watch.time("create", func() (err error) { s, err = c.Create(b.Context(), client.CreateOptions{}); return err })
		for range 2 {
			watch.time("pause", func() error { return c.Pause(b.Context(), s.ID) })
			for m.Metrics().Pool.Ready < pool {
				runtime.Gosched()
			}
			watch.time("connect", func() error { _, _, err := c.Connect(b.Context(), s.ID, 0); return err })
		}
		watch.time("kill", func() error { return c.Kill(b.Context(), s.ID) })
	}
	watch.report()
}

// newClient serves a Manager over loopback.
func newClient(b *testing.B, m *lifecycle.Manager) *client.Client {
	b.Helper()
	keys, err := server.OpenKeys(b.Context(), newDir(b))
	check(b, err)
	b.Cleanup(func() { check(b, keys.Close()) })
	_, key, err := keys.Create(b.Context(), "bench")
	check(b, err)
	s, err := server.New(server.Config{Manager: m, Keys: keys, Rate: rate.Inf})
	check(b, err)
	b.Cleanup(s.Close)
	listening := httptest.NewServer(s)
	b.Cleanup(listening.Close)
	return &client.Client{URL: listening.URL, Key: key}
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
	watch := newStopwatch(b)
	i := 0
	for b.Loop() {
		id := page.Sandboxes[i%200].ID
		i++
		watch.time("connect", func() error { _, _, err := m.Connect(b.Context(), id, lifecycle.ConnectOptions{}); return err })
		watch.time("pause", func() error { _, err := m.Pause(b.Context(), id); return err })
	}
	watch.report()
	b.ReportMetric(float64(m.Metrics().StoredBytes>>10)/220, "stored-KiB/sandbox")
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
