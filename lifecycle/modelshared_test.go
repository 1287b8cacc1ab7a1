//go:build linux && amd64

package lifecycle_test

import (
	"context"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cryovisor/cryovisor/lifecycle"
)

// contested is a sandbox to which several callers do things at once. Its marks only grow, whatever happens to it: no pause loses one.
type contested struct {
	*lifecycle.Sandbox

	writing sync.Mutex
	kept    atomic.Uint64 // a mark that its memory holds, or a later one
	tried   atomic.Uint64 // the latest that was begun to be written
	gone    atomic.Bool   // somebody was told so

	// states is held for writing by who wants the clock to be all that can change its state, for reading by who changes that.
	states sync.RWMutex
}

// contest is callers, the few sandboxes that they share, and a Manager.
type contest struct {
	*managed
	t     *testing.T
	boxes [4]atomic.Pointer[contested]
	marks atomic.Uint64
	empty []string // files, before there were sandboxes

	mu   sync.Mutex
	ever []*contested
}

// TestModelShared has many callers do random things to the same sandboxes, while time goes on and pauses, kills and forgets them. It holds what
// they are told against what must be so in any order: marks do not go back, what is gone stays gone, and nothing is left over.
func TestModelShared(t *testing.T) {
	checkLeaks(t)
	seed := uint64(envInt("CRYOVISOR_MODEL_SEED", int(time.Now().UnixNano()%1e9)))
	total := envInt("CRYOVISOR_MODEL_OPS", map[bool]int{false: modelOps, true: modelOps / 3}[testing.Short()])
	t.Logf("seed %d, %d operations", seed, total)
	c := &contest{managed: newManager(t, lifecycle.ManagerOptions{PrepareAhead: 5 * time.Minute, Retention: 3 * time.Hour, Pool: 2}), t: t}
	c.empty = c.stored(t)
	for i := range c.boxes {
		c.fill(i, nil)
	}
	var left atomic.Int64
	left.Store(int64(total))
	var callers sync.WaitGroup
	for i := range modelCallers {
		rnd := rand.New(rand.NewPCG(seed, uint64(i)))
		callers.Go(func() {
			for left.Add(-1) >= 0 && !t.Failed() {
				c.act(rnd, rnd.IntN(len(c.boxes)))
			}
		})
	}
	callers.Wait()
	c.finish()
}

// fill puts a new sandbox where another, which is gone, was.
func (c *contest) fill(i int, was *contested) {
	opts := lifecycle.CreateOptions{Template: "ticker", Timeout: 20 * time.Minute, OnTimeout: lifecycle.ActionPause}
	if i%2 == 0 {
		opts.OnTimeout = lifecycle.ActionKill
	}
	if i == 0 {
		opts.IdleTimeout = 10 * time.Minute
	}
	s, err := c.Create(c.t.Context(), opts)
	if err != nil {
		c.t.Errorf("create: %v", err)
		return
	}
	c.put(i, was, c.known(s, 0))
}

func (c *contest) known(s *lifecycle.Sandbox, mark uint64) *contested {
	fresh := &contested{Sandbox: s}
	fresh.kept.Store(mark)
	fresh.tried.Store(mark)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ever = append(c.ever, fresh)
	return fresh
}

// put has a sandbox take the place of another, or end, if somebody was faster.
func (c *contest) put(i int, was, fresh *contested) {
	if !c.boxes[i].CompareAndSwap(was, fresh) {
		c.told(fresh, "kill", fresh.Kill(c.t.Context()))
		fresh.gone.Store(true)
	}
}

// act does one random thing to a sandbox.
func (c *contest) act(rnd *rand.Rand, i int) {
	b, ctx, timeout := c.boxes[i].Load(), c.t.Context(), time.Duration(1+rnd.IntN(20))*time.Minute
	if b == nil || b.gone.Load() {
		c.fill(i, b)
		return
	}
	if op := rnd.IntN(16); op < 6 {
		b.states.RLock()
		defer b.states.RUnlock()
		c.change(ctx, b, op, timeout)
		return
	}
	switch rnd.IntN(8) {
	case 0:
		c.lease(ctx, b)
	case 1:
		c.told(b, "touch", b.Touch())
	case 2:
		c.fork(ctx, i, b)
	case 3:
		c.checkpoint(ctx, i, b)
	case 4:
		c.clock.advance(time.Duration(rnd.IntN(10)) * time.Minute)
	case 5:
		c.list()
	default:
		c.write(b)
	}
}

// change does what changes a sandbox's state, or when the clock does.
func (c *contest) change(ctx context.Context, b *contested, op int, timeout time.Duration) {
	var err error
	switch op {
	case 0:
		if err = b.Kill(ctx); err == nil {
			b.gone.Store(true)
			return
		}
	case 1:
		_, err = c.Resume(ctx, b.ID(), lifecycle.ConnectOptions{Timeout: timeout})
	case 2:
		err = b.SetTimeout(timeout)
	case 3:
		_, err = b.Pause(ctx)
	default:
		_, _, err = b.Connect(ctx, lifecycle.ConnectOptions{Timeout: timeout})
	}
	c.told(b, "a change", err)
}

