//go:build linux && amd64

package lifecycle_test

import (
	"errors"
	"fmt"
	"runtime"
	"testing"
	"time"

	"github.com/cryovisor/cryovisor/internal/testvm"
	"github.com/cryovisor/cryovisor/lifecycle"
	"github.com/cryovisor/cryovisor/vmm"
)

// TestTimeoutKills lets a sandbox's time run out.
func TestTimeoutKills(t *testing.T) {
	m := newManager(t, lifecycle.ManagerOptions{})
	events, cancel := m.Subscribe()
	defer cancel()
	s := m.create(t, lifecycle.CreateOptions{Timeout: time.Minute})
	m.clock.advance(59 * time.Second)
	wantState(t, s, lifecycle.StateRunning)
	m.clock.advance(time.Second)
	e := waitEvent(t, events, stateIs(lifecycle.StateKilled))
	if e.Sandbox.ID != s.ID() || e.Reason != lifecycle.ReasonTimeout || e.From != lifecycle.StateRunning || !e.Disconnected {
		t.Errorf("event %+v", e)
	}
	wantGone(t, s)
}

// TestAutoPause lets the time of sandboxes run out that are to be paused then: prepared, not prepared, and again after a resume, as the
// option outlives pauses.
func TestAutoPause(t *testing.T) {
	checkLeaks(t)
	for name, ahead := range map[string]time.Duration{"prepared": 10 * time.Second, "at once": -1} {
		t.Run(name, func(t *testing.T) {
			m := newManager(t, lifecycle.ManagerOptions{PrepareAhead: ahead})
			events, cancel := m.Subscribe()
			defer cancel()
			s := m.create(t, lifecycle.CreateOptions{Timeout: time.Minute, OnTimeout: lifecycle.ActionPause})
			for i := range uint64(3) {
				m.mark(t, s, i+100)
				m.clock.advance(55 * time.Second) // the preparation may begin
				m.alive(t, s)
				m.mark(t, s, i+1)
				m.clock.advance(5 * time.Second)
				e := waitEvent(t, events, stateIs(lifecycle.StatePaused))
				if e.Reason != lifecycle.ReasonTimeout || !e.Disconnected || e.Sandbox.OnTimeout != lifecycle.ActionPause {
					t.Errorf("event %+v", e)
				}
				m.clock.advance(time.Hour) // paused time does not count
				if info := connect(t, s); !info.End.Equal(m.clock.Now().Add(time.Minute)) {
					t.Errorf("it runs until %v, now it is %v", info.End, m.clock.Now())
				}
				m.wantMark(t, s, i+1)
				m.alive(t, s)
			}
			if got := m.Metrics().AutoPauses; got != 3 {
				t.Errorf("%d pauses by timeout were counted, want 3", got)
			}
		})
	}
}

// TestPreparationGivenUp prepares the pause of a sandbox, and has activity return: the preparation leaves nothing, and the pause that comes
// later is right.
func TestPreparationGivenUp(t *testing.T) {
	m := newManager(t, lifecycle.ManagerOptions{PrepareAhead: 10 * time.Second})
	events, cancel := m.Subscribe()
	defer cancel()
	s := m.create(t, lifecycle.CreateOptions{Timeout: time.Minute, OnTimeout: lifecycle.ActionPause})
	until := func(prepared bool) {
		t.Helper()
		eventually(t, fmt.Sprintf("prepared: %v", prepared), func() bool { return lifecycle.Prepared(m.Manager, s.ID()) == prepared })
	}
	for what, extend := range map[string]func() error{
		"connect": func() error { _, _, err := s.Connect(t.Context(), lifecycle.ConnectOptions{}); return err },
		"timeout": func() error { return s.SetTimeout(time.Minute) },
	} {
		m.clock.advance(51 * time.Second)
		until(true)
		if err := extend(); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		until(false)
		wantState(t, s, lifecycle.StateRunning)
	}
	m.mark(t, s, 1)
	m.clock.advance(51 * time.Second)
	until(true)
	m.mark(t, s, 2)
	m.clock.advance(9 * time.Second)
	waitEvent(t, events, stateIs(lifecycle.StatePaused))
	connect(t, s)
	m.wantMark(t, s, 2)
	m.clock.advance(51 * time.Second)
	until(true)
	if err := s.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	if left := m.stored(t); len(left) > 3 {
		t.Errorf("left: %v", left)
	}
}

