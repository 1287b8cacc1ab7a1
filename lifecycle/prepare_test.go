//go:build linux && amd64

package lifecycle_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"

	"filippo.io/age"
	"golang.org/x/sys/unix"

	"github.com/cryovisor/cryovisor/internal/testvm"
	"github.com/cryovisor/cryovisor/lifecycle"
	"github.com/cryovisor/cryovisor/memory"
	"github.com/cryovisor/cryovisor/snapshot"
	"github.com/cryovisor/cryovisor/vmm"
)

func (g *guest) options() lifecycle.PauseOptions {
	return lifecycle.PauseOptions{Recipients: []age.Recipient{g.key.Recipient()}}
}

func (g *guest) prepare(t *testing.T, m *lifecycle.Machine) *lifecycle.Preparation {
	t.Helper()
	p, err := m.Prepare(t.Context(), g.store, g.options())
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// TestPrepare: a prepared pause, full or a diff, has what the machine has when it stops, whatever it wrote during the passes.
func TestPrepare(t *testing.T) {
	checkLeaks(t)
	for _, vcpus := range []int{1, 2} {
		for _, eager := range []bool{false, true} {
			t.Run(fmt.Sprintf("vcpus=%d,eager=%v", vcpus, eager), func(t *testing.T) {
				g := newGuest(t, testvm.WorkerConfig{Memory: scaled(64 << 20), VCPUs: vcpus, WorkingSet: scaled(16 << 20)})
				m := g.boot(t, testvm.NoLimit)
				parent := snapshot.ID{}
				for n := range 4 {
					g.work(t, m, 20)
					p := g.prepare(t, m)
					for range n {
						g.work(t, m, 10)
						if err := p.Update(t.Context()); err != nil {
							t.Fatal(err)
						}
					}
					paused, err := p.Pause(t.Context())
					if err != nil {
						t.Fatal(err)
					}
					if paused.Parent != parent || paused.PreparedBytes == 0 {
						t.Errorf("a diff of %v, want %v; %d bytes prepared", paused.Parent, parent, paused.PreparedBytes)
					}
					t.Logf("%d KiB prepared, %d KiB left, freeze %v, total %v",
						paused.PreparedBytes>>10, paused.CandidateBytes>>10, paused.Freeze, paused.Total)
					if err := p.Close(); err != nil {
						t.Error(err)
					}
					closeMachine(t, m)
					parent = paused.ID
					m = g.resume(t, parent, eager, testvm.NoLimit)
					g.work(t, m, 10)
					g.compare(t, m)
					g.device.SetLimit(testvm.NoLimit)
				}
			})
		}
	}
}

// TestPrepareClosed: a preparation whose machine is closed ends with the next call, and leaves nothing open.
func TestPrepareClosed(t *testing.T) {
	checkLeaks(t)
	for name, end := range map[string]func(*lifecycle.Preparation) error{
		"pause": func(p *lifecycle.Preparation) error {
			_, err := p.Pause(t.Context())
			return err
		},
		"update": func(p *lifecycle.Preparation) error { return p.Update(t.Context()) },
	} {
		t.Run(name, func(t *testing.T) {
			checkLeaks(t)
			g := newGuest(t, testvm.WorkerConfig{Memory: scaled(64 << 20), WorkingSet: scaled(16 << 20)})
			m := g.boot(t, testvm.NoLimit)
			g.work(t, m, 5)
			p := g.prepare(t, m)
			closeMachine(t, m)
			if err := end(p); !errors.Is(err, vmm.ErrClosed) {
				t.Errorf("of a closed machine: %v", err)
			}
		})
	}
}

// TestPrepareIdle: what does not change after the preparation is not looked at again; a full snapshot of a resumed machine can be
// prepared too.
func TestPrepareIdle(t *testing.T) {
	checkLeaks(t)
	g := newGuest(t, testvm.WorkerConfig{Memory: 32 << 20})
	m := g.boot(t, testvm.NoLimit)
	id := g.pause(t, m).ID
	closeMachine(t, m)
	m = g.resume(t, id, false, testvm.NoLimit)
	g.work(t, m, 10)
	if err := m.VM.Pause(t.Context()); err != nil {
		t.Fatal(err)
	}
	opts := g.options()
	opts.Full = true
	p, err := m.Prepare(t.Context(), g.store, opts)
	if err != nil {
		t.Fatal(err)
	}
	paused, err := p.Pause(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if paused.CandidateBytes != 0 || paused.PreparedBytes == 0 || !paused.Parent.IsZero() {
		t.Errorf("%d bytes looked at, %d prepared, a diff of %v", paused.CandidateBytes, paused.PreparedBytes, paused.Parent)
	}
	closeMachine(t, m)
	m = g.resume(t, paused.ID, false, testvm.NoLimit)
	g.work(t, m, 10)
	g.compare(t, m)
}

// TestPrepareGivenUp: a preparation that comes to nothing leaves nothing, and the machine as it was.
func TestPrepareGivenUp(t *testing.T) {
	checkLeaks(t)
	g := newGuest(t, testvm.WorkerConfig{Memory: 64 << 20, VCPUs: 2})
	m := g.boot(t, testvm.NoLimit)
	full, err := snapshot.OpenStore(mountTmpfs(t, "size=8m"))
	if err != nil {
		t.Fatal(err)
	}
	for name, giveUp := range map[string]func(t *testing.T){
		"closed": func(t *testing.T) {
			p := g.prepare(t, m)
			if err := errors.Join(p.Close(), p.Close()); err != nil {
				t.Fatal(err)
			}
			if err := p.Update(t.Context()); !errors.Is(err, lifecycle.ErrEnded) {
				t.Error(err)
			}
			if _, err := p.Pause(t.Context()); !errors.Is(err, lifecycle.ErrEnded) {
				t.Error(err)
			}
		},
		"cancelled": func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			opts := g.options()
			opts.Progress = func(done, total uint64) {
				if done > total/2 {
					cancel()
				}
			}
			if _, err := m.Prepare(ctx, g.store, opts); !errors.Is(err, context.Canceled) {
				t.Error(err)
			}
		},
		"no room": func(t *testing.T) {
			if _, err := m.Prepare(t.Context(), full, g.options()); !errors.Is(err, unix.ENOSPC) {
				t.Error(err)
			}
			if left := files(t, full.Dir()); len(left) > 1 {
				t.Errorf("left behind: %v", left)
			}
		},
		"cancelled at the end": func(t *testing.T) {
			p := g.prepare(t, m)
			ctx, cancel := context.WithCancel(t.Context())
			cancel()
			if _, err := p.Pause(ctx); !errors.Is(err, context.Canceled) {
				t.Error(err)
			}
		},
		"resumed": func(t *testing.T) { // in the midst of its pause
			resumed := make(chan error, 1)
			opts, pausing := g.options(), false
			opts.Extra = func() ([]snapshot.Section, error) {
				pausing = true
				return nil, nil
			}
			opts.Progress = func(uint64, uint64) {
				if pausing {
					pausing = false
					go func() { resumed <- m.Resume() }()
					<-m.GivenUp()
				}
			}
			p, err := m.Prepare(t.Context(), g.store, opts)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := p.Pause(t.Context()); !errors.Is(err, lifecycle.ErrResumed) {
				t.Error(err)
			}
			if err := <-resumed; err != nil {
				t.Error(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			g.work(t, m, 10)
			giveUp(t)
			if left := files(t, g.store.Dir()); len(left) > 1 { // the lock
				t.Errorf("left behind: %v", left)
			}
			g.work(t, m, 10)
		})
	}
	id := g.pause(t, m).ID
	closeMachine(t, m)
	m = g.resume(t, id, false, testvm.NoLimit)
	g.work(t, m, 10)
	g.compare(t, m)
}

// closing has a machine closed in the midst of what the options are for, as soon as that makes progress; it says how that went.
func closing(m *lifecycle.Machine, opts *lifecycle.PauseOptions) <-chan error {
	closed := make(chan error, 1)
	var once sync.Once
	opts.Progress = func(uint64, uint64) {
		once.Do(func() {
			go func() { closed <- m.Close() }()
			<-m.GivenUp()
		})
	}
	return closed
}

// TestCloseDuringPrepare: a machine that is closed ends its preparations.
func TestCloseDuringPrepare(t *testing.T) {
	checkLeaks(t)
	g := newGuest(t, testvm.WorkerConfig{Memory: 64 << 20})
	m := g.boot(t, testvm.NoLimit)
	p := g.prepare(t, m)
	opts := g.options()
	closed := closing(m, &opts)
	if _, err := m.Prepare(t.Context(), g.store, opts); !errors.Is(err, vmm.ErrClosed) {
		t.Error(err)
	}
	if err := <-closed; err != nil {
		t.Error(err)
	}
	if _, err := p.Pause(t.Context()); !errors.Is(err, vmm.ErrClosed) {
		t.Error(err)
	}
	if err := p.Close(); err != nil {
		t.Error(err)
	}
	if left := files(t, g.store.Dir()); len(left) > 1 {
		t.Errorf("left behind: %v", left)
	}
}

// TestPrepareDisks: disks that change during the preparation are as they are when the machine stops.
func TestPrepareDisks(t *testing.T) {
	checkLeaks(t)
	g, models, rnd := diskGuest(t)
	m := g.boot(t, testvm.NoLimit)
	for n := range 6 {
		g.work(t, m, 2)
		for _, d := range models {
			d.change(t, m, rnd)
		}
		p := g.prepare(t, m)
		for _, d := range models {
			if n%3 != 2 {
				d.change(t, m, rnd)
			}
		}
		paused, err := p.Pause(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if n%3 == 2 && paused.DiskBytes != 0 {
			t.Errorf("%d bytes of disks looked at that have not changed", paused.DiskBytes)
		}
		closeMachine(t, m)
		if left := overlays(t, g); len(left) > 0 {
			t.Fatalf("a pause leaves %q", left)
		}
		m = g.resume(t, paused.ID, false, testvm.NoLimit)
		checkDisks(t, m, models)
	}
	closeMachine(t, m)
}

// TestDiscardAfterStoring: memory that the guest gives up after it was stored is not in the next checkpoint, nor in a prepared pause.
// (The guest stands still: any of its pages will do.)
func TestDiscardAfterStoring(t *testing.T) {
	checkLeaks(t)
	g := newGuest(t, testvm.WorkerConfig{Memory: 16 << 20})
	m := g.boot(t, testvm.NoLimit)
	g.work(t, m, 5)
	if err := m.VM.Pause(t.Context()); err != nil {
		t.Fatal(err)
	}
	first, _ := g.checkpoint(t, m)
	gpa, n := g.storedRun(t, first.ID), uint64(3*memory.PageSize)
	discard := func() {
		if err := m.VM.Memory().Discard(gpa, n); err != nil {
			t.Fatal(err)
		}
	}
	discard()
	second, _ := g.checkpoint(t, m)
	if _, err := m.VM.Memory().WriteAt([]byte{1}, int64(gpa)); err != nil {
		t.Fatal(err)
	}
	p := g.prepare(t, m)
	discard()
	paused, err := p.Pause(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, id := range []snapshot.ID{second.ID, paused.ID} {
		r := g.open(t, id)
		for at := gpa; at <= gpa+n; at += memory.PageSize {
			if _, _, chunk := r.Lookup(at); chunk >= 0 && at < gpa+n {
				t.Errorf("snapshot %v has what was discarded at %#x", id, at)
			} else if chunk < 0 && at == gpa+n {
				t.Errorf("snapshot %v lacks what was not discarded", id)
			}
		}
	}
}

// storedRun is where a snapshot has four pages side by side.
func (g *guest) storedRun(t *testing.T, id snapshot.ID) uint64 {
	t.Helper()
	r := g.open(t, id)
	for gpa := uint64(0); gpa < g.worker.Config().Memory; {
		start, length, chunk := r.Lookup(gpa)
		if chunk >= 0 && length >= 4*memory.PageSize {
			return start
		}
		gpa = start + length
	}
	t.Fatal("there is no such memory")
	return 0
}
