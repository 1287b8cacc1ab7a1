//go:build linux && amd64

package lifecycle_test

import (
	"errors"
	"fmt"
	"testing"

	"filippo.io/age"

	"github.com/cryovisor/cryovisor/internal/testvm"
	"github.com/cryovisor/cryovisor/lifecycle"
	"github.com/cryovisor/cryovisor/snapshot"
	"github.com/cryovisor/cryovisor/vmm"
)

// TestResumeDuringPause changes its mind when a part of the memory is written: the machine runs on at once, nothing is left of
// the snapshot, and the next one is exact.
func TestResumeDuringPause(t *testing.T) {
	checkLeaks(t)
	g := newGuest(t, testvm.WorkerConfig{Memory: 64 << 20, VCPUs: 2})
	m := g.boot(t, testvm.NoLimit)
	var taken []snapshot.ID
	for _, at := range []float64{0, 0.1, 0.5, 0.9, 1, 1, 1} { // at the end, the commit is in its course, or over
		g.work(t, m, 10)
		resumed := make(chan error, 1)
		asked := false
		p, err := m.Pause(t.Context(), g.store, lifecycle.PauseOptions{
			Recipients: []age.Recipient{g.key.Recipient()},
			Progress: func(done, total uint64) {
				if !asked && float64(done) >= at*float64(total) {
					asked = true
					go func() { resumed <- m.Resume() }()
				}
			},
		})
		if err := <-resumed; err != nil {
			t.Fatalf("at %v: %v", at, err)
		}
		g.work(t, m, 10)
		switch {
		case err == nil && at == 1:
			taken = append(taken, p.ID) // too late
		case !errors.Is(err, lifecycle.ErrResumed):
			t.Fatalf("at %v: %v", at, err)
		}
		if entries, err := g.store.List(); err != nil || len(entries) != len(taken) {
			t.Fatalf("at %v: the store has %v, want %v; %v", at, entries, taken, err)
		}
	}
	g.compare(t, m)
	g.device.SetLimit(testvm.NoLimit)
	id := g.pause(t, m).ID
	closeMachine(t, m)
	m = g.resume(t, id, false, testvm.NoLimit)
	g.work(t, m, 10)
	g.compare(t, m)
}

// TestResumeOfPaused: a machine that stood still before the pause that is given up runs too.
func TestResumeOfPaused(t *testing.T) {
	checkLeaks(t)
	g := newGuest(t, testvm.WorkerConfig{Memory: 16 << 20})
	m := g.boot(t, testvm.NoLimit)
	g.work(t, m, 2)
	if err := m.VM.Pause(t.Context()); err != nil {
		t.Fatal(err)
	}
	resumed := make(chan error, 1)
	_, err := m.Pause(t.Context(), g.store, lifecycle.PauseOptions{
		Recipients: []age.Recipient{g.key.Recipient()},
		Extra: func() ([]snapshot.Section, error) {
			go func() { resumed <- m.Resume() }()
			return nil, nil
		},
		Progress: func(done, total uint64) {
			if done < total { // not over before Resume has been heard
				<-m.GivenUp()
			}
		},
	})
	if !errors.Is(err, lifecycle.ErrResumed) {
		t.Error(err)
	}
	if err := <-resumed; err != nil {
		t.Error(err)
	}
	g.work(t, m, 2)
	g.compare(t, m)
}

// TestResumeBehindPause: a VM that somebody resumes without the machine's knowledge makes no snapshot.
func TestResumeBehindPause(t *testing.T) {
	checkLeaks(t)
	g := newGuest(t, testvm.WorkerConfig{Memory: 16 << 20})
	m := g.boot(t, testvm.NoLimit)
	g.work(t, m, 2)
	done := false
	_, err := m.Pause(t.Context(), g.store, lifecycle.PauseOptions{
		Recipients: []age.Recipient{g.key.Recipient()},
		Progress: func(uint64, uint64) {
			if !done {
				done = true
				if err := m.VM.Resume(); err != nil {
					t.Error(err)
				}
			}
		},
	})
	if !errors.Is(err, lifecycle.ErrResumed) {
		t.Fatal(err)
	}
	if left := files(t, g.store.Dir()); len(left) > 1 { // the lock
		t.Errorf("left are %v", fmt.Sprint(left))
	}
	g.work(t, m, 2)
	g.compare(t, m)
}

// TestCloseDuringPause: a machine that is closed in the midst of a pause makes no snapshot, and is read no more.
func TestCloseDuringPause(t *testing.T) {
	checkLeaks(t)
	for _, at := range []float64{0, 0.5, 0.9} {
		g := newGuest(t, testvm.WorkerConfig{Memory: 64 << 20, VCPUs: 2})
		m := g.boot(t, testvm.NoLimit)
		g.work(t, m, 10)
		closed, asked := make(chan error, 1), false
		_, err := m.Pause(t.Context(), g.store, lifecycle.PauseOptions{
			Recipients: []age.Recipient{g.key.Recipient()},
			Progress: func(done, total uint64) {
				if !asked && float64(done) >= at*float64(total) {
					asked = true
					go func() { closed <- m.Close() }()
					<-m.GivenUp()
				}
			},
		})
		if !errors.Is(err, vmm.ErrClosed) {
			t.Errorf("at %v: %v", at, err)
		}
		if err := <-closed; err != nil {
			t.Errorf("at %v: %v", at, err)
		}
		if entries, err := g.store.List(); err != nil || len(entries) != 0 {
			t.Errorf("at %v: the store has %v; %v", at, entries, err)
		}
	}
}
