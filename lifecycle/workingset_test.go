//go:build linux && amd64

package lifecycle_test

import (
	"errors"
	"slices"
	"testing"

	"filippo.io/age"

	"github.com/cryovisor/cryovisor/internal/testvm"
	"github.com/cryovisor/cryovisor/lifecycle"
	"github.com/cryovisor/cryovisor/memory"
	"github.com/cryovisor/cryovisor/snapshot"
	"github.com/cryovisor/cryovisor/vmm"
)

// wake resumes a snapshot, whose machine then stands still.
func (g *guest) wake(t *testing.T, id snapshot.ID, opts lifecycle.ResumeOptions) *lifecycle.Machine {
	t.Helper()
	opts.Identities, opts.Hardware = []age.Identity{g.key}, g.hardware(testvm.NoLimit)
	m, err := lifecycle.Resume(t.Context(), g.store, id, opts)
	if errors.Is(err, vmm.ErrNoUserfaultfd) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeMachine(t, m) })
	return m
}

func prefetchedBytes(t *testing.T, m *lifecycle.Machine) uint64 {
	t.Helper()
	if err := m.WaitPrefetch(t.Context()); err != nil {
		t.Fatal(err)
	}
	return m.VM.Memory().Stats().PrefetchBytes
}

// TestWorkingSet: what a guest has touched after a resume is there before it asks for it at the next, of the snapshot that was made
// then and, by a record, of the same; and it is right.
func TestWorkingSet(t *testing.T) {
	checkLeaks(t)
	g := newGuest(t, testvm.WorkerConfig{Memory: 64 << 20, WorkingSet: 4 << 20})
	m := g.boot(t, testvm.NoLimit)
	g.work(t, m, 5)
	if ws, err := m.WorkingSet(t.Context()); ws != nil || err != nil {
		t.Errorf("a machine that was booted: %x, %v", ws, err)
	}
	first := g.pause(t, m).ID
	saved := g.device.State()
	closeMachine(t, m)

	m = g.wake(t, first, lifecycle.ResumeOptions{})
	if n := prefetchedBytes(t, m); n != 0 {
		t.Errorf("%d bytes prefetched of a snapshot that knows nothing", n)
	}
	if err := m.Resume(); err != nil {
		t.Fatal(err)
	}
	g.work(t, m, 200)
	asked := m.VM.Memory().Stats().DemandBytes
	record, err := m.WorkingSet(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	second := g.pause(t, m).ID
	closeMachine(t, m)

	for _, c := range []struct {
		name string
		id   snapshot.ID
		opts lifecycle.ResumeOptions
		most uint64 // that is asked for afterwards
		all  bool
	}{
		{"of its own", second, lifecycle.ResumeOptions{}, asked / 2, false},
		{"none", second, lifecycle.ResumeOptions{Prefetch: lifecycle.PrefetchNone}, asked * 2, false},
		{"all", second, lifecycle.ResumeOptions{Prefetch: lifecycle.PrefetchAll}, 0, true},
		{"by a record", first, lifecycle.ResumeOptions{WorkingSet: record}, asked / 2, false},
		{"by none that can be read", first, lifecycle.ResumeOptions{WorkingSet: []byte{9}}, asked * 2, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			then := g.past(g.device.State())
			if c.id == first {
				then = g.past(saved)
			}
			m := then.wake(t, c.id, c.opts)
			ahead := prefetchedBytes(t, m)
			if none := c.opts.Prefetch == lifecycle.PrefetchNone || len(c.opts.WorkingSet) == 1; (ahead == 0) != none {
				t.Errorf("%d bytes prefetched", ahead)
			}
			if c.all && ahead < m.VM.Memory().Size()/2 {
				t.Errorf("only %d bytes prefetched", ahead)
			}
			if err := m.Resume(); err != nil {
				t.Fatal(err)
			}
			then.work(t, m, 200)
			if n := m.VM.Memory().Stats().DemandBytes; n > c.most || c.name == "none" && n == 0 {
				t.Errorf("%d bytes were asked for, want at most %d; the first time it was %d", n, c.most, asked)
			}
			then.compare(t, m)
			closeMachine(t, m)
		})
	}
}

// TestCloseDuringPrefetch: a machine that is closed does not wait for what it has not asked for.
func TestCloseDuringPrefetch(t *testing.T) {
	checkLeaks(t)
	g := newGuest(t, testvm.WorkerConfig{Memory: 64 << 20})
	m := g.boot(t, testvm.NoLimit)
	id := g.pause(t, m).ID
	closeMachine(t, m)
	m = g.wake(t, id, lifecycle.ResumeOptions{Prefetch: lifecycle.PrefetchAll})
	closeMachine(t, m)
	if err := m.WaitPrefetch(t.Context()); err == nil && m.VM.Memory().Stats().PrefetchBytes == 0 {
		t.Error("the prefetch has done nothing, and says nothing")
	}
}

// TestWorkingSetRefuses: what is no record is refused.
func TestWorkingSetRefuses(t *testing.T) {
	good := []snapshot.Range{{GPA: 5 * memory.PageSize, Len: memory.PageSize}, {GPA: 0, Len: 300 * memory.PageSize}}
	b := lifecycle.MarshalWorkingSet(good)
	if got, err := lifecycle.ParseWorkingSet(b); err != nil || !slices.Equal(got, good) {
		t.Errorf("%v, %v", got, err)
	}
	for name, bad := range map[string][]byte{
		"empty": {}, "cut off": b[:len(b)-1], "longer": append(slices.Clone(b), 0), "counts too many": {200, 1, 0, 1},
		"no pages": {1, 5, 0}, "endless": {1, 5, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1}, "half a number": {0x80},
	} {
		if got, err := lifecycle.ParseWorkingSet(bad); !errors.Is(err, lifecycle.ErrWorkingSet) {
			t.Errorf("%s: %v, %v", name, got, err)
		}
	}
}

// FuzzWorkingSet: any bytes are a record, of what is in the address space, or refused.
func FuzzWorkingSet(f *testing.F) {
	f.Add([]byte{0})
	f.Add(lifecycle.MarshalWorkingSet([]snapshot.Range{{GPA: 1 << 40, Len: 1 << 20}, {GPA: 0, Len: 4096}}))
	f.Fuzz(func(t *testing.T, b []byte) {
		ranges, err := lifecycle.ParseWorkingSet(b)
		if err != nil && !errors.Is(err, lifecycle.ErrWorkingSet) {
			t.Fatal(err)
		}
		for _, r := range ranges {
			if r.Len == 0 || r.GPA+r.Len > snapshot.DiskStride || (r.GPA|r.Len)%snapshot.PageSize != 0 {
				t.Fatalf("%+v", r)
			}
		}
		if again, err2 := lifecycle.ParseWorkingSet(lifecycle.MarshalWorkingSet(ranges)); err == nil && (err2 != nil || !slices.Equal(again, ranges)) {
			t.Fatalf("%v became %v, %v", ranges, again, err2)
		}
	})
}
