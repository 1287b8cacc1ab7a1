//go:build linux && amd64

package memory_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/cryovisor/cryovisor/memory"
	"golang.org/x/sys/unix"
)

// firstRun is the first run of pages of o that are in a chunk, or of zeros.
func firstRun(t *testing.T, o *oracle, zero bool) run {
	t.Helper()
	i := slices.IndexFunc(o.runs, func(r run) bool { return (r.chunk < 0) == zero })
	if i < 0 {
		t.Fatal("the oracle has no such run")
	}
	return o.runs[i]
}

func TestFetchIsMergedAndTakenOver(t *testing.T) {
	o := newOracle(newRand(t), mib, memory.Range{Len: mib})
	img := newImage(t, o)
	chunk := firstRun(t, o, false).chunk
	started := make(chan struct{}, 1)
	o.setTrouble(func(ctx context.Context, _ int64) error {
		started <- struct{}{}
		<-ctx.Done()
		return ctx.Err()
	})
	ctx, cancel := context.WithCancel(context.Background())
	first := make(chan error)
	go func() { first <- img.Fetch(ctx, chunk) }()
	<-started
	// The first caller has a fetch under way. These wait for it, and when it is
	// given up, one of them fetches for all.
	o.setTrouble(nil)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			if err := img.Fetch(context.Background(), chunk); err != nil {
				t.Error(err)
			}
		})
	}
	cancel()
	if err := <-first; !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled fetch: %v", err)
	}
	wg.Wait()
	if n := o.fetches.Load(); n != 2 {
		t.Errorf("%d fetches, want the cancelled one and one more", n)
	}
}

func TestFetchOfNoChunk(t *testing.T) {
	o := newOracle(newRand(t), mib, memory.Range{Len: mib})
	img := newImage(t, o)
	for _, chunk := range []int64{-1, o.Chunks()} {
		if err := img.Fetch(context.Background(), chunk); !errors.Is(err, memory.ErrSource) {
			t.Errorf("chunk %d: %v, want ErrSource", chunk, err)
		}
	}
}

// A liar is a source with one fault.
type liar struct {
	lookup  func(gpa uint64) (start, length uint64, chunk int64)
	install func(install func(uint64, []byte) error) error
}

func (l *liar) Chunks() int64 { return 1 }

func (l *liar) Lookup(gpa uint64) (start, length uint64, chunk int64) {
	if l.lookup != nil {
		return l.lookup(gpa)
	}
	return 0, gib, 0
}

func (l *liar) Fetch(_ context.Context, _ int64, install func(uint64, []byte) error) error {
	if l.install != nil {
		return l.install(install)
	}
	return nil
}

// Whatever a source says, the answer is an error and the image stays sound.
func TestInconsistentSource(t *testing.T) {
	installing := func(gpa uint64, n int) *liar {
		return &liar{install: func(install func(uint64, []byte) error) error { return install(gpa, make([]byte, n)) }}
	}
	looking := func(start, length uint64, chunk int64) *liar {
		return &liar{lookup: func(uint64) (uint64, uint64, int64) { return start, length, chunk }}
	}
	for name, src := range map[string]memory.Source{
		"installs nothing":     &liar{},
		"installs into hole":   installing(3*gib, page),
		"installs across hole": installing(3*gib-page, 2*page),
		"installs beyond end":  installing(5*gib, page),
		"installs at overflow": installing(1<<64-page, 2*page),
		"unaligned address":    installing(1, page),
		"unaligned length":     installing(0, page+1),
		"run elsewhere":        looking(2*page, page, 0),
		"empty run":            looking(0, 0, 0),
		"unaligned run":        looking(0, 100, -1),
		"unaligned start":      looking(100, page, -1),
		"no such chunk":        looking(0, page, 1),
	} {
		t.Run(name, func(t *testing.T) {
			img, err := memory.NewImage(4*gib, src)
			if err != nil {
				t.Fatal(err)
			}
			defer img.Close()
			m := mapImage(t, img, memory.MapOptions{})
			if _, err := m.ReadAt(make([]byte, 1), 50); !errors.Is(err, memory.ErrSource) {
				t.Errorf("ReadAt: %v, want ErrSource", err)
			}
			if n := m.Stats().PagesFetched; n != 0 {
				t.Errorf("%d pages were taken from it", n)
			}
		})
	}
}

