package blockdevtest

import (
	"fmt"
	"math/rand/v2"
	"strconv"
	"sync/atomic"
	"testing"

	"golang.org/x/sync/errgroup"

	"github.com/cryovisor/cryovisor/blockdev"
)

const (
	crashTrials      = 60 // with as many at work
	generations      = 3  // crashes of a trial
	stepsOfCrashes   = 30
	mixCrashes       = "rrwwwwwwddzzff"
	crashLimit       = 40 << 10 // bytes of an operation, divided by those at work
	mostOpsTillCrash = 150
)

func crashSuite(t *testing.T, f faultTest, run runner) {
	for _, workers := range []int{1, 3} {
		run(t, fmt.Sprintf("crashes/%d at a time", workers), func(t *testing.T) error {
			for seed := range uint64(crashTrials) {
				err := scoped(t, strconv.FormatUint(seed, 10), func(t *testing.T) error {
					return newCrashTrial(t, f, seed, workers).run(t)
				})
				if err != nil {
					return fmt.Errorf("seed %d: %w", seed, err)
				}
			}
			return nil
		})
	}
}

// crashTrial is a disk that is used and crashes again and again.
type crashTrial struct {
	faultTest
	medium *Medium
	dev    blockdev.Device
	whole  *model
	models []*model // of whole, of those who work at the same time
	rng    *rand.Rand
	burnt  *atomic.Bool // the host has crashed
}

func newCrashTrial(t *testing.T, f faultTest, seed uint64, workers int) *crashTrial {
	c := &crashTrial{faultTest: f, medium: NewMedium(), rng: seeded(seed, 5)}
	d := f.newDisk(t, c.medium)
	c.dev, c.whole = d.Device, newModel(d.Content).remember()
	c.models = []*model{c.whole}
	if workers > 1 {
		c.models = divide(c.rng, c.whole, cutWide(c.rng, int64(len(d.Content))), workers)
	}
	return c
}

// light has the host crash in the operation of the medium that is the last of some, of which only syncs count if so said.
func (c *crashTrial) light(fuse int, syncs bool) {
	burnt := &atomic.Bool{}
	c.burnt = burnt
	c.medium.SetHook(func(op Op) *Fault {
		if !syncs || op.Kind == OpSync {
			fuse--
		}
		if fuse > 0 {
			return nil
		}
		burnt.Store(true)
		return &Fault{Err: ErrCrashed}
	})
}

func (c *crashTrial) run(t *testing.T) error {
	for generation := range generations {
		// Half of them in a Flush, where most can go wrong.
		if c.rng.IntN(2) == 0 {
			c.light(1+c.rng.IntN(12), true)
		} else {
			c.light(1+c.rng.IntN(mostOpsTillCrash), false)
		}
		if err := c.work(generation == 0); err != nil {
			return fmt.Errorf("generation %d: %w", generation, err)
		}
		kept := false
		for _, m := range c.models {
			kept = kept || m.flushed
		}
		if !kept {
			return nil // the disk itself may not have outlived
		}
		if err := c.reopen(t); err != nil {
			return fmt.Errorf("generation %d: %w", generation, err)
		}
	}
	return nil
}

// work uses the disk until the host crashes.
func (c *crashTrial) work(first bool) error {
	var g errgroup.Group
	for i, m := range c.models {
		limit := crashLimit / int64(len(c.models))
		w := &worker{dev: c.dev, model: m, rng: seeded(c.rng.Uint64(), uint64(i)), limit: limit, mayFail: c.burnt.Load}
		g.Go(func() error {
			// Mostly, something is to be kept.
			if first && w.rng.IntN(4) > 0 {
				if err := w.flush(); err != nil {
					return err
				}
			}
			for range stepsOfCrashes {
				if c.burnt.Load() {
					return nil
				}
				if err := w.random(mixCrashes); err != nil {
					return err
				}
			}
			return nil
		})
	}
	return g.Wait()
}

// reopen has the host crash, opens the disk again, and compares. Now and then the host crashes while the disk is opened.
func (c *crashTrial) reopen(t *testing.T) error {
	c.medium = c.medium.Crash(c.rng)
	if c.rng.IntN(4) == 0 {
		c.light(1+c.rng.IntN(8), false)
		if _, err := c.open(t, c.medium); err != nil && !c.burnt.Load() {
			return fmt.Errorf("open again: %w", err)
		}
		c.medium = c.medium.Crash(c.rng)
	}
	var err error
	if c.dev, err = c.open(t, c.medium); err != nil {
		return fmt.Errorf("open again: %w", err)
	}
	disk, err := readAll(c.dev, len(c.whole.now))
	if err != nil {
		return err
	}
	for _, m := range c.models {
		if err := m.reopened(disk); err != nil {
			return err
		}
	}
	return nil
}
