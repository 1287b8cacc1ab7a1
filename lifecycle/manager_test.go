//go:build linux && amd64

package lifecycle_test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"runtime"
	"slices"
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
			eventually(t, "the guest counts", func() bool { return ticks(t, m) > 0 || ctx.Err() != nil })
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
	before := ticks(t, machine)
	eventually(t, "the guest counts", func() bool { return ticks(t, machine) != before })
}

// eventually waits until something is so.
func eventually(t testing.TB, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !is(); runtime.Gosched() {
		if time.Now().After(deadline) {
			t.Fatalf("not within a minute: %s", what)
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

// reopen closes the Manager and opens its directory again.
func (m *managed) reopen(t testing.TB, opts ...lifecycle.ManagerOptions) {
	t.Helper()
	if err := m.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	opts = append(opts, lifecycle.ManagerOptions{})
	m.Manager = openManager(t, m.dir, m.clock, opts[0]).Manager
}

// TestClose closes a Manager whose sandboxes run, and opens it again.
func TestClose(t *testing.T) {
	checkLeaks(t)
	m := newManager(t, lifecycle.ManagerOptions{})
	a, b := m.create(t, lifecycle.CreateOptions{Metadata: map[string]string{"n": "a"}}), m.create(t, lifecycle.CreateOptions{})
	m.mark(t, a, 1)
	m.mark(t, b, 2)
	pause(t, b)
	if _, err := lifecycle.OpenManager(t.Context(), m.dir, lifecycle.ManagerOptions{}); !errors.Is(err, lifecycle.ErrLocked) {
		t.Errorf("a second Manager: %v", err)
	}
	old := m.Manager
	m.reopen(t)
	if _, err := old.Get(a.ID()); !errors.Is(err, lifecycle.ErrManagerClosed) {
		t.Errorf("after Close: %v", err)
	}
	if err := old.Close(t.Context()); err != nil {
		t.Errorf("closed twice: %v", err)
	}
	for i, id := range []string{a.ID(), b.ID()} {
		s, err := m.Sandbox(id)
		if err != nil {
			t.Fatal(err)
		}
		wantState(t, s, lifecycle.StatePaused)
		connect(t, s)
		m.wantMark(t, s, uint64(i+1))
	}
	if info, err := m.Get(a.ID()); err != nil || info.Metadata["n"] != "a" {
		t.Errorf("%+v, %v", info, err)
	}
	m.reopen(t, lifecycle.ManagerOptions{OnClose: lifecycle.ActionKill})
	connect(t, mustSandbox(t, m, a.ID()))
	m.reopen(t)
	if _, err := m.Get(a.ID()); !errors.Is(err, lifecycle.ErrNotFound) {
		t.Errorf("killed by Close: %v", err)
	}
	wantState(t, mustSandbox(t, m, b.ID()), lifecycle.StatePaused)
}

// TestCloseDuringKill: Close waits for a Kill that is under way, though nobody knows of its sandbox any more, and what it has to
// delete it deletes.
func TestCloseDuringKill(t *testing.T) {
	killing, finish := make(chan struct{}), make(chan struct{})
	m := newManager(t, lifecycle.ManagerOptions{Connect: func(context.Context, lifecycle.Start) (lifecycle.Connection, error) {
		return lifecycle.Connection{Close: func() error {
			close(killing)
			<-finish
			return nil
		}}, nil
	}})
	s := m.create(t, lifecycle.CreateOptions{})
	events, cancel := m.Subscribe()
	defer cancel()
	killed, closed := make(chan error, 1), make(chan error, 1)
	go func() { killed <- s.Kill(t.Context()) }()
	<-killing
	go func() { closed <- m.Close(t.Context()) }()
	eventually(t, "it is being closed", func() bool {
		_, err := m.Get(s.ID())
		return errors.Is(err, lifecycle.ErrManagerClosed)
	})
	for range 100_000 {
		select {
		case err := <-closed:
			t.Fatalf("closed with a sandbox that was still being killed: %v", err)
		default:
			runtime.Gosched()
		}
	}
	close(finish)
	if err := errors.Join(<-killed, <-closed); err != nil {
		t.Error(err)
	}
	told := false
	for e := range events {
		told = told || e.Sandbox.State == lifecycle.StateKilled && e.Error == ""
	}
	if !told {
		t.Error("no event says that the sandbox is gone")
	}
}

func mustSandbox(t testing.TB, m *managed, id string) *lifecycle.Sandbox {
	t.Helper()
	s, err := m.Sandbox(id)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// TestLimits reaches each limit.
func TestLimits(t *testing.T) {
	m := newManager(t, lifecycle.ManagerOptions{Limits: lifecycle.Limits{Running: 2, Paused: 1}})
	wantLimit := func(what, want string, err error) {
		t.Helper()
		var e *lifecycle.LimitError
		if !errors.As(err, &e) || e.What != want {
			t.Errorf("%s: %v", what, err)
		}
	}
	a, b := m.create(t, lifecycle.CreateOptions{}), m.create(t, lifecycle.CreateOptions{Timeout: time.Minute, OnTimeout: lifecycle.ActionPause})
	_, err := m.Create(t.Context(), lifecycle.CreateOptions{Template: "ticker"})
	wantLimit("create", "running sandboxes", err)
	forks, err := a.Fork(t.Context(), 1, lifecycle.ConnectOptions{})
	if err != nil {
		t.Fatal(err)
	}
	wantLimit("fork", "running sandboxes", forks[0].Err)
	pause(t, a)
	_, err = b.Pause(t.Context())
	wantLimit("pause", "paused sandboxes", err)
	m.alive(t, b)
	c := m.create(t, lifecycle.CreateOptions{})
	_, _, err = a.Connect(t.Context(), lifecycle.ConnectOptions{})
	wantLimit("connect", "running sandboxes", err)
	wantState(t, a, lifecycle.StatePaused)
	events, cancel := m.Subscribe()
	defer cancel()
	m.clock.advance(time.Minute)
	waitEvent(t, events, stateIs(lifecycle.StatePaused)) // a timeout may pause beyond the limit
	if err := c.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	m.reopen(t, lifecycle.ManagerOptions{Limits: lifecycle.Limits{StoredBytes: 1}})
	connect(t, a2(t, m, a))
	_, err = m.Pause(t.Context(), a.ID())
	wantLimit("pause", "stored bytes", err)
	_, err = m.Checkpoint(t.Context(), a.ID(), "")
	wantLimit("checkpoint", "stored bytes", err)
}

func a2(t testing.TB, m *managed, s *lifecycle.Sandbox) *lifecycle.Sandbox {
	t.Helper()
	return mustSandbox(t, m, s.ID())
}

// TestOnce has many callers ask for the same at the same time: it happens once, and each is told what is true.
func TestOnce(t *testing.T) {
	m := newManager(t, lifecycle.ManagerOptions{})
	s := m.create(t, lifecycle.CreateOptions{})
	many := func(do func() error) (n int, others []error) {
		errs := make([]error, 8)
		var group sync.WaitGroup
		for i := range errs {
			group.Go(func() { errs[i] = do() })
		}
		group.Wait()
		for _, err := range errs {
			if err == nil {
				n++
			} else {
				others = append(others, err)
			}
		}
		return n, others
	}
	for range 3 {
		n, others := many(func() error { _, err := s.Pause(t.Context()); return err })
		for _, err := range others {
			if !isState(err, lifecycle.StatePaused) {
				t.Error(err)
			}
		}
		if n != 1 {
			t.Errorf("%d pauses succeeded", n)
		}
		if info, _ := s.Info(); info.State != lifecycle.StatePaused {
			t.Errorf("after pauses: %+v", info)
		}
		resumed := 0
		var mu sync.Mutex
		if _, others := many(func() error {
			_, did, err := s.Connect(t.Context(), lifecycle.ConnectOptions{})
			mu.Lock()
			defer mu.Unlock()
			if did {
				resumed++
			}
			return err
		}); len(others) > 0 || resumed != 1 {
			t.Errorf("%d connects resumed, %v", resumed, others)
		}
	}
	n, others := many(func() error { return s.Kill(t.Context()) })
	for _, err := range others {
		if !errors.Is(err, lifecycle.ErrNotFound) {
			t.Error(err)
		}
	}
	if n != 1 {
		t.Errorf("%d kills succeeded", n)
	}
	if got := m.Metrics(); got.Kills.Count-got.Kills.Failed != 1 || got.Pauses.Count != 3 || got.Resumes.Count != 3 {
		t.Errorf("metrics: %+v", got)
	}
}

// TestList pages through sandboxes of two owners.
func TestList(t *testing.T) {
	m := newManager(t, lifecycle.ManagerOptions{})
	var want []string // of "me", the newest first
	for i := range 7 {
		m.clock.advance(time.Duration(i%2) * time.Second) // some are as old as others
		s := m.create(t, lifecycle.CreateOptions{Owner: "me", Metadata: map[string]string{"odd": fmt.Sprint(i % 2), "n": fmt.Sprint(i)}})
		m.create(t, lifecycle.CreateOptions{Owner: "other", Metadata: map[string]string{"odd": "1"}})
		if i%2 == 1 {
			pause(t, s)
		}
		want = append([]string{s.ID()}, want...)
	}
	list := func(opts lifecycle.ListOptions) (ids []string, pages int) {
		for {
			page, err := m.List(opts)
			if err != nil {
				t.Fatal(err)
			}
			pages++
			for i, s := range page.Sandboxes {
				if i > 0 && s.Created.After(page.Sandboxes[i-1].Created) {
					t.Errorf("%s is newer than the one before it", s.ID)
				}
				ids = append(ids, s.ID)
			}
			if opts.Token = page.Next; opts.Token == "" {
				return ids, pages
			}
		}
	}
	ids, pages := list(lifecycle.ListOptions{Owner: "me", Limit: 3})
	if pages != 3 || len(ids) != 7 || !sameSet(ids, want) {
		t.Errorf("%d pages of %v, want %v", pages, ids, want)
	}
	if ids, _ := list(lifecycle.ListOptions{Owner: "me"}); fmt.Sprint(ids) != fmt.Sprint(first(list(lifecycle.ListOptions{Owner: "me", Limit: 1}))) {
		t.Errorf("the order depends on the size of pages: %v", ids)
	}
	for want, opts := range map[int]lifecycle.ListOptions{
		14: {},
		3:  {Owner: "me", States: []lifecycle.State{lifecycle.StatePaused}},
		4:  {Owner: "me", States: []lifecycle.State{lifecycle.StateRunning}},
		10: {Metadata: map[string]string{"odd": "1"}},
		1:  {Metadata: map[string]string{"odd": "1", "n": "3"}},
		0:  {Metadata: map[string]string{"odd": ""}},
	} {
		if ids, _ := list(opts); len(ids) != want {
			t.Errorf("%+v: %d, want %d", opts, len(ids), want)
		}
	}
	for _, token := range []string{"x", "????", strings.Repeat("A", 200)} {
		if _, err := m.List(lifecycle.ListOptions{Token: token}); !errors.Is(err, lifecycle.ErrInvalid) {
			t.Errorf("token %q: %v", token, err)
		}
	}
}

func first[T, U any](v T, _ U) T { return v }

func sameSet(a, b []string) bool {
	a, b = slices.Sorted(slices.Values(a)), slices.Sorted(slices.Values(b))
	return slices.Equal(a, b)
}