func TestImageLifetime(t *testing.T) {
	o := newOracle(newRand(t), mib, memory.Range{Len: mib})
	img := newImage(t, o)
	m := mapImage(t, img, memory.MapOptions{})
	for range 2 {
		if err := img.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := img.Map(context.Background(), memory.MapOptions{}); !errors.Is(err, memory.ErrClosed) {
		t.Errorf("Map after Close: %v", err)
	}
	got := make([]byte, mib)
	if _, err := m.ReadAt(got, 0); err != nil || !bytes.Equal(got, o.bytes(0, mib)) {
		t.Errorf("memory of an image that its creator closed: %v", err)
	}
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	if err := img.Fetch(context.Background(), 0); !errors.Is(err, memory.ErrClosed) {
		t.Errorf("Fetch after the last Close: %v", err)
	}
	for what, err := range map[string]error{
		"Resident": m.Resident(context.Background(), 0, 1),
		"Populate": m.Populate(context.Background()),
	} {
		if !errors.Is(err, memory.ErrClosed) {
			t.Errorf("%s after Close: %v", what, err)
		}
	}
	if _, err := m.Dirty(context.Background()); !errors.Is(err, memory.ErrClosed) {
		t.Errorf("Dirty after Close: %v", err)
	}
}

// After Populate nothing is asked of the source any more, and all that it has
// can be viewed.
func TestPopulate(t *testing.T) {
	size, data := sparse()
	o := newOracle(newRand(t), size, data...)
	m := mapImage(t, newImage(t, o), memory.MapOptions{})
	zero, full := firstRun(t, o, true), firstRun(t, o, false)
	for _, gpa := range []uint64{zero.gpa, full.gpa} {
		if _, err := m.View(gpa, page); !errors.Is(err, memory.ErrNotResident) {
			t.Errorf("view of a missing page: %v", err)
		}
	}
	if err := m.Populate(context.Background()); err != nil {
		t.Fatal(err)
	}
	o.setTrouble(func(context.Context, int64) error { return errors.New("asked for more") })
	for _, r := range o.runs {
		if r.chunk < 0 {
			continue
		}
		view, err := m.View(r.gpa, int(r.length))
		if err != nil || !bytes.Equal(view, o.bytes(r.gpa, int(r.length))) {
			t.Fatalf("view of %#x: %v", r.gpa, err)
		}
	}
	if err := m.Resident(context.Background(), zero.gpa, page); err != nil {
		t.Error(err)
	}
	if view, err := m.View(zero.gpa, page); err != nil || !bytes.Equal(view, make([]byte, page)) {
		t.Errorf("view of zeros: %v", err)
	}
	if s := m.Stats(); s.ChunksFetched != uint64(o.Chunks()) || s.Faults != 0 || s.ZeroPages == 0 {
		t.Errorf("stats %+v", s)
	}
}

func TestEagerIsExact(t *testing.T) {
	size, data := sparse()
	rng := newRand(t)
	o := newOracle(rng, size, data...)
	img := newImage(t, o)
	var machines []*toucher
	for range 2 {
		machines = append(machines, mustToucher(t, mapImage(t, img, memory.MapOptions{Eager: true})))
	}
	o.setTrouble(func(context.Context, int64) error { return errors.New("asked for more") })
	for i, gpa := range append(pagesOf(rng, data), 2*gib, 5*gib) {
		for id, tc := range machines {
			if err := visit(tc, o, gpa, byte(id), i); err != nil {
				t.Fatal(err)
			}
		}
	}
	broken := errors.New("broken")
	o = newOracle(rng, mib, memory.Range{Len: mib})
	o.setTrouble(func(context.Context, int64) error { return broken })
	if _, err := newImage(t, o).Map(context.Background(), memory.MapOptions{Eager: true}); !errors.Is(err, broken) {
		t.Errorf("eager map of a broken source: %v", err)
	}
}

// Giving up an access is no failure of the memory.
func TestResidentIsCancelled(t *testing.T) {
	o := newOracle(newRand(t), mib, memory.Range{Len: mib})
	m := mapImage(t, newImage(t, o), memory.MapOptions{})
	ctx, cancel := context.WithCancel(context.Background())
	o.setTrouble(func(ctx context.Context, _ int64) error {
		cancel()
		<-ctx.Done()
		return ctx.Err()
	})
	r := firstRun(t, o, false)
	if err := m.Resident(ctx, r.gpa, page); !errors.Is(err, context.Canceled) {
		t.Errorf("Resident: %v", err)
	}
	o.setTrouble(nil)
	if err := m.Resident(context.Background(), r.gpa, page); err != nil || m.Err() != nil {
		t.Errorf("after a cancelled access: %v, %v", err, m.Err())
	}
}

func TestFailTwice(t *testing.T) {
	m := newCold(t, mib, memory.Options{})
	first := errors.New("first")
	m.Fail(first)
	m.Fail(errors.New("second"))
	<-m.Failed()
	var hooked error
	m.OnFail(func(err error) { hooked = err })
	if !errors.Is(m.Err(), first) || !errors.Is(hooked, first) {
		t.Errorf("Err is %v, the hook got %v", m.Err(), hooked)
	}
}

// Accesses while a memory is closed either work or say so.
func TestCloseDuringAccess(t *testing.T) {
	rng := newRand(t)
	o := newOracle(rng, 8*mib, memory.Range{Len: 8 * mib})
	img := newImage(t, o)
	for range 20 {
		m := mapImage(t, img, memory.MapOptions{})
		var wg sync.WaitGroup
		for id := range 3 {
			pages := pagesOf(rng, m.Ranges())
			wg.Go(func() {
				for _, gpa := range pages {
					p := make([]byte, 8)
					var err error
					if id == 0 {
						_, err = m.Dirty(context.Background())
					} else {
						_, err = m.ReadAt(p, int64(gpa))
					}
					if errors.Is(err, memory.ErrClosed) {
						return
					}
					if err != nil {
						t.Error(err)
						return
					}
				}
			})
		}
		if err := m.Resident(context.Background(), pagesOf(rng, m.Ranges())[0], page); err != nil {
			t.Error(err)
		}
		if err := m.Close(); err != nil {
			t.Error(err)
		}
		wg.Wait()
	}
}

// No descriptor and no mapping is left, whatever became of the machines.
// (Goroutines: TestMain.)
func TestNothingIsLeft(t *testing.T) {
	size, data := sparse()
	o := newOracle(newRand(t), size, data...)
	mapImage(t, newImage(t, o), memory.MapOptions{}).Close() // or skip; and the netpoller has its descriptors
	fds := openFiles(t)
	img, err := memory.NewImage(size, o)
	if err != nil {
		t.Fatal(err)
	}
	var bases []uintptr
	for i := range 3 {
		m := mapImage(t, img, memory.MapOptions{Eager: i == 1})
		bases = append(bases, m.HostAddr(0))
		tc := mustToucher(t, m)
		if _, err := tc.load(gib+5*page, page); err != nil {
			t.Fatal(err)
		}
		if i == 2 {
			o.setTrouble(func(context.Context, int64) error { return errors.New("broken") })
			m.Fail(errors.New("enough"))
		}
		if err := m.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
	if now := openFiles(t); !slices.Equal(now, fds) {
		t.Errorf("descriptors before: %v\nand after: %v", fds, now)
	}
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(maps), "cryovisor-image") {
		t.Errorf("the image is still mapped:\n%s", maps)
	}
	for _, base := range bases {
		if strings.Contains(string(maps), fmt.Sprintf("%x-", base)) {
			t.Errorf("%#x is still mapped:\n%s", base, maps)
		}
	}
}

// openFiles lists what the descriptors of this process are, but for those of
// touchers.
func openFiles(t *testing.T) []string {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	var files []string
	for _, e := range entries {
		if name, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil && !strings.Contains(name, "toucher") {
			files = append(files, name)
		}
	}
	slices.Sort(files)
	return files
}

// A process that may not use userfaultfd is told so, and can map eagerly.
func TestWithoutUserfaultfd(t *testing.T) {
	if err := memory.LazySupport(); err != nil {
		t.Skip(err)
	}
	o := newOracle(newRand(t), mib, memory.Range{Len: mib})
	img := newImage(t, o)
	type outcome struct {
		support, lazy, eager error
		m                    *memory.Memory
	}
	result := make(chan outcome)
	go func() {
		runtime.LockOSThread() // and never unlock: the thread ends with the goroutine
		var r outcome
		if r.support = dropPrivileges(); r.support == nil {
			r.support = memory.LazySupport()
			var m *memory.Memory
			if m, r.lazy = img.Map(context.Background(), memory.MapOptions{}); r.lazy == nil {
				r.lazy = m.Close()
			}
			r.m, r.eager = img.Map(context.Background(), memory.MapOptions{Eager: true})
		}
		result <- r
	}()
	r := <-result
	if r.eager != nil {
		t.Fatalf("eager: %v", r.eager)
	}
	defer r.m.Close()
	if r.support == nil && r.lazy == nil {
		t.Skip("this host lets everybody use userfaultfd")
	}
	if !errors.Is(r.support, memory.ErrNotPermitted) || !errors.Is(r.lazy, memory.ErrNotPermitted) {
		t.Errorf("LazySupport: %v, Map: %v, want ErrNotPermitted", r.support, r.lazy)
	}
	got := make([]byte, mib)
	if _, err := r.m.ReadAt(got, 0); err != nil || !bytes.Equal(got, o.bytes(0, mib)) {
		t.Errorf("eager memory: %v", err)
	}
}

// dropPrivileges makes this thread nobody's, without capabilities.
func dropPrivileges() error {
	if err := unix.Setfsuid(65534); err != nil && os.Getuid() == 0 {
		return err
	}
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var none [2]unix.CapUserData
	return unix.Capset(&header, &none[0])
}