// TestConnectOrTimeout connects to sandboxes at the moment at which their time is up: one of the two is first, and if it is the connection, nothing
// happens to the sandbox.
func TestConnectOrTimeout(t *testing.T) {
	for _, action := range []lifecycle.Action{lifecycle.ActionKill, lifecycle.ActionPause} {
		m := newManager(t, lifecycle.ManagerOptions{PrepareAhead: -1})
		for i := range 100 {
			s := m.create(t, lifecycle.CreateOptions{Timeout: time.Minute, OnTimeout: action})
			m.clock.advance(time.Minute)
			for range i { // another moment each time
				runtime.Gosched()
			}
			info, _, err := s.Connect(t.Context(), lifecycle.ConnectOptions{Timeout: time.Hour})
			if action == lifecycle.ActionKill && errors.Is(err, lifecycle.ErrNotFound) {
				continue
			}
			if err != nil {
				t.Fatal(err)
			}
			if _, err := s.Pause(t.Context()); err != nil {
				t.Fatalf("it was to run until %v, and at %v: %v", info.End, m.clock.Now(), err)
			}
			if err := s.Kill(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// TestConnectExtends tells the ways in which a timeout changes while a sandbox runs.
func TestConnectExtends(t *testing.T) {
	m := newManager(t, lifecycle.ManagerOptions{})
	s := m.create(t, lifecycle.CreateOptions{Timeout: time.Hour, IdleTimeout: 10 * time.Minute})
	start := m.clock.Now()
	wantEnd := func(what string, want time.Duration) {
		t.Helper()
		if info, err := s.Info(); err != nil || info.End.Sub(start) != want {
			t.Errorf("%s: it ends after %v, %v; want %v", what, info.End.Sub(start), err, want)
		}
	}
	wantEnd("new", 10*time.Minute)
	m.clock.advance(5 * time.Minute)
	if err := s.Touch(); err != nil {
		t.Fatal(err)
	}
	wantEnd("touched", 15*time.Minute)
	for _, c := range []struct {
		what    string
		do      func() error
		deadine time.Duration
	}{
		{"connected with a shorter timeout", func() error {
			_, resumed, err := s.Connect(t.Context(), lifecycle.ConnectOptions{Timeout: time.Minute})
			if resumed {
				t.Error("it was running")
			}
			return err
		}, 15 * time.Minute},
		{"set to less", func() error { return s.SetTimeout(7 * time.Minute) }, 12 * time.Minute},
		{"connected with more", func() error {
			_, _, err := s.Connect(t.Context(), lifecycle.ConnectOptions{Timeout: 8 * time.Minute})
			return err
		}, 13 * time.Minute},
	} {
		if err := c.do(); err != nil {
			t.Fatalf("%s: %v", c.what, err)
		}
		wantEnd(c.what, c.deadine)
	}
	pause(t, s)
	if err := s.SetTimeout(time.Hour); !isState(err, lifecycle.StatePaused) {
		t.Errorf("the timeout of a paused sandbox: %v", err)
	}
	if err := s.Touch(); err != nil {
		t.Errorf("touch a paused sandbox: %v", err)
	}
	if err := s.SetTimeout(-1); !errors.Is(err, lifecycle.ErrInvalid) {
		t.Errorf("a negative timeout: %v", err)
	}
}

// TestIdle pauses a sandbox that nobody touches, and one whose guest does nothing much.
func TestIdle(t *testing.T) {
	for name, watch := range map[string]bool{"by touch": false, "by the guest": true} {
		t.Run(name, func(t *testing.T) {
			m := newManager(t, lifecycle.ManagerOptions{WatchGuest: watch})
			events, cancel := m.Subscribe()
			defer cancel()
			s := m.create(t, lifecycle.CreateOptions{Timeout: time.Hour, IdleTimeout: time.Minute, OnTimeout: lifecycle.ActionPause})
			m.clock.advance(40 * time.Second)
			if err := s.Touch(); err != nil {
				t.Fatal(err)
			}
			m.clock.advance(40 * time.Second)
			wantState(t, s, lifecycle.StateRunning)
			m.clock.advance(20 * time.Second)
			if e := waitEvent(t, events, stateIs(lifecycle.StatePaused)); e.Reason != lifecycle.ReasonIdle {
				t.Errorf("event %+v", e)
			}
		})
	}
}

// TestWatchGuest keeps a sandbox running, whose guest works, for longer than it may be idle.
func TestWatchGuest(t *testing.T) {
	m := openManager(t, t.TempDir(), newFakeClock(), lifecycle.ManagerOptions{WatchGuest: true, PrepareAhead: -1})
	im, err := testvm.Timer(testvm.TimerConfig{Memory: tickerMemory, Every: 1 << 40, Busy: true})
	if err != nil {
		t.Fatal(err)
	}
	cfg := lifecycle.TemplateConfig{Name: "busy", VM: vmm.Config{MemoryBytes: tickerMemory, Boot: im.Program()}}
	if _, err := m.CreateTemplate(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	s := m.create(t, lifecycle.CreateOptions{Template: "busy", Timeout: time.Hour, IdleTimeout: time.Second})
	const step = 100 * time.Millisecond
	for range 12 {
		before := m.machine(t, s).VM.Activity().VCPU
		eventually(t, "the guest works", func() bool { return m.machine(t, s).VM.Activity().VCPU >= before+step/20 })
		looked := lifecycle.Watched(m.Manager, s.ID())
		m.clock.advance(step)
		eventually(t, "somebody looks", func() bool { return !lifecycle.Watched(m.Manager, s.ID()).Equal(looked) })
	}
	wantState(t, s, lifecycle.StateRunning)
}

// TestRetentionFails: what has expired and can't be deleted is tried again later, and not at once, over and over.
func TestRetentionFails(t *testing.T) {
	m := newManager(t, lifecycle.ManagerOptions{})
	events, cancel := m.Subscribe()
	defer cancel()
	s := m.create(t, lifecycle.CreateOptions{})
	pause(t, s)
	mend := m.failCatalog(t)
	m.clock.advance(lifecycle.DefaultRetention)
	for tries := 1; tries < 4; tries++ {
		eventually(t, "it is tried", func() bool { return lifecycle.Failures(m.Manager, s.ID()) == tries })
		for range 10_000 {
			runtime.Gosched()
		}
		if n := lifecycle.Failures(m.Manager, s.ID()); n != tries {
			t.Fatalf("tried %d times, of which %d were due", n, tries)
		}
		m.clock.advance(time.Second << tries) // 2 s after the first time, 4 s after the second
	}
	mend()
	m.clock.advance(time.Minute)
	if e := waitEvent(t, events, stateIs(lifecycle.StateKilled)); e.Reason != lifecycle.ReasonExpired || e.Sandbox.ID != s.ID() {
		t.Errorf("event %+v", e)
	}
}

// TestRetention lets the retention of a paused sandbox end: every call says that there is none, and nothing is left.
func TestRetention(t *testing.T) {
	m := newManager(t, lifecycle.ManagerOptions{})
	empty := len(m.stored(t))
	events, cancel := m.Subscribe()
	defer cancel()
	s, other := m.create(t, lifecycle.CreateOptions{}), m.create(t, lifecycle.CreateOptions{})
	pause(t, s)
	m.clock.advance(time.Second)
	pause(t, other)
	m.clock.advance(lifecycle.DefaultRetention - 2*time.Second)
	wantState(t, s, lifecycle.StatePaused)
	m.clock.advance(time.Second)
	wantGone(t, s) // whether the sweeper has come or not
	e := waitEvent(t, events, stateIs(lifecycle.StateKilled))
	if e.Reason != lifecycle.ReasonExpired || e.Sandbox.ID != s.ID() {
		t.Errorf("event %+v", e)
	}
	for what, do := range map[string]func() error{
		"pause":       func() error { _, err := s.Pause(t.Context()); return err },
		"connect":     func() error { _, _, err := s.Connect(t.Context(), lifecycle.ConnectOptions{}); return err },
		"resume":      func() error { _, err := m.Resume(t.Context(), s.ID(), lifecycle.ConnectOptions{}); return err },
		"kill":        func() error { return s.Kill(t.Context()) },
		"set timeout": func() error { return s.SetTimeout(time.Hour) },
		"touch":       s.Touch,
		"fork":        func() error { _, err := s.Fork(t.Context(), 1, lifecycle.ConnectOptions{}); return err },
		"checkpoint":  func() error { _, err := s.Checkpoint(t.Context(), ""); return err },
		"logs":        func() error { _, _, err := m.Logs(t.Context(), s.ID()); return err },
		"handle":      func() error { _, err := m.Sandbox(s.ID()); return err },
		"machine":     func() error { _, err := m.Machine(s.ID()); return err },
	} {
		if err := do(); !errors.Is(err, lifecycle.ErrNotFound) {
			t.Errorf("%s: %v", what, err)
		}
	}
	wantState(t, other, lifecycle.StatePaused)
	connect(t, other)
	if err := other.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	if left := m.stored(t); len(left) != empty {
		t.Errorf("left: %v", left)
	}
}
