//go:build linux && amd64

package lifecycle_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/cryovisor/cryovisor/lifecycle"
)

// TestFork forks a sandbox that runs and one that is paused, kills the original while the forks have not touched all of their memory, and
// pauses and resumes the forks.
func TestFork(t *testing.T) {
	checkLeaks(t)
	for _, paused := range []bool{false, true} {
		m := newManager(t, lifecycle.ManagerOptions{})
		empty := len(m.stored(t))
		s := m.create(t, lifecycle.CreateOptions{
			Metadata: map[string]string{"k": "v"}, Timeout: time.Hour, OnTimeout: lifecycle.ActionPause, Owner: "me",
		})
		m.mark(t, s, 7)
		if paused {
			pause(t, s)
		}
		results, err := s.Fork(t.Context(), 3, lifecycle.ConnectOptions{Timeout: time.Minute})
		if err != nil {
			t.Fatal(err)
		}
		wantState(t, s, map[bool]lifecycle.State{false: lifecycle.StateRunning, true: lifecycle.StatePaused}[paused])
		if !paused {
			m.mark(t, s, 8) // not the forks'
			m.alive(t, s)
		}
		if err := s.Kill(t.Context()); err != nil {
			t.Fatal(err)
		}
		for i, r := range results {
			if r.Err != nil {
				t.Fatal(r.Err)
			}
			info, err := r.Sandbox.Info()
			if err != nil || info.Metadata["k"] != "v" || info.Owner != "me" || info.OnTimeout != lifecycle.ActionPause ||
				!info.End.Equal(m.clock.Now().Add(time.Minute)) || info.ID == s.ID() {
				t.Errorf("fork %d: %+v, %v", i, info, err)
			}
			m.wantMark(t, r.Sandbox, 7)
			m.mark(t, r.Sandbox, uint64(100+i))
			pause(t, r.Sandbox)
			connect(t, r.Sandbox)
		}
		for i, r := range results {
			m.wantMark(t, r.Sandbox, uint64(100+i))
			m.alive(t, r.Sandbox)
			if err := r.Sandbox.Kill(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		if left := m.stored(t); len(left) != empty {
			t.Errorf("left: %v", left)
		}
	}
}

// TestManagerCheckpoint keeps a sandbox as a template, of one that runs and one that is paused, which outlives it.
func TestManagerCheckpoint(t *testing.T) {
	m := newManager(t, lifecycle.ManagerOptions{})
	empty := len(m.stored(t))
	m.clock.advance(time.Second) // the list of templates is by age
	s := m.create(t, lifecycle.CreateOptions{Owner: "me"})
	m.mark(t, s, 1)
	running, err := s.Checkpoint(t.Context(), "kept")
	if err != nil {
		t.Fatal(err)
	}
	m.mark(t, s, 2)
	pause(t, s)
	paused, err := s.Checkpoint(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Checkpoint(t.Context(), "kept"); !errors.Is(err, lifecycle.ErrExists) {
		t.Errorf("a name twice: %v", err)
	}
	connect(t, s)
	m.wantMark(t, s, 2)
	if err := s.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	m.reopen(t)
	if all := m.Templates(); len(all) != 3 || all[2].Name != "ticker" {
		t.Errorf("templates: %+v", all)
	}
	for name, want := range map[string]uint64{"kept": 1, running.ID: 1, paused.ID: 2} {
		clone := m.create(t, lifecycle.CreateOptions{Template: name, Owner: "me"})
		m.wantMark(t, clone, want)
		if _, err := m.Create(t.Context(), lifecycle.CreateOptions{Template: name, Owner: "other"}); !errors.Is(err, lifecycle.ErrNotFound) {
			t.Errorf("another's checkpoint: %v", err)
		}
		if err := clone.Kill(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	clone := m.create(t, lifecycle.CreateOptions{Template: "kept"})
	for _, id := range []string{running.ID, paused.ID} {
		if err := m.DeleteTemplate(t.Context(), id); err != nil {
			t.Fatal(err)
		}
		if err := m.DeleteTemplate(t.Context(), id); !errors.Is(err, lifecycle.ErrNotFound) {
			t.Errorf("deleted twice: %v", err)
		}
	}
	m.wantMark(t, clone, 1)
	pause(t, clone)
	connect(t, clone)
	m.wantMark(t, clone, 1)
	if err := clone.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	if left := m.stored(t); len(left) != empty {
		t.Errorf("left: %v", left)
	}
}

func TestTemplateErrors(t *testing.T) {
	m := newManager(t, lifecycle.ManagerOptions{})
	empty := len(m.stored(t))
	if _, err := m.CreateTemplate(t.Context(), ticker(t, "ticker")); !errors.Is(err, lifecycle.ErrExists) {
		t.Errorf("a name twice: %v", err)
	}
	mine := ticker(t, "ticker")
	mine.Owner, mine.Labels = "me", map[string]string{"whose": "mine"}
	info, err := m.CreateTemplate(t.Context(), mine)
	if err != nil {
		t.Fatal(err)
	}
	s := m.create(t, lifecycle.CreateOptions{Owner: "me"})
	if got, err := s.Info(); err != nil || got.Template != info.ID {
		t.Errorf("made of %s, not of one's own %s: %v", got.Template, info.ID, err)
	}
	for _, name := range []string{"", "a b", "a\n", "\xff", string(make([]byte, 1000)), info.ID} {
		if _, err := m.CreateTemplate(t.Context(), ticker(t, name)); !errors.Is(err, lifecycle.ErrInvalid) && !errors.Is(err, lifecycle.ErrExists) {
			t.Errorf("a template %q: %v", name, err)
		}
	}
	broken := errors.New("broken")
	bad := ticker(t, "bad")
	bad.Ready = func(_ context.Context, _ *lifecycle.Machine) error { return broken }
	if _, err := m.CreateTemplate(t.Context(), bad); !errors.Is(err, broken) {
		t.Errorf("a template that is never ready: %v", err)
	}
	if err := m.DeleteTemplate(t.Context(), info.ID); err != nil {
		t.Fatal(err)
	}
	m.alive(t, s)
	if err := s.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	if left := m.stored(t); len(left) != empty {
		t.Errorf("left: %v", left)
	}
}

// TestManyTemplates has more templates in use than stay open: all of them go on working, and no files are left open for those that were closed.
func TestManyTemplates(t *testing.T) {
	m := newManager(t, lifecycle.ManagerOptions{ImageLimit: 4 << 20})
	s := m.create(t, lifecycle.CreateOptions{})
	var ids []string
	for i := range 20 {
		m.mark(t, s, uint64(100+i))
		info, err := s.Checkpoint(t.Context(), "")
		if err != nil {
			t.Fatal(err)
		}
		ids = append(ids, info.ID)
	}
	for range 2 {
		for i, id := range ids {
			clone := m.create(t, lifecycle.CreateOptions{Template: id})
			m.wantMark(t, clone, uint64(100+i))
			if err := clone.Kill(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
	}
	if open := lifecycle.OpenTemplates(m.Manager); open > 17 {
		t.Errorf("%d templates are open", open)
	}
}
