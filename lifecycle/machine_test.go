//go:build linux && amd64

package lifecycle_test

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"sync/atomic"
	"testing"

	"filippo.io/age"
	"golang.org/x/sys/cpu"

	"github.com/cryovisor/cryovisor/internal/testvm"
	"github.com/cryovisor/cryovisor/lifecycle"
	"github.com/cryovisor/cryovisor/memory"
	"github.com/cryovisor/cryovisor/snapshot"
	"github.com/cryovisor/cryovisor/vmm"
)

const seed = 42

// guest is a worker guest and its model, through several machines.
type guest struct {
	worker  *testvm.Worker
	content testvm.Content
	model   *testvm.Model
	device  *testvm.Device
	store   *snapshot.Store
	key     *age.X25519Identity
	disks   lifecycle.Disks
	pool    *lifecycle.Pool // for resume; may be nil
	reports atomic.Int64
}

// scaled is the size of memory for a test that compares all of it again and again: with -short, as for the race detector, it
// has as many cases, and a quarter to compare in each.
func scaled(size uint64) uint64 {
	if testing.Short() {
		return size / 4
	}
	return size
}

// newGuest describes a guest of the given RAM; it skips the test where there is
// no KVM.
func newGuest(t *testing.T, cfg testvm.WorkerConfig) *guest {
	t.Helper()
	if _, err := vmm.Probe(); errors.Is(err, vmm.ErrNoKVM) || errors.Is(err, vmm.ErrPermission) {
		t.Skip(err)
	}
	cfg.Seed, cfg.AVX2 = seed, cpu.X86.HasAVX2
	if cfg.Every == 0 {
		cfg.Every = 64
	}
	w, err := testvm.NewWorker(cfg)
	if err != nil {
		t.Fatal(err)
	}
	g := &guest{worker: w, content: testvm.NewPattern(seed)}
	g.model = testvm.NewModel(w, g.content)
	if g.key, err = age.GenerateX25519Identity(); err != nil {
		t.Fatal(err)
	}
	if g.store, err = snapshot.OpenStore(t.TempDir()); err != nil {
		t.Fatal(err)
	}
	return g
}

// hardware makes a new device for the guest, which goes on from the last one's
// state.
func (g *guest) hardware(limit uint64) vmm.Hardware {
	var saved []testvm.VCPUState
	if g.device != nil {
		saved = g.device.State()
	}
	g.device = testvm.NewDevice(g.worker, saved, limit, func(testvm.Report) { g.reports.Add(1) })
	return vmm.Hardware{Ports: []vmm.Ports{g.device.Ports()}}
}

func (g *guest) boot(t *testing.T, limit uint64) *lifecycle.Machine {
	t.Helper()
	m, err := lifecycle.Boot(t.Context(), vmm.Config{
		MemoryBytes: g.worker.Config().Memory,
		VCPUs:       g.worker.Config().VCPUs,
		Boot:        g.worker.Image().Program(),
		Hardware:    g.hardware(limit),
	}, g.disks)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeMachine(t, m) })
	mem := m.VM.Memory()
	err = g.worker.Load(g.content, func(gpa uint64, data []byte) error {
		_, err := mem.WriteAt(data, int64(gpa))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := m.VM.Start(); err != nil {
		t.Fatal(err)
	}
	return m
}

func closeMachine(t *testing.T, m *lifecycle.Machine) {
	t.Helper()
	if err := m.Close(); err != nil {
		t.Error(err)
	}
}

func (g *guest) pause(t *testing.T, m *lifecycle.Machine) lifecycle.Paused {
	t.Helper()
	p, err := m.Pause(t.Context(), g.store, lifecycle.PauseOptions{Recipients: []age.Recipient{g.key.Recipient()}})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func (g *guest) resume(t *testing.T, id snapshot.ID, eager bool, limit uint64) *lifecycle.Machine {
	t.Helper()
	m, err := lifecycle.Resume(t.Context(), g.store, id, lifecycle.ResumeOptions{
		Identities: []age.Identity{g.key}, Hardware: g.hardware(limit), Disks: g.disks, Eager: eager, Pool: g.pool,
	})
	if errors.Is(err, vmm.ErrNoUserfaultfd) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeMachine(t, m) })
	if err := m.VM.Resume(); err != nil {
		t.Fatal(err)
	}
	return m
}

