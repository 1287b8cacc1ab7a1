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

	quit      context.CancelFunc
	reclaimer sync.WaitGroup

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
	image, err := memory.NewImage(state.Machine.MemoryBytes, origin)
	if err != nil {
		return nil, err
	}
	t := &Template{origin: origin, image: image, users: 1}
	ctx, quit := context.WithCancel(context.Background())
	t.quit = quit
	t.reclaimer.Go(func() { t.reclaim(ctx) })
	return t, nil
}

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
	shell := makeShell()
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

// Close gives the template up. Its machines go on. It is idempotent.
func (t *Template) Close() error {
	t.mu.Lock()
	again := t.ended
	t.ended = true
	t.mu.Unlock()
	if again {
		return nil
	}
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
	return errors.Join(t.image.Close(), t.origin.Close())
}
