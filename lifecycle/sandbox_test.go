//go:build linux && amd64

package lifecycle_test

import (
	"bytes"
	"context"
	"database/sql"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cryovisor/cryovisor/internal/testvm"
	"github.com/cryovisor/cryovisor/lifecycle"
	"github.com/cryovisor/cryovisor/vmm"
)

// TestTakeBack connects to a sandbox that is being paused because of its timeout: it runs on, and the pause leaves nothing.
func TestTakeBack(t *testing.T) {
	m := newManager(t, lifecycle.ManagerOptions{PrepareAhead: -1})
	s := m.create(t, lifecycle.CreateOptions{Timeout: time.Minute, OnTimeout: lifecycle.ActionPause})
	before := len(m.stored(t))
	events, cancel := m.Subscribe()
	defer cancel()
	m.mark(t, s, 5)
	taken := 0
	for i := 0; taken == 0; i++ {
		if i == 2000 {
			t.Fatal("in 2000 attempts, no Connect met a pause")
		}
		m.clock.advance(time.Minute)
		eventually(t, "the pause begins", func() bool { info, err := s.Info(); return err != nil || info.State != lifecycle.StateRunning })
		_, resumed, err := s.Connect(t.Context(), lifecycle.ConnectOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if !resumed {
			taken++
		}
		m.wantMark(t, s, 5)
		m.alive(t, s)
	}
	e := waitEvent(t, events, func(e lifecycle.Event) bool { return e.Error != "" })
	if e.Sandbox.State != lifecycle.StateRunning || e.Reason != lifecycle.ReasonTimeout {
		t.Errorf("event %+v", e)
	}
	if got := m.Metrics().TakenBack; got != 1 {
		t.Errorf("%d pauses were taken back", got)
	}
	if info, err := s.Info(); err != nil || info.LastError != "" {
		t.Errorf("%+v, %v", info, err)
	}
	if left := m.stored(t); len(left) > before+3 { // a manifest and two packs of an earlier pause that was through
		t.Errorf("left: %v", left)
	}
}

// TestSandboxPauseFails makes a pause impossible: the sandbox runs on, and a later pause stores what it did meanwhile.
func TestSandboxPauseFails(t *testing.T) {
	m := newManager(t, lifecycle.ManagerOptions{PrepareAhead: -1})
	events, cancel := m.Subscribe()
	defer cancel()
	s := m.create(t, lifecycle.CreateOptions{Timeout: time.Minute, OnTimeout: lifecycle.ActionPause})
	manifests := filepath.Join(m.dir, "store", "snapshots")
	hide(t, manifests)
	if _, err := s.Pause(t.Context()); err == nil {
		t.Fatal("a pause without a directory for manifests succeeded")
	}
	m.alive(t, s)
	m.mark(t, s, 1)
	m.clock.advance(time.Minute)
	if e := waitEvent(t, events, func(e lifecycle.Event) bool { return e.Reason == lifecycle.ReasonTimeout }); e.Error == "" {
		t.Errorf("event %+v", e)
	}
	m.alive(t, s)
	show(t, manifests)
	eventually(t, "it tries again, a while after it has noted the failure", func() bool {
		m.clock.advance(time.Second)
		info, err := s.Info()
		return err != nil || info.State == lifecycle.StatePaused
	})
	if info := connect(t, s); info.LastError != "" {
		t.Errorf("%+v", info)
	}
	m.wantMark(t, s, 1)
}

// hide puts a file in a directory's place, which stops root too, and show undoes that.
func hide(t *testing.T, dir string) {
	t.Helper()
	if err := errors.Join(os.Rename(dir, dir+".hidden"), os.WriteFile(dir, nil, 0o600)); err != nil {
		t.Fatal(err)
	}
}

func show(t *testing.T, dir string) {
	t.Helper()
	if err := errors.Join(os.Remove(dir), os.Rename(dir+".hidden", dir)); err != nil {
		t.Fatal(err)
	}
}

// TestSandboxResumeFails makes a resume impossible: the sandbox stays paused, and can be resumed later.
func TestSandboxResumeFails(t *testing.T) {
	fail := false
	broken := errors.New("broken")
	m := newManager(t, lifecycle.ManagerOptions{Connect: func(context.Context, lifecycle.Start) (lifecycle.Connection, error) {
		if fail {
			return lifecycle.Connection{}, broken
		}
		return lifecycle.Connection{}, nil
	}})
	s := m.create(t, lifecycle.CreateOptions{})
	m.mark(t, s, 1)
	pause(t, s)
	fail = true
	if _, _, err := s.Connect(t.Context(), lifecycle.ConnectOptions{}); !errors.Is(err, broken) {
		t.Fatal(err)
	}
	if _, err := m.Create(t.Context(), lifecycle.CreateOptions{Template: "ticker"}); !errors.Is(err, broken) {
		t.Fatal(err)
	}
	wantState(t, s, lifecycle.StatePaused)
	fail = false
	hidden := filepath.Join(m.dir, "store", "snapshots")
	hide(t, hidden)
	if _, _, err := s.Connect(t.Context(), lifecycle.ConnectOptions{}); err == nil {
		t.Error("resumed without a manifest")
	}
	wantState(t, s, lifecycle.StatePaused)
	show(t, hidden)
	connect(t, s)
	m.wantMark(t, s, 1)
}

// TestHandover connects to a sandbox right after its pause, again and again: its next machine gets what the last one had, when that has given it back.
func TestHandover(t *testing.T) {
	checkLeaks(t)
	path := filepath.Join(t.TempDir(), "vsock")
	var users atomic.Int64
	m := openManager(t, t.TempDir(), newFakeClock(), lifecycle.ManagerOptions{Connect: func(context.Context, lifecycle.Start) (lifecycle.Connection, error) {
		if n := users.Add(1); n != 1 {
			t.Errorf("%d machines have the socket", n)
		}
		closing := func() error {
			if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("the machine has its socket when it has ended: %v", err)
			}
			users.Add(-1)
			return nil
		}
		return lifecycle.Connection{Hardware: vmm.Hardware{Vsock: &vmm.Vsock{CID: 3, Path: path}}, Close: closing}, nil
	}})
	cfg := ticker(t, "ticker")
	cfg.VM.Vsock = &vmm.Vsock{CID: 3, Path: path}
	if _, err := m.CreateTemplate(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	s := m.create(t, lifecycle.CreateOptions{})
	for i := range uint64(20) {
		m.mark(t, s, i)
		pause(t, s)
		connect(t, s)
		m.wantMark(t, s, i)
	}
	pause(t, s)
	if err := s.Kill(t.Context()); err != nil { // which waits for the rest of the machine
		t.Fatal(err)
	}
	if n := users.Load(); n != 0 {
		t.Errorf("after a kill, %d machines have the socket", n)
	}
	if n := openVMs(t); n != 0 {
		t.Errorf("after a kill, %d VMs are left", n)
	}
}

// newWorkers is a Manager with a template "worker", whose guests switch themselves off when their device says so. device is the last one's; before it
// is made anew for a guest that begins anew, it is to be forgotten.
func newWorkers(t *testing.T) (m *managed, device **testvm.Device) {
	t.Helper()
	w, err := testvm.NewWorker(testvm.WorkerConfig{Memory: tickerMemory, Every: 64, Seed: seed, PowerOff: testvm.PortWrite{Port: 0x64, Width: 1, Value: 0xfe}})
	if err != nil {
		t.Fatal(err)
	}
	device = new(*testvm.Device)
	hardware := func() vmm.Hardware {
		var saved []testvm.VCPUState
		if *device != nil {
			saved = (*device).State()
		}
		*device = testvm.NewDevice(w, saved, testvm.NoLimit, nil)
		return vmm.Hardware{Ports: []vmm.Ports{(*device).Ports()}}
	}
	m = openManager(t, t.TempDir(), newFakeClock(), lifecycle.ManagerOptions{
		Connect: func(context.Context, lifecycle.Start) (lifecycle.Connection, error) {
			return lifecycle.Connection{Hardware: hardware()}, nil
		},
	})
	cfg := lifecycle.TemplateConfig{Name: "worker", VM: vmm.Config{MemoryBytes: tickerMemory, Boot: w.Image().Program(), Hardware: hardware()}}
	if _, err := m.CreateTemplate(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	return m, device
}

// TestGuestEnds has guests end by themselves: one that was paused before goes back to that, another is gone.
func TestGuestEnds(t *testing.T) {
	m, device := newWorkers(t)
	events, cancel := m.Subscribe()
	defer cancel()
	s := m.create(t, lifecycle.CreateOptions{Template: "worker"})
	pause(t, s)
	connect(t, s)
	(*device).PowerOff()
	e := waitEvent(t, events, func(e lifecycle.Event) bool { return e.Reason == lifecycle.ReasonEnded })
	if e.Sandbox.State != lifecycle.StatePaused || e.Sandbox.LastError == "" || !e.Disconnected {
		t.Errorf("event %+v", e)
	}
	wantState(t, s, lifecycle.StatePaused)
	*device = nil // its guest has begun anew as well
	fresh := m.create(t, lifecycle.CreateOptions{Template: "worker"})
	(*device).PowerOff()
	e = waitEvent(t, events, func(e lifecycle.Event) bool { return e.Reason == lifecycle.ReasonEnded })
	if e.Sandbox.State != lifecycle.StateKilled || e.Sandbox.ID != fresh.ID() {
		t.Errorf("event %+v", e)
	}
	wantGone(t, fresh)
}

// TestGuestEndsUnnoted: that a guest has ended is recorded as soon as that can be.
func TestGuestEndsUnnoted(t *testing.T) {
	m, device := newWorkers(t)
	events, cancel := m.Subscribe()
	defer cancel()
	*device = nil
	s := m.create(t, lifecycle.CreateOptions{Template: "worker", Timeout: time.Hour})
	pause(t, s)
	connect(t, s)
	mend := m.failCatalog(t)
	(*device).PowerOff()
	eventually(t, "it is tried", func() bool { return lifecycle.Failures(m.Manager, s.ID()) == 1 })
	mend()
	m.clock.advance(2 * time.Second)
	e := waitEvent(t, events, func(e lifecycle.Event) bool { return e.Reason == lifecycle.ReasonEnded })
	if e.Sandbox.State != lifecycle.StatePaused || e.Sandbox.LastError == "" {
		t.Errorf("event %+v", e)
	}
	connect(t, s)
}

// TestLogs follows what a guest writes to its console through a pause.
func TestLogs(t *testing.T) {
	m := newManager(t, lifecycle.ManagerOptions{})
	s := m.create(t, lifecycle.CreateOptions{})
	want := func(offset int64, text string) {
		t.Helper()
		got, b, err := m.Logs(t.Context(), s.ID())
		if err != nil || got != offset || string(b) != text {
			t.Errorf("%q from %d on, %v; want %q from %d on", b, got, err, text, offset)
		}
	}
	want(0, "")
	lifecycle.Console(m.Manager, s.ID()).Write([]byte("hello\n"))
	want(0, "hello\n")
	pause(t, s)
	want(0, "hello\n")
	connect(t, s)
	lifecycle.Console(m.Manager, s.ID()).Write([]byte("again\n"))
	want(0, "hello\nagain\n")
	long := bytes.Repeat([]byte("x"), 64<<10)
	lifecycle.Console(m.Manager, s.ID()).Write(long)
	want(12, string(long))
	m.reopen(t)
	want(12, string(long))
}

// TestRotateKeys changes the master key while sandboxes are paused and run.
func TestRotateKeys(t *testing.T) {
	m := newManager(t, lifecycle.ManagerOptions{})
	a, b := m.create(t, lifecycle.CreateOptions{}), m.create(t, lifecycle.CreateOptions{})
	m.mark(t, a, 1)
	m.mark(t, b, 2)
	pause(t, a)
	files := m.stored(t)
	path := filepath.Join(m.dir, "keys", "master.txt")
	old, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := m.RotateKeys(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := m.stored(t); len(got) != len(files) {
		t.Errorf("%v, before %v", got, files)
	}
	if now, err := os.ReadFile(path); err != nil || bytes.Count(now, []byte("AGE-SECRET-KEY")) != 1 || bytes.Equal(now, old) {
		t.Errorf("the file has %d keys, %v", bytes.Count(now, []byte("AGE-SECRET-KEY")), err)
	}
	m.reopen(t)
	connect(t, mustSandbox(t, m, a.ID()))
	connect(t, mustSandbox(t, m, b.ID()))
	m.wantMark(t, mustSandbox(t, m, a.ID()), 1)
	m.wantMark(t, mustSandbox(t, m, b.ID()), 2)
	m.create(t, lifecycle.CreateOptions{})
	// A directory whose keys are another's.
	if err := m.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, old, 0o600); err != nil {
		t.Fatal(err)
	}
	m.Manager = openManager(t, m.dir, m.clock, lifecycle.ManagerOptions{}).Manager
	if _, _, err := m.Connect(t.Context(), a.ID(), lifecycle.ConnectOptions{}); !errors.Is(err, lifecycle.ErrKey) {
		t.Errorf("with a key that was retired: %v", err)
	}
	wantState(t, mustSandbox(t, m, a.ID()), lifecycle.StatePaused)
}

// failCatalog takes the catalog's table of sandboxes away, until mend is called.
func (m *managed) failCatalog(t *testing.T) (mend func()) {
	t.Helper()
	db, err := sql.Open("sqlite", filepath.Join(m.dir, "catalog.db"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	rename := func(from, to string) {
		t.Helper()
		if _, err := db.Exec("ALTER TABLE " + from + " RENAME TO " + to); err != nil {
			t.Fatal(err)
		}
	}
	rename("sandboxes", "away")
	return func() {
		t.Helper()
		rename("away", "sandboxes")
	}
}

// TestCatalogFails takes the catalog's table away: what can't be recorded does not happen, and what runs runs on.
func TestCatalogFails(t *testing.T) {
	m := newManager(t, lifecycle.ManagerOptions{})
	s, paused := m.create(t, lifecycle.CreateOptions{}), m.create(t, lifecycle.CreateOptions{})
	pause(t, s)
	connect(t, s)
	m.mark(t, s, 1)
	m.mark(t, paused, 2)
	pause(t, paused)
	files := m.stored(t)
	mend := m.failCatalog(t)
	for what, do := range map[string]func() error{
		"create":  func() error { _, err := m.Create(t.Context(), lifecycle.CreateOptions{Template: "ticker"}); return err },
		"pause":   func() error { _, err := s.Pause(t.Context()); return err },
		"connect": func() error { _, _, err := paused.Connect(t.Context(), lifecycle.ConnectOptions{}); return err },
		"kill":    func() error { return s.Kill(t.Context()) },
	} {
		if err := do(); err == nil {
			t.Errorf("%s succeeded", what)
		}
	}
	m.alive(t, s)
	wantState(t, paused, lifecycle.StatePaused)
	mend()
	// The snapshot of the pause that failed is left if it was not certain that the record does not name it; the next opening collects it.
	if left := m.stored(t); len(left) < len(files) {
		t.Errorf("there is less than before: %v, before %v", left, files)
	}
	pause(t, s)
	m.reopen(t)
	if left := m.stored(t); len(left) > len(files)+1 {
		t.Errorf("left: %v, before: %v", left, files)
	}
	for id, want := range map[string]uint64{s.ID(): 1, paused.ID(): 2} {
		connect(t, mustSandbox(t, m, id))
		m.wantMark(t, mustSandbox(t, m, id), want)
	}
	if n := len(first(m.List(lifecycle.ListOptions{})).Sandboxes); n != 2 {
		t.Errorf("%d sandboxes", n)
	}
}
