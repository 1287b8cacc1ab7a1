//go:build linux && amd64

package lifecycle_test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cryovisor/cryovisor/internal/testvm"
	"github.com/cryovisor/cryovisor/lifecycle"
	"github.com/cryovisor/cryovisor/vmm"
)

// fakeClock is a Clock that a test sets.
type fakeClock struct {
	mu     sync.Mutex
	now    time.Time
	timers map[chan time.Time]time.Time
}

func newFakeClock() *fakeClock {
	return &fakeClock{now: time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC), timers: make(map[chan time.Time]time.Time)}
}

func (c *fakeClock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *fakeClock) NewTimer(t time.Time) (<-chan time.Time, func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	rings := make(chan time.Time, 1)
	if t.After(c.now) {
		c.timers[rings] = t
	} else {
		rings <- c.now
	}
	return rings, func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		delete(c.timers, rings)
	}
}

func (c *fakeClock) advance(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
	for rings, t := range c.timers {
		if !t.After(c.now) {
			rings <- c.now
			delete(c.timers, rings)
		}
	}
}

// tickerMemory is the RAM of the guests of these tests, which count the ticks of a timer and do nothing else.
const (
	tickerMemory = 4 << 20
	// markAt is a page that they do not touch: what a test writes there is to be found again after a resume.
	markAt  = 2 << 20
	ticksAt = 0x20200
)

// ticker is a template of such a guest.
func ticker(t testing.TB, name string) lifecycle.TemplateConfig {
	t.Helper()
	im, err := testvm.Timer(testvm.TimerConfig{Memory: tickerMemory, Period: 20e6, Every: 1 << 40})
	if err != nil {
		t.Fatal(err)
	}
	return lifecycle.TemplateConfig{
		Name: name,
		VM:   vmm.Config{MemoryBytes: tickerMemory, Boot: im.Program()},
		Ready: func(ctx context.Context, m *lifecycle.Machine) error {
			for ctx.Err() == nil {
				if ticks(t, m) > 0 {
					return nil
				}
			}
			return ctx.Err()
		},
	}
}

func ticks(t testing.TB, m *lifecycle.Machine) uint64 {
	t.Helper()
	var b [8]byte
	if _, err := m.VM.Memory().ReadAt(b[:], ticksAt); err != nil {
		t.Fatal(err)
	}
	return binary.LittleEndian.Uint64(b[:])
}

// managed is a Manager with a template, and its directory.
type managed struct {
	*lifecycle.Manager
	dir   string
	clock *fakeClock
}

func needKVM(t testing.TB) {
	t.Helper()
	if _, err := vmm.Probe(); errors.Is(err, vmm.ErrNoKVM) || errors.Is(err, vmm.ErrPermission) {
		t.Skip(err)
	}
}

// openManager opens a directory with a fake clock, and closes it when the test is over.
func openManager(t testing.TB, dir string, clock *fakeClock, opts lifecycle.ManagerOptions) *managed {
	t.Helper()
	needKVM(t)
	opts.Clock = clock
	m, err := lifecycle.OpenManager(t.Context(), dir, opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeManager(t, m) })
	return &managed{m, dir, clock}
}

func closeManager(t testing.TB, m *lifecycle.Manager) {
	t.Helper()
	if err := m.Close(context.Background()); err != nil {
		t.Error(err)
	}
}

// newManager is one with a template "ticker".
func newManager(t testing.TB, opts lifecycle.ManagerOptions) *managed {
	t.Helper()
	m := openManager(t, t.TempDir(), newFakeClock(), opts)
	if _, err := m.CreateTemplate(t.Context(), ticker(t, "ticker")); err != nil {
		t.Fatal(err)
	}
	return m
}

