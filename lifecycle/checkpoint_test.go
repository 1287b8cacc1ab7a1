//go:build linux && amd64

package lifecycle_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"sync"
	"testing"

	"github.com/cryovisor/cryovisor/internal/testvm"
	"github.com/cryovisor/cryovisor/lifecycle"
	"github.com/cryovisor/cryovisor/memory"
	"github.com/cryovisor/cryovisor/snapshot"
	"github.com/cryovisor/cryovisor/vmm"
)

// past is a guest as it was at a checkpoint, to be resumed beside the one that has run on.
func (g *guest) past(saved []testvm.VCPUState) *guest {
	p := &guest{worker: g.worker, content: g.content, store: g.store, key: g.key, disks: g.disks}
	p.model = testvm.NewModel(p.worker, p.content)
	p.device = testvm.NewDevice(p.worker, saved, 0, nil)
	return p
}

// checkpoint makes a checkpoint and returns the guest as it is in it.
func (g *guest) checkpoint(t *testing.T, m *lifecycle.Machine) (lifecycle.Paused, *guest) {
	t.Helper()
	opts := g.options()
	var then *guest
	opts.Extra = func() ([]snapshot.Section, error) {
		then = g.past(g.device.State())
		return nil, nil
	}
	p, err := m.Checkpoint(t.Context(), g.store, opts)
	if errors.Is(err, memory.ErrNoWriteProtect) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	return p, then
}

// TestCheckpoint makes checkpoints of a guest that never stands still, each a diff of the one before, and a pause at the end; and
// goes on from every one of them.
func TestCheckpoint(t *testing.T) {
	checkLeaks(t)
	for _, from := range []string{"boot", "lazy", "eager"} {
		t.Run(from, func(t *testing.T) {
			g := newGuest(t, testvm.WorkerConfig{Memory: scaled(64 << 20), VCPUs: 2})
			m := g.boot(t, testvm.NoLimit)
			parent := snapshot.ID{}
			if from != "boot" {
				g.work(t, m, 10)
				parent = g.pause(t, m).ID
				closeMachine(t, m)
				m = g.resume(t, parent, from == "eager", testvm.NoLimit)
			}
			var ids []snapshot.ID
			var guests []*guest
			for range 4 {
				g.work(t, m, 10)
				p, then := g.checkpoint(t, m)
				if p.Parent != parent {
					t.Errorf("a diff of %v, want %v", p.Parent, parent)
				}
				t.Logf("%d KiB looked at, freeze %v, total %v; %+v", p.CandidateBytes>>10, p.Freeze, p.Total, m.VM.Memory().Stats())
				ids, guests, parent = append(ids, p.ID), append(guests, then), p.ID
			}
			g.work(t, m, 10)
			last := g.pause(t, m)
			if last.Parent != parent {
				t.Errorf("the pause is a diff of %v, want %v", last.Parent, parent)
			}
			closeMachine(t, m)
			ids, guests = append(ids, last.ID), append(guests, g)
			for i, then := range guests {
				m := then.resume(t, ids[i], false, testvm.NoLimit)
				then.work(t, m, 10)
				then.compare(t, m)
				closeMachine(t, m)
			}
		})
	}
}

// TestCheckpointRunsOn: the guest runs between the moment and the end of the checkpoint, however little it may write.
func TestCheckpointRunsOn(t *testing.T) {
	checkLeaks(t)
	g := newGuest(t, testvm.WorkerConfig{Memory: 64 << 20, VCPUs: 2, WorkingSet: 8 << 20})
	m := g.boot(t, testvm.NoLimit)
	g.work(t, m, 2)
	opts := g.options()
	launches, done := uint64(0), false
	opts.Extra = func() ([]snapshot.Section, error) {
		launches = m.VM.Launches()
		return nil, nil
	}
	opts.Progress = func(uint64, uint64) {
		if done {
			return
		}
		done = true
		if m.VM.Launches() == launches {
			t.Error("the guest stands still while it is stored")
		}
		g.work(t, m, 5) // it has to write, and need not wait for more than what is read already
		if err := m.Resume(); !errors.Is(err, vmm.ErrRunState) {
			t.Errorf("resume of a running machine: %v", err)
		}
	}
	if _, err := m.Checkpoint(t.Context(), g.store, opts); errors.Is(err, memory.ErrNoWriteProtect) {
		t.Skip(err)
	} else if err != nil {
		t.Fatal(err)
	}
	if !done {
		t.Error("no progress was told")
	}
	g.compare(t, m)
}

// TestCheckpointFails: whatever makes a checkpoint fail, the guest runs on, nothing is left, and the next one is exact.
func TestCheckpointFails(t *testing.T) {
	checkLeaks(t)
	g := newGuest(t, testvm.WorkerConfig{Memory: 64 << 20, VCPUs: 2})
	m := g.boot(t, testvm.NoLimit)
	base, _ := g.checkpoint(t, m)
	for name, fail := range map[string]func(context.Context, context.CancelFunc) (lifecycle.PauseOptions, error){
		"extra": func(context.Context, context.CancelFunc) (lifecycle.PauseOptions, error) {
			opts, err := g.options(), errors.New("no more")
			opts.Extra = func() ([]snapshot.Section, error) { return nil, err }
			return opts, err
		},
		"cancelled at half": func(_ context.Context, cancel context.CancelFunc) (lifecycle.PauseOptions, error) {
			opts := g.options()
			opts.Progress = func(done, total uint64) {
				if done > total/2 {
					cancel()
				}
			}
			return opts, context.Canceled
		},
		"full": func(context.Context, context.CancelFunc) (lifecycle.PauseOptions, error) {
			opts := g.options()
			opts.Full = true
			return opts, vmm.ErrConfig
		},
		"resumed behind its back": func(context.Context, context.CancelFunc) (lifecycle.PauseOptions, error) {
			opts := g.options()
			opts.Extra = func() ([]snapshot.Section, error) { return nil, m.VM.Resume() }
			return opts, lifecycle.ErrResumed
		},
	} {
		t.Run(name, func(t *testing.T) {
			g.work(t, m, 10)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			opts, want := fail(ctx, cancel)
			if _, err := m.Checkpoint(ctx, g.store, opts); !errors.Is(err, want) {
				t.Fatalf("error %v, want %v", err, want)
			}
			if entries, err := g.store.List(); err != nil || len(entries) != 1 {
				t.Errorf("the store has %v; %v", entries, err)
			}
			g.work(t, m, 10)
		})
	}
	p, then := g.checkpoint(t, m)
	if p.Parent != base.ID {
		t.Errorf("a diff of %v, want %v", p.Parent, base.ID)
	}
	closeMachine(t, m)
	m = then.resume(t, p.ID, false, testvm.NoLimit)
	then.work(t, m, 10)
	then.compare(t, m)
}