// told looks at what came of a call: success, a state in which it can't be, or that the sandbox is gone, which is for ever.
func (c *contest) told(b *contested, what string, err error) {
	var state *lifecycle.StateError
	switch {
	case err == nil || errors.As(err, &state):
	case errors.Is(err, lifecycle.ErrNotFound):
		// Who is interrupted by a kill is told before that is through.
		for deadline := time.Now().Add(time.Minute); ; runtime.Gosched() {
			info, err := b.Info()
			if errors.Is(err, lifecycle.ErrNotFound) {
				break
			}
			if time.Now().After(deadline) {
				c.t.Errorf("%s said that sandbox %s is gone, but it is %s", what, b.ID(), info.State)
				break
			}
		}
		b.gone.Store(true)
	default:
		c.t.Errorf("%s of sandbox %s: %v", what, b.ID(), err)
	}
}

// lease connects to a sandbox for longer than the others let time go on. So it must run until somebody pauses it, also if its time was up just then.
func (c *contest) lease(ctx context.Context, b *contested) {
	b.states.Lock()
	defer b.states.Unlock()
	info, _, err := b.Connect(ctx, lifecycle.ConnectOptions{Timeout: 24 * time.Hour})
	if c.told(b, "connect", err); err != nil {
		return
	}
	if err := b.Touch(); err != nil {
		c.told(b, "touch", err)
	}
	if _, err := b.Pause(ctx); err != nil && info.IdleTimeout == 0 {
		c.t.Errorf("sandbox %s was connected to, to run until %v; at %v: %v", b.ID(), info.End, c.clock.Now(), err)
	}
}

// write reads the mark of a sandbox that runs, and writes a greater one.
func (c *contest) write(b *contested) {
	b.writing.Lock()
	defer b.writing.Unlock()
	low := b.kept.Load()
	machine, err := c.Machine(b.ID())
	if err != nil {
		c.told(b, "machine", err)
		return
	}
	mem := machine.VM.Memory()
	var old [8]byte
	if _, err := mem.ReadAt(old[:], markAt); err != nil {
		return // it has been paused
	}
	if has := binary.LittleEndian.Uint64(old[:]); has < low || has > b.tried.Load() {
		c.t.Errorf("sandbox %s has the mark %d, which should be from %d to %d", b.ID(), has, low, b.tried.Load())
	}
	mark := c.marks.Add(1)
	b.tried.Store(mark)
	if _, err := mem.WriteAt(binary.LittleEndian.AppendUint64(nil, mark), markAt); err != nil {
		return
	}
	// A pause that has begun may not have it. One that begins now does.
	info, err := b.Info()
	if same, machineErr := c.Machine(b.ID()); err == nil && machineErr == nil && info.State == lifecycle.StateRunning && same == machine {
		b.kept.Store(mark)
	}
}

// fork makes another sandbox of one, which is as that was, and takes its place.
func (c *contest) fork(ctx context.Context, i int, b *contested) {
	low := b.kept.Load()
	forks, err := b.Fork(ctx, 1, lifecycle.ConnectOptions{})
	if err == nil {
		err = forks[0].Err
	}
	if c.told(b, "fork", err); err == nil {
		c.adopt(i, b, forks[0].Sandbox, low)
	}
}

// checkpoint makes another by a checkpoint.
func (c *contest) checkpoint(ctx context.Context, i int, b *contested) {
	low := b.kept.Load()
	kept, err := b.Checkpoint(ctx, "")
	if c.told(b, "checkpoint", err); err != nil {
		return
	}
	s, err := c.Create(ctx, lifecycle.CreateOptions{Template: kept.ID, Timeout: time.Hour})
	if err != nil {
		c.t.Errorf("create of a checkpoint: %v", err)
	} else {
		c.adopt(i, b, s, low)
	}
	if err := c.DeleteTemplate(ctx, kept.ID); err != nil {
		c.t.Errorf("delete a checkpoint: %v", err)
	}
}

// adopt looks at the mark of a new sandbox, made of another, whose place it takes.
func (c *contest) adopt(i int, parent *contested, s *lifecycle.Sandbox, low uint64) {
	fresh := c.known(s, low)
	fresh.tried.Store(parent.tried.Load())
	c.write(fresh)
	if parent.gone.Load() {
		c.put(i, parent, fresh)
	} else {
		c.put(i, nil, fresh)
	}
}

// list looks for what is gone.
func (c *contest) list() {
	gone := make(map[string]bool)
	c.mu.Lock()
	for _, b := range c.ever {
		if b.gone.Load() {
			gone[b.ID()] = true
		}
	}
	c.mu.Unlock()
	page, err := c.List(lifecycle.ListOptions{})
	if err != nil {
		c.t.Errorf("list: %v", err)
	}
	for _, s := range page.Sandboxes {
		if gone[s.ID] {
			c.t.Errorf("sandbox %s is gone, and is listed as %s", s.ID, s.State)
		}
	}
}

// finish looks at the marks of all that are left, kills them, and sees to it that nothing remains.
func (c *contest) finish() {
	ctx := c.t.Context()
	for _, b := range c.ever {
		_, _, err := b.Connect(ctx, lifecycle.ConnectOptions{})
		if c.told(b, "connect", err); err != nil {
			continue
		}
		if b.gone.Load() {
			c.t.Errorf("sandbox %s was gone, and is connected to", b.ID())
		}
		c.write(b)
		c.told(b, "kill", b.Kill(ctx))
	}
	c.list()
	if wrong, err := c.settledAudit(c.t); err != nil || len(wrong) > 0 {
		c.t.Errorf("in the end: %v, %v", wrong, err)
	}
	if left := c.stored(c.t); !slices.Equal(left, c.empty) {
		c.t.Errorf("in the end there are %v; there were %v", left, c.empty)
	}
}
