//go:build linux && amd64

package lifecycle_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/cryovisor/cryovisor/internal/testvm"
	"github.com/cryovisor/cryovisor/lifecycle"
)

// poolReady waits until a Manager has so many VMs that were made in advance.
func (m *managed) poolReady(t testing.TB, n int) {
	t.Helper()
	eventually(t, fmt.Sprintf("%d VMs are ready", n), func() bool { return m.Metrics().Pool.Ready == n })
}

// wantPool compares how many machines have found a VM that was ready, and how many have not.
func (m *managed) wantPool(t testing.TB, taken, missed uint64) {
	t.Helper()
	if got := m.Metrics().Pool; got.Taken != taken || got.Missed != missed || got.Err != nil {
		t.Errorf("%+v; want %d taken and %d missed", got, taken, missed)
	}
}

// openVMs is how many VMs of KVM's this process has.
func openVMs(t testing.TB) (n int) {
	t.Helper()
	files, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if to, err := os.Readlink(filepath.Join("/proc/self/fd", f.Name())); err == nil && to == "anon_inode:kvm-vm" {
			n++
		}
	}
	return n
}

// sized is a template of a guest with more memory than others.
func sized(t testing.TB, name string, memory uint64) lifecycle.TemplateConfig {
	t.Helper()
	cfg := ticker(t, name)
	im, err := testvm.Timer(testvm.TimerConfig{Memory: memory, Period: 20e6, Every: 1 << 40})
	if err != nil {
		t.Fatal(err)
	}
	cfg.VM.MemoryBytes, cfg.VM.Boot = memory, im.Program()
	return cfg
}

// TestManagerPool has sandboxes be made, forked and resumed in VMs that were made in advance, each of which is replaced.
func TestManagerPool(t *testing.T) {
	checkLeaks(t)
	m := newManager(t, lifecycle.ManagerOptions{Pool: 2})
	if got := m.Metrics().Pool; got != (lifecycle.PoolMetrics{}) {
		t.Errorf("before there was a machine: %+v", got)
	}
	s := m.create(t, lifecycle.CreateOptions{})
	m.wantPool(t, 0, 1)
	for i := range uint64(4) {
		m.mark(t, s, i+1)
		m.alive(t, s)
		pause(t, s)
		m.poolReady(t, 2)
		connect(t, s)
		m.wantMark(t, s, i+1)
		m.wantPool(t, i+1, 1)
	}
	m.poolReady(t, 2)
	forks, err := m.Fork(t.Context(), s.ID(), 1, lifecycle.ConnectOptions{})
	if err != nil || forks[0].Err != nil {
		t.Fatal(err, forks)
	}
	m.wantMark(t, forks[0].Sandbox, 4)
	m.poolReady(t, 2)
	m.alive(t, m.create(t, lifecycle.CreateOptions{}))
	m.wantPool(t, 6, 1)
}

// TestManagerPoolReopened: whoever opens a directory has VMs for what is there.
func TestManagerPoolReopened(t *testing.T) {
	m := newManager(t, lifecycle.ManagerOptions{})
	s := m.create(t, lifecycle.CreateOptions{})
	pause(t, s)
	if got := m.Metrics().Pool; got != (lifecycle.PoolMetrics{}) {
		t.Errorf("without a pool: %+v", got)
	}
	m.reopen(t, lifecycle.ManagerOptions{Pool: 3})
	m.poolReady(t, 3)
	connect(t, mustSandbox(t, m, s.ID()))
	m.wantPool(t, 1, 0)
	for _, n := range []int{-1, 1025} {
		if _, err := lifecycle.OpenManager(t.Context(), t.TempDir(), lifecycle.ManagerOptions{Pool: n}); !errors.Is(err, lifecycle.ErrInvalid) {
			t.Errorf("a pool of %d: %v", n, err)
		}
	}
}

