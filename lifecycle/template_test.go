//go:build linux && amd64

package lifecycle_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"

	"github.com/cryovisor/cryovisor/internal/testvm"
	"github.com/cryovisor/cryovisor/lifecycle"
	"github.com/cryovisor/cryovisor/memory"
	"github.com/cryovisor/cryovisor/snapshot"
	"github.com/cryovisor/cryovisor/vmm"
)

// TestTemplate: machines of one template share what is fetched, nothing of what each writes shows in another, and each can be
// stored by itself; the template may be closed before them.
func TestTemplate(t *testing.T) {
	checkLeaks(t)
	g := newGuest(t, testvm.WorkerConfig{Memory: 32 << 20})
	m := g.boot(t, testvm.NoLimit)
	g.work(t, m, 10)
	id := g.pause(t, m).ID
	saved := g.device.State()
	closeMachine(t, m)

	tpl, err := lifecycle.Open(t.Context(), g.store, id, g.key)
	if err != nil {
		t.Fatal(err)
	}
	var guests []*guest
	var machines []*lifecycle.Machine
	for i := range 3 {
		c := g.past(saved)
		m, err := tpl.Resume(t.Context(), lifecycle.ResumeOptions{Hardware: c.hardware(testvm.NoLimit), Eager: i == 2})
		if errors.Is(err, vmm.ErrNoUserfaultfd) {
			t.Skip(err)
		}
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { closeMachine(t, m) })
		if err := m.Resume(); err != nil {
			t.Fatal(err)
		}
		guests, machines = append(guests, c), append(machines, m)
	}
	if err := errors.Join(tpl.Close(), tpl.Close()); err != nil {
		t.Fatal(err)
	}
	if _, err := tpl.Resume(t.Context(), lifecycle.ResumeOptions{}); !errors.Is(err, vmm.ErrClosed) {
		t.Errorf("of a template that is closed: %v", err)
	}
	ids := make([]snapshot.ID, len(guests))
	for i, c := range guests {
		c.work(t, machines[i], 10*int64(i+1))
		c.compare(t, machines[i])
		ids[i] = c.pause(t, machines[i]).ID // while it holds
	}
	// The last was eager: all that there is came into their image, and once.
	header := g.open(t, id).Header()
	if n := machines[0].VM.Memory().Stats().PagesFetched; n != header.PagesMapped {
		t.Errorf("%d pages came into the image, the snapshot has %d", n, header.PagesMapped)
	}
	for _, m := range machines {
		closeMachine(t, m)
	}
	for i, c := range guests {
		m := c.resume(t, ids[i], false, testvm.NoLimit) // and goes on
		c.work(t, m, 10)
		c.compare(t, m)
		closeMachine(t, m)
	}
}

// TestReclaim: what a guest has rewritten is not held twice; and what it has is right, also in the next snapshot.
func TestReclaim(t *testing.T) {
	checkLeaks(t)
	g := newGuest(t, testvm.WorkerConfig{Memory: 16 << 20, WorkingSet: 4 << 20})
	m := g.boot(t, testvm.NoLimit)
	g.work(t, m, 5)
	if n, err := m.Reclaim(t.Context()); n != 0 || err != nil {
		t.Errorf("a machine that was booted: %d, %v", n, err)
	}
	for range 2 {
		id := g.pause(t, m).ID
		closeMachine(t, m)
		m = g.resume(t, id, false, testvm.NoLimit)
		g.work(t, m, 200)
		freed, err := m.Reclaim(t.Context())
		if err != nil || freed == 0 {
			t.Errorf("%d bytes reclaimed, %v", freed, err)
		}
		g.work(t, m, 20)
		g.compare(t, m)
		g.device.SetLimit(testvm.NoLimit)
	}
}

// storeFiles are a store's, as an object store has them.
type storeFiles struct{ dir string }

func (s storeFiles) Open(name string) (snapshot.Blob, error) {
	f, err := os.Open(filepath.Join(s.dir, filepath.FromSlash(name)))
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return storeFile{f, info.Size()}, nil
}

type storeFile struct {
	*os.File
	size int64
}

func (f storeFile) Size() int64 { return f.size }