// TestCheckpointOfPaused: a machine that stands still goes on standing still; and may be resumed in the midst of it.
func TestCheckpointOfPaused(t *testing.T) {
	checkLeaks(t)
	g := newGuest(t, testvm.WorkerConfig{Memory: 32 << 20})
	m := g.boot(t, testvm.NoLimit)
	g.work(t, m, 5)
	if err := m.VM.Pause(t.Context()); err != nil {
		t.Fatal(err)
	}
	first, _ := g.checkpoint(t, m)
	if !m.VM.Paused() {
		t.Error("the machine runs")
	}
	opts := g.options()
	var then *guest
	opts.Extra = func() ([]snapshot.Section, error) {
		then = g.past(g.device.State())
		return nil, nil
	}
	if err := m.Resume(); err != nil {
		t.Fatal(err)
	}
	g.work(t, m, 5)
	if err := m.VM.Pause(t.Context()); err != nil {
		t.Fatal(err)
	}
	resumed := false
	opts.Progress = func(uint64, uint64) {
		if !resumed {
			resumed = true
			if err := m.Resume(); err != nil {
				t.Error(err)
			}
			g.work(t, m, 2)
		}
	}
	second, err := m.Checkpoint(t.Context(), g.store, opts)
	if err != nil || second.Parent != first.ID {
		t.Fatal(err, second.Parent)
	}
	g.compare(t, m)
	closeMachine(t, m)
	m = then.resume(t, second.ID, false, testvm.NoLimit)
	then.work(t, m, 5)
	then.compare(t, m)
}

// TestCloseDuringCheckpoint: a machine that is closed makes no checkpoint, and no guest hangs in what it must not write.
func TestCloseDuringCheckpoint(t *testing.T) {
	checkLeaks(t)
	g := newGuest(t, testvm.WorkerConfig{Memory: 64 << 20, VCPUs: 2})
	m := g.boot(t, testvm.NoLimit)
	g.work(t, m, 5)
	opts := g.options()
	closed := closing(m, &opts)
	_, err := m.Checkpoint(t.Context(), g.store, opts)
	if errors.Is(err, memory.ErrNoWriteProtect) {
		t.Skip(err)
	}
	if !errors.Is(err, vmm.ErrClosed) {
		t.Error(err)
	}
	if err := <-closed; err != nil {
		t.Error(err)
	}
	if entries, err := g.store.List(); err != nil || len(entries) != 0 {
		t.Errorf("the store has %v; %v", entries, err)
	}
}

// diskWriter changes a machine's disks all the time, but not while the machine stands still.
type diskWriter struct {
	m      *lifecycle.Machine
	models []*diskModel

	mu      sync.Mutex
	stopped bool
	at      uint64 // VM.Launches when it stood still
	then    []*diskModel
}

// stop is called when the machine stands still, and notes what is on the disks.
func (w *diskWriter) stop() ([]snapshot.Section, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.stopped, w.at, w.then = true, w.m.VM.Launches(), nil
	for _, d := range w.models {
		w.then = append(w.then, d.clone())
	}
	return nil, nil
}

func (w *diskWriter) write(t *testing.T, rnd *rand.Rand) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.stopped && w.m.VM.Launches() == w.at {
		return
	}
	w.stopped = false
	w.models[rnd.IntN(len(w.models))].change(t, w.m, rnd)
}

// TestCheckpointDisks: the disks are of the same moment as the memory, though they are written to all the time.
func TestCheckpointDisks(t *testing.T) {
	checkLeaks(t)
	g, models, rnd := diskGuest(t)
	m := g.boot(t, testvm.NoLimit)
	w := &diskWriter{m: m, models: models}
	stop := make(chan struct{})
	var writer sync.WaitGroup
	writer.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				w.write(t, rnd)
				runtime.Gosched()
			}
		}
	})
	var ids []snapshot.ID
	var moments [][]*diskModel
	for n := range 6 {
		g.work(t, m, 5)
		opts := g.options()
		opts.Extra = w.stop
		p, err := m.Checkpoint(t.Context(), g.store, opts)
		if errors.Is(err, memory.ErrNoWriteProtect) {
			t.Skip(err)
		}
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("checkpoint %d: %d KiB of disks looked at", n, p.DiskBytes>>10)
		ids, moments = append(ids, p.ID), append(moments, w.then)
	}
	close(stop)
	writer.Wait()
	checkDisks(t, m, models)
	last := g.pause(t, m)
	closeMachine(t, m)
	ids, moments = append(ids, last.ID), append(moments, models)
	for i, id := range ids {
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			m := g.resume(t, id, i%2 == 0, testvm.NoLimit)
			checkDisks(t, m, moments[i])
			closeMachine(t, m)
		})
	}
}