// TestManagerPoolSizes has sandboxes of two sizes: VMs are kept for those that there were last, and never more than was said.
func TestManagerPoolSizes(t *testing.T) {
	m := newManager(t, lifecycle.ManagerOptions{Pool: 2})
	if _, err := m.CreateTemplate(t.Context(), sized(t, "larger", 2*tickerMemory)); err != nil {
		t.Fatal(err)
	}
	small, large := m.create(t, lifecycle.CreateOptions{}), m.create(t, lifecycle.CreateOptions{Template: "larger"})
	m.wantPool(t, 0, 2)
	for i := range uint64(2) { // one of each
		m.poolReady(t, 2)
		for _, s := range []*lifecycle.Sandbox{small, large} {
			m.mark(t, s, i)
			pause(t, s)
			connect(t, s)
			m.wantMark(t, s, i)
		}
		m.wantPool(t, 2*(i+1), 2)
	}
	for range 2 { // large ones only, in the end
		pause(t, large)
		connect(t, large)
	}
	pause(t, small)
	pause(t, large)
	eventually(t, "no VMs are left but those of the pool", func() bool { return openVMs(t) == 2 && m.Metrics().Pool.Ready == 2 })
	before := m.Metrics().Pool
	connect(t, small)
	m.wantPool(t, before.Taken, before.Missed+1)
}

// TestManagerPoolBound has many pause and connect at once, and counts the VMs that there are besides the machines'.
func TestManagerPoolBound(t *testing.T) {
	checkLeaks(t)
	const bound, workers = 3, 4
	m := newManager(t, lifecycle.ManagerOptions{Pool: bound})
	if _, err := m.CreateTemplate(t.Context(), sized(t, "larger", 2*tickerMemory)); err != nil {
		t.Fatal(err)
	}
	var group sync.WaitGroup
	for i := range workers {
		group.Go(func() {
			template := []string{"ticker", "larger"}[i%2]
			s, err := m.Create(t.Context(), lifecycle.CreateOptions{Template: template})
			for range 10 {
				if err == nil {
					_, err = s.Pause(t.Context())
				}
				if n := m.Metrics().Pool.Ready; n > bound {
					t.Errorf("%d VMs are ready", n)
				}
				if err == nil {
					_, _, err = s.Connect(t.Context(), lifecycle.ConnectOptions{})
				}
			}
			if err == nil {
				_, err = s.Pause(t.Context())
			}
			if err != nil {
				t.Error(err)
			}
		})
	}
	group.Wait()
	eventually(t, "no VMs are left but those of the pool", func() bool { return openVMs(t) == bound && m.Metrics().Pool.Ready == bound })
	if got := m.Metrics().Pool; got.Taken+got.Missed != workers*11 || got.Err != nil {
		t.Errorf("%+v, of %d machines", got, workers*11)
	}
}

// TestManagerPoolFails: that nothing can be made in advance is no failure of a machine, which makes its own VM, and has the pool try again.
func TestManagerPoolFails(t *testing.T) {
	m := newManager(t, lifecycle.ManagerOptions{Pool: 2})
	full := errors.New("full")
	lifecycle.FailPool(m.Manager, full)
	s := m.create(t, lifecycle.CreateOptions{})
	for i := range uint64(2) {
		eventually(t, "it was tried", func() bool { return errors.Is(m.Metrics().Pool.Err, full) })
		m.mark(t, s, i)
		pause(t, s)
		connect(t, s)
		m.wantMark(t, s, i)
		m.alive(t, s)
	}
	if got := m.Metrics().Pool; got.Ready != 0 || got.Taken != 0 || got.Missed != 3 {
		t.Errorf("%+v", got)
	}
	lifecycle.FailPool(m.Manager, nil)
	pause(t, s)
	connect(t, s)
	m.poolReady(t, 2)
	pause(t, s)
	connect(t, s)
	m.wantPool(t, 1, 4)
}

// TestManagerPoolClosed closes a Manager while it makes VMs: all that it has made is gone, and nothing goes on.
func TestManagerPoolClosed(t *testing.T) {
	checkLeaks(t)
	m := newManager(t, lifecycle.ManagerOptions{})
	pause(t, m.create(t, lifecycle.CreateOptions{}))
	for range 4 {
		m.reopen(t, lifecycle.ManagerOptions{Pool: 64}) // closes the one before
	}
	closeManager(t, m.Manager)
	if n := openVMs(t); n != 0 {
		t.Errorf("%d VMs are left", n)
	}
}