// compare lets every vCPU of m come to a report and compares it, and every byte
// of memory, with the model.
func (g *guest) compare(t *testing.T, m *lifecycle.Machine) {
	t.Helper()
	g.device.SetLimit(0)
	ctx, cancel := context.WithCancelCause(t.Context())
	defer cancel(nil)
	go func() { cancel(m.VM.Wait(ctx)) }()
	reports, err := g.device.WaitHeld(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range reports {
		if err := g.model.Check(r); err != nil {
			t.Fatal(err)
		}
	}
	if err := g.model.Compare(m.VM.Memory(), m.VM.Memory().Ranges()); err != nil {
		t.Fatal(err)
	}
}

// TestPauseResume pauses at any instant and compares every byte of memory, every
// register and every report: full and diff, lazy and eager, one and more vCPUs.
func TestPauseResume(t *testing.T) {
	checkLeaks(t)
	for _, vcpus := range []int{1, 2} {
		for _, eager := range []bool{false, true} {
			t.Run(fmt.Sprintf("vcpus=%d,eager=%v", vcpus, eager), func(t *testing.T) {
				g := newGuest(t, testvm.WorkerConfig{Memory: scaled(64 << 20), VCPUs: vcpus})
				m := g.boot(t, testvm.NoLimit)
				g.work(t, m, 20)
				p := g.pause(t, m)
				if p.Parent != (snapshot.ID{}) {
					t.Fatalf("the first snapshot is a diff of %v", p.Parent)
				}
				for range 3 {
					closeMachine(t, m)
					m = g.resume(t, p.ID, eager, testvm.NoLimit)
					g.work(t, m, 20)
					g.compare(t, m)
					g.device.SetLimit(testvm.NoLimit)
					g.work(t, m, 20)
					last := p.ID
					if p = g.pause(t, m); p.Parent != last {
						t.Fatalf("snapshot is a diff of %v, want %v", p.Parent, last)
					}
					t.Logf("diff: %d KiB looked at, %d pages stored, freeze %v, total %v; %+v",
						p.CandidateBytes>>10, p.PagesStored, p.Freeze, p.Total, m.VM.Memory().Stats())
				}
			})
		}
	}
}

// work waits for n more reports of the running guest.
func (g *guest) work(t *testing.T, m *lifecycle.Machine, n int64) {
	t.Helper()
	for want := g.reports.Load() + n; g.reports.Load() < want; runtime.Gosched() {
		select {
		case <-m.VM.Ended():
			t.Fatal(m.VM.Wait(t.Context()))
		default:
		}
	}
}

// sparse is content of which only few pages are not zero.
type sparse struct{ testvm.Content }

func (s sparse) Page(page uint64, dst []byte) bool {
	if page/64%32 != 0 {
		clear(dst)
		return false
	}
	return s.Content.Page(page, dst)
}

// TestHighMemory: RAM on both sides of the 32-bit hole.
func TestHighMemory(t *testing.T) {
	if testing.Short() {
		t.Skip("compares 5 GiB")
	}
	g := newGuest(t, testvm.WorkerConfig{Memory: 5 << 30, VCPUs: 2, WorkingSet: 32 << 20})
	checkLeaks(t)
	g.content = sparse{g.content}
	g.model = testvm.NewModel(g.worker, g.content)
	g.pool = newPool(t, 5<<30, 1)
	m := g.boot(t, testvm.NoLimit)
	for range 2 {
		g.work(t, m, 100)
		p := g.pause(t, m)
		closeMachine(t, m)
		m = g.resume(t, p.ID, false, testvm.NoLimit)
	}
	g.work(t, m, 100)
	dirty, err := m.VM.Memory().Dirty(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if high := dirty[len(dirty)-1].GPA; high < memory.HoleEnd {
		t.Fatalf("the guest did not write above 4 GiB, only up to %#x", high)
	}
	g.compare(t, m)
}

// TestFullAgain: a resumed machine can be stored as a snapshot that depends on no
// other.
func TestFullAgain(t *testing.T) {
	g := newGuest(t, testvm.WorkerConfig{Memory: 32 << 20})
	checkLeaks(t)
	m := g.boot(t, testvm.NoLimit)
	g.work(t, m, 10)
	first := g.pause(t, m)
	closeMachine(t, m)
	m = g.resume(t, first.ID, false, testvm.NoLimit)
	g.work(t, m, 10)
	second, err := m.Pause(t.Context(), g.store, lifecycle.PauseOptions{Recipients: []age.Recipient{g.key.Recipient()}, Full: true})
	if err != nil {
		t.Fatal(err)
	}
	closeMachine(t, m)
	if !second.Parent.IsZero() {
		t.Fatalf("a full snapshot has the parent %v", second.Parent)
	}
	if err := g.store.Delete(t.Context(), first.ID); err != nil {
		t.Fatal(err)
	}
	m = g.resume(t, second.ID, false, testvm.NoLimit)
	g.work(t, m, 10)
	g.compare(t, m)
}

// TestRunOn: a machine that was stored can run on in its process, and be stored
// again.
func TestRunOn(t *testing.T) {
	g := newGuest(t, testvm.WorkerConfig{Memory: 32 << 20, VCPUs: 2})
	checkLeaks(t)
	m := g.boot(t, testvm.NoLimit)
	for range 3 {
		g.work(t, m, 10)
		g.pause(t, m)
		if err := m.VM.Resume(); err != nil {
			t.Fatal(err)
		}
	}
	g.compare(t, m)
	if err := m.VM.Pause(t.Context()); err != nil {
		t.Fatal(err)
	}
	last := g.pause(t, m).ID // of a machine that is paused already, while the guest holds
	closeMachine(t, m)
	m = g.resume(t, last, true, testvm.NoLimit)
	g.work(t, m, 10)
	g.compare(t, m)
}
