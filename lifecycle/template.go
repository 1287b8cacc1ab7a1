package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"filippo.io/age"

	"github.com/cryovisor/cryovisor/memory"
	"github.com/cryovisor/cryovisor/snapshot"
	"github.com/cryovisor/cryovisor/vmm"
)

// Template is a snapshot that is opened once, for several machines. They share what has been fetched of its memory: each takes
// only what it writes itself. Its methods may be called from any number of goroutines.
type Template struct {
	origin *snapshot.Reader
	image  *memory.Image

	ctx       context.Context // ends with the last user
	quit      context.CancelFunc
	reclaimer sync.WaitGroup

	adopted bool            // the image is another process's
	closing context.Context // ends with Close: no other process gets the image any more
	close   context.CancelFunc
	lessees sync.WaitGroup // one for each process that has the image

	mu    sync.Mutex
	users int // the creator, until Close, and every machine
	ended bool
}

// Open opens a snapshot with the first of the identities that fits. The store's files must stay until the template and all of its
// machines are closed. Errors: those of snapshot.Store.Open.
func Open(ctx context.Context, store *snapshot.Store, id snapshot.ID, identities ...age.Identity) (*Template, error) {
	origin, err := store.Open(ctx, id, identities...)
	if err != nil {
		return nil, err
	}
	t, err := NewTemplate(origin)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open snapshot %v: %w", id, err), origin.Close())
	}
	return t, nil
}

// NewTemplate is Open for a snapshot that has been opened already, from an object store by snapshot.OpenFrom, say. If it
// succeeds, the template closes the reader. A pause of a machine whose snapshot does not lie in the store of the pause must be full.
func NewTemplate(origin *snapshot.Reader) (*Template, error) {
	state, err := readState(origin)
	if err != nil {
		return nil, err
	}
	image, err := memory.NewImage(state.Machine.MemoryBytes, imageSource{origin})
	if err != nil {
		return nil, err
	}
	t := templateOf(origin, image)
	t.reclaimer.Go(func() { t.reclaim(t.ctx) })
	return t, nil
}

func templateOf(origin *snapshot.Reader, image *memory.Image) *Template {
	t := &Template{origin: origin, image: image, users: 1}
	t.ctx, t.quit = context.WithCancel(context.Background())
	t.closing, t.close = context.WithCancel(t.ctx)
	return t
}

// imageSource is a snapshot, as an image takes it.
type imageSource struct{ *snapshot.Reader }

// ChunkRuns makes it a memory.RunSource.
func (s imageSource) ChunkRuns(chunk int64) []memory.Range { return guestRanges(s.Runs(chunk)) }

var (
	_ memory.BatchSource = imageSource{}
	_ memory.RunSource   = imageSource{}
)

// LimitImage bounds the host memory that the image takes, which is what has been fetched of the snapshot's memory, to about so many
// bytes, at least memory.MinLimit; 0 is no bound. What is over it is dropped, and fetched again when it is touched: see
// memory.Image.SetLimit. What the machines have written is not counted. The bound waits while another process has the image, and in
// a template of OpenShared it stops prefetches only.
func (t *Template) LimitImage(bytes uint64) { t.image.SetLimit(bytes) }

// reclaimEvery is how often what all machines have rewritten is taken out of the image. Looking costs about a millisecond for each
// GiB of it and each machine.
const reclaimEvery = 5 * time.Second

// reclaim keeps a machine that has rewritten its memory from holding it twice.
func (t *Template) reclaim(ctx context.Context) {
	tick := time.NewTicker(reclaimEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			_, _ = t.image.Reclaim(ctx) // it can be tried again
		}
	}
}

// Resume makes a machine of the template, as the function Resume does. Options.Identities are not looked at. Each machine is a clone:
// its kernel, if it knows generation IDs, makes random numbers of its own.
func (t *Template) Resume(ctx context.Context, opts ResumeOptions) (*Machine, error) {
	shell := opts.Pool.take()
	defer shell.close()
	return t.resume(ctx, shell, opts)
}

func (t *Template) resume(ctx context.Context, shell *pendingShell, opts ResumeOptions) (*Machine, error) {
	if err := t.enter(); err != nil {
		return nil, err
	}
	m := &Machine{template: t, origin: t.origin, base: t.origin, image: t.image}
	if err := m.resume(ctx, shell, opts); err != nil {
		return nil, errors.Join(fmt.Errorf("resume snapshot %v: %w", t.origin.Header().ID, err), m.Close())
	}
	return m, nil
}

func (t *Template) enter() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.ended {
		return fmt.Errorf("lifecycle: template: %w", vmm.ErrClosed)
	}
	t.users++
	return nil
}

// Close gives the template up. Its machines go on, here and in other processes. It is idempotent.
func (t *Template) Close() error {
	t.mu.Lock()
	again := t.ended
	t.ended = true
	t.mu.Unlock()
	if again {
		return nil
	}
	t.close()
	return t.leave()
}

// leave is called by each user in the end.
func (t *Template) leave() error {
	t.mu.Lock()
	t.users--
	last := t.users == 0
	t.mu.Unlock()
	if !last {
		return nil
	}
	t.quit()
	t.reclaimer.Wait()
	t.lessees.Wait()
	return errors.Join(t.image.Close(), t.origin.Close())
}