// TestTemplateFromElsewhere: a snapshot that lies in no store of ours resumes, and can be stored in one in full.
func TestTemplateFromElsewhere(t *testing.T) {
	checkLeaks(t)
	g := newGuest(t, testvm.WorkerConfig{Memory: 32 << 20})
	m := g.boot(t, testvm.NoLimit)
	g.work(t, m, 5)
	id := g.pause(t, m).ID
	closeMachine(t, m)
	r, err := snapshot.OpenFrom(t.Context(), storeFiles{g.store.Dir()}, id, snapshot.OpenOptions{}, g.key)
	if err != nil {
		t.Fatal(err)
	}
	tpl, err := lifecycle.NewTemplate(r)
	if err != nil {
		t.Fatal(err)
	}
	m, err = tpl.Resume(t.Context(), lifecycle.ResumeOptions{Hardware: g.hardware(testvm.NoLimit), Prefetch: lifecycle.PrefetchAll})
	if errors.Is(err, vmm.ErrNoUserfaultfd) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeMachine(t, m) })
	if err := errors.Join(tpl.Close(), m.Resume()); err != nil {
		t.Fatal(err)
	}
	g.work(t, m, 20)
	if _, err := m.Pause(t.Context(), g.store, g.options()); !errors.Is(err, snapshot.ErrInvalid) {
		t.Errorf("a diff of what is not in the store: %v", err)
	}
	opts := g.options()
	opts.Full = true
	p, err := m.Pause(t.Context(), g.store, opts)
	if err != nil {
		t.Fatal(err)
	}
	closeMachine(t, m)
	if err := g.store.Delete(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	m = g.resume(t, p.ID, false, testvm.NoLimit)
	g.work(t, m, 5)
	g.compare(t, m)
}

// TestLimitImage: a guest that touches more than its template's image may hold goes on, exactly, and the image stays small.
func TestLimitImage(t *testing.T) {
	checkLeaks(t)
	g, job := shareGuest(t)
	tpl, err := lifecycle.Open(t.Context(), g.store, job.id(t), g.key)
	if err != nil {
		t.Fatal(err)
	}
	defer tpl.Close()
	tpl.LimitImage(memory.MinLimit)
	for range 2 { // the second finds what the first has left
		c, m := job.clone(t, g, tpl, lifecycle.ResumeOptions{Prefetch: lifecycle.PrefetchAll})
		c.compare(t, m) // reads all of it
		c.device.SetLimit(testvm.NoLimit)
		c.work(t, m, 20)
		s := m.VM.Memory().Stats()
		if n := imageBlocks(t); s.EvictedBytes == 0 || n > memory.MinLimit+1<<20 || n == 0 {
			t.Errorf("the image holds %d bytes; %+v", n, s)
		}
		opts := g.options()
		opts.Full = true
		p, err := m.Pause(t.Context(), g.store, opts) // and so does this
		if err != nil {
			t.Fatal(err)
		}
		closeMachine(t, m)
		m = c.resume(t, p.ID, true, testvm.NoLimit)
		c.work(t, m, 5)
		c.compare(t, m)
		closeMachine(t, m)
	}
}

// troubled are files that can't be read while trouble says so.
type troubled struct {
	storeFiles
	trouble func() error
}

func (s troubled) Open(name string) (snapshot.Blob, error) {
	b, err := s.storeFiles.Open(name)
	if err != nil {
		return nil, err
	}
	return troubledFile{b, s.trouble}, nil
}

type troubledFile struct {
	snapshot.Blob
	trouble func() error
}

func (f troubledFile) ReadAt(p []byte, off int64) (int, error) {
	if err := f.trouble(); err != nil {
		return 0, err
	}
	return f.Blob.ReadAt(p, off)
}

// TestStorageFails: a guest whose storage fails now and then runs on, exactly. One whose storage has failed for good ends, with the
// storage's error, and nothing that it reported before was wrong.
func TestStorageFails(t *testing.T) {
	for _, good := range []bool{false, true} {
		t.Run(fmt.Sprintf("forGood=%v", good), func(t *testing.T) {
			checkLeaks(t)
			g, job := shareGuest(t)
			errTrouble := errors.New("the store is busy")
			var reads, failed atomic.Int64
			var on atomic.Bool
			blobs := troubled{storeFiles{g.store.Dir()}, func() error {
				if on.Load() && (good || reads.Add(1)%16 == 1) {
					failed.Add(1)
					return errTrouble
				}
				return nil
			}}
			// Small blocks and no cache: what is needed is read when it is needed.
			r, err := snapshot.OpenFrom(t.Context(), blobs, job.id(t), snapshot.OpenOptions{BlockSize: -1}, g.key)
			if err != nil {
				t.Fatal(err)
			}
			tpl, err := lifecycle.NewTemplate(r)
			if err != nil {
				t.Fatal(err)
			}
			defer tpl.Close()
			on.Store(true)
			c := g.past(job.Saved)
			m, err := tpl.Resume(t.Context(), lifecycle.ResumeOptions{Hardware: c.hardware(testvm.NoLimit)})
			if errors.Is(err, vmm.ErrNoUserfaultfd) {
				t.Skip(err)
			}
			if err == nil {
				defer closeMachine(t, m)
				err = m.Resume()
			}
			if good {
				if err == nil {
					err = m.VM.Wait(t.Context())
				}
				if !errors.Is(err, vmm.ErrGuestMemory) || !errors.Is(err, errTrouble) || c.reports.Load() != 0 {
					t.Errorf("%v, after %d reports", err, c.reports.Load())
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			c.work(t, m, 20)
			c.compare(t, m)
			if failed.Load() == 0 {
				t.Error("nothing failed")
			}
		})
	}
}