func (m *managed) create(t testing.TB, opts lifecycle.CreateOptions) *lifecycle.Sandbox {
	t.Helper()
	if opts.Template == "" {
		opts.Template = "ticker"
	}
	s, err := m.Create(t.Context(), opts)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func (m *managed) machine(t testing.TB, s *lifecycle.Sandbox) *lifecycle.Machine {
	t.Helper()
	machine, err := m.Machine(s.ID())
	if err != nil {
		t.Fatal(err)
	}
	return machine
}

// mark writes a number into the guest's memory.
func (m *managed) mark(t testing.TB, s *lifecycle.Sandbox, n uint64) {
	t.Helper()
	if _, err := m.machine(t, s).VM.Memory().WriteAt(binary.LittleEndian.AppendUint64(nil, n), markAt); err != nil {
		t.Fatal(err)
	}
}

func (m *managed) readMark(t testing.TB, s *lifecycle.Sandbox) uint64 {
	t.Helper()
	var b [8]byte
	if _, err := m.machine(t, s).VM.Memory().ReadAt(b[:], markAt); err != nil {
		t.Fatal(err)
	}
	return binary.LittleEndian.Uint64(b[:])
}

func (m *managed) wantMark(t testing.TB, s *lifecycle.Sandbox, want uint64) {
	t.Helper()
	if got := m.readMark(t, s); got != want {
		t.Errorf("sandbox %s has the mark %d, want %d", s.ID(), got, want)
	}
}

// alive waits until the guest has counted another tick.
func (m *managed) alive(t testing.TB, s *lifecycle.Sandbox) {
	t.Helper()
	machine := m.machine(t, s)
	for before := ticks(t, machine); ticks(t, machine) == before; {
		if t.Context().Err() != nil {
			t.Fatal("the guest stands still")
		}
	}
}

func pause(t testing.TB, s *lifecycle.Sandbox) lifecycle.SandboxInfo {
	t.Helper()
	info, err := s.Pause(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return info
}

func connect(t testing.TB, s *lifecycle.Sandbox) lifecycle.SandboxInfo {
	t.Helper()
	info, _, err := s.Connect(t.Context(), lifecycle.ConnectOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return info
}

func wantState(t testing.TB, s *lifecycle.Sandbox, want lifecycle.State) {
	t.Helper()
	if info, err := s.Info(); err != nil || info.State != want {
		t.Errorf("sandbox %s is %q, %v; want %s", s.ID(), info.State, err, want)
	}
}

func wantGone(t testing.TB, s *lifecycle.Sandbox) {
	t.Helper()
	if info, err := s.Info(); !errors.Is(err, lifecycle.ErrNotFound) {
		t.Errorf("sandbox %s is %q, %v; want it gone", s.ID(), info.State, err)
	}
}

// waitEvent reads events until one is chosen.
func waitEvent(t testing.TB, events <-chan lifecycle.Event, chosen func(lifecycle.Event) bool) lifecycle.Event {
	t.Helper()
	for {
		select {
		case e, ok := <-events:
			if !ok {
				t.Fatal("the events have ended")
			}
			if chosen(e) {
				return e
			}
		case <-t.Context().Done():
			t.Fatal("no such event in time")
		case <-time.After(time.Minute):
			t.Fatal("no such event in a minute")
		}
	}
}

func stateIs(s lifecycle.State) func(lifecycle.Event) bool {
	return func(e lifecycle.Event) bool { return e.Sandbox.State == s && e.Error == "" }
}

// stored are the files of snapshots and disks in a data directory.
func (m *managed) stored(t testing.TB) []string {
	t.Helper()
	var files []string
	for _, dir := range []string{"store/snapshots", "store/packs", "disks"} {
		err := filepath.WalkDir(filepath.Join(m.dir, dir), func(path string, d fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			if err == nil && !d.IsDir() {
				files = append(files, strings.TrimPrefix(path, m.dir+"/"))
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return files
}

// TestSandbox is the story of a sandbox: it is created, paused and connected to again and again, and killed, and is what it was each time.
func TestSandbox(t *testing.T) {
	checkLeaks(t)
	m := newManager(t, lifecycle.ManagerOptions{})
	empty := m.stored(t)
	s := m.create(t, lifecycle.CreateOptions{Metadata: map[string]string{"who": "me"}, Timeout: time.Hour, OnTimeout: lifecycle.ActionPause})
	wantState(t, s, lifecycle.StateRunning)
	for i := range uint64(4) {
		m.mark(t, s, i+1)
		m.alive(t, s)
		before := ticks(t, m.machine(t, s))
		m.clock.advance(time.Minute)
		info := pause(t, s)
		if info.State != lifecycle.StatePaused || info.Pauses != int(i+1) || info.StoredBytes == 0 || !info.End.Equal(m.clock.Now()) ||
			!info.Expires.Equal(m.clock.Now().Add(lifecycle.DefaultRetention)) || info.OnTimeout != lifecycle.ActionPause {
			t.Errorf("after pause %d: %+v", i+1, info)
		}
		if _, err := m.Machine(s.ID()); !isState(err, lifecycle.StatePaused) {
			t.Errorf("the machine of a paused sandbox: %v", err)
		}
		if _, err := s.Pause(t.Context()); !isState(err, lifecycle.StatePaused) {
			t.Errorf("another pause: %v", err)
		}
		m.clock.advance(24 * time.Hour)
		info, resumed, err := s.Connect(t.Context(), lifecycle.ConnectOptions{})
		if err != nil || !resumed || info.State != lifecycle.StateRunning || !info.End.Equal(m.clock.Now().Add(time.Hour)) || !info.Expires.IsZero() ||
			info.Metadata["who"] != "me" {
			t.Fatalf("connect %d: %+v, %v, %v", i+1, info, resumed, err)
		}
		m.wantMark(t, s, i+1)
		if now := ticks(t, m.machine(t, s)); now < before {
			t.Errorf("the guest has gone back from %d ticks to %d", before, now)
		}
		m.alive(t, s)
	}
	if err := s.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	wantGone(t, s)
	if err := s.Kill(t.Context()); !errors.Is(err, lifecycle.ErrNotFound) {
		t.Errorf("another kill: %v", err)
	}
	if left := m.stored(t); fmt.Sprint(left) != fmt.Sprint(empty) {
		t.Errorf("a killed sandbox leaves %v; there was %v", left, empty)
	}
}

func isState(err error, s lifecycle.State) bool {
	var e *lifecycle.StateError
	return errors.As(err, &e) && e.State == s
}
