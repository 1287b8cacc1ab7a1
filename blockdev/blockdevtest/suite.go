// Package blockdevtest is what every disk must do, as tests: a suite for any blockdev.Device, and a file in memory that
// fails and crashes, for those that store something in files.
package blockdevtest

import (
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/cryovisor/cryovisor/blockdev"
)

// Disk is a device under test and what it holds.
type Disk struct {
	Device  blockdev.Device
	Content []byte // what Device reads as at the start, Size bytes. The suite owns it afterwards.
	// Reopen, if not nil, closes the device and opens what it was made of again, as another process would.
	Reopen func(t *testing.T) blockdev.Device
}

// Run tests disks of 64 KiB up to some MiB: that they do what blockdev.Device says, one operation after another and many
// at the same time. It says nothing of crashes and failures; see RunFaults. Each call of newDisk makes a disk; newDisk's
// own t.Cleanup closes it, as Reopen's does what that opens.
func Run(t *testing.T, newDisk func(t *testing.T) Disk) { suite(t, newDisk, report) }

// RunReadOnly tests disks that can't be written; newDisk is as in Run.
func RunReadOnly(t *testing.T, newDisk func(t *testing.T) Disk) { readOnlySuite(t, newDisk, report) }

// maker makes a new disk.
type maker func(t *testing.T) Disk

// A runner runs a check under a name, and does something with its error. Tests of the suite have one that wants errors.
type runner func(t *testing.T, name string, check func(t *testing.T) error)

func report(t *testing.T, name string, check func(t *testing.T) error) {
	t.Run(name, func(t *testing.T) {
		if err := check(t); err != nil {
			t.Error(err)
		}
	})
}

const (
	// seeds is how many random sequences there are of a kind; their seeds are the numbers below.
	seeds = 5
	// steps is how many operations a sequence has.
	steps = 150
	// largest is the length of the largest operation, in bytes.
	largest = 512 << 10
)

// seeded returns the numbers that follow from a seed, in a sequence of their own for each of what uses it.
func seeded(seed, use uint64) *rand.Rand { return rand.New(rand.NewPCG(seed, use)) }

func suite(t *testing.T, newDisk maker, run runner) {
	run(t, "what it is", func(t *testing.T) error { return describe(newDisk(t), false) })
	for _, c := range []struct {
		name  string
		check func(t *testing.T, d Disk) error
	}{
		{"ranges", outOfRange}, {"nothing", nothing}, {"zeros", zeros},
	} {
		run(t, c.name, func(t *testing.T) error { return c.check(t, newDisk(t)) })
	}
	run(t, "contents", func(t *testing.T) error { return contentsOf(t, newDisk(t), 0) })
	for seed := range uint64(seeds) {
		run(t, fmt.Sprintf("sequence/seed %d", seed), func(t *testing.T) error { return sequence(t, newDisk(t), seed) })
	}
	concurrentSuite(t, newDisk, run)
}

// work returns a worker on all of a disk.
func (d *Disk) work(seed uint64) *worker {
	return &worker{dev: d.Device, model: newModel(d.Content), rng: seeded(seed, 0), limit: largest}
}

// finish compares everything, also after a Flush, and after the disk was opened again.
func finish(t *testing.T, d Disk, w *worker) error {
	for _, do := range []func() error{w.check, w.flush, w.check} {
		if err := do(); err != nil {
			return err
		}
	}
	if d.Reopen == nil {
		return nil
	}
	w.dev = d.Reopen(t)
	if err := w.check(); err != nil {
		return fmt.Errorf("opened again: %w", err)
	}
	return nil
}

func describe(d Disk, readOnly bool) error {
	size, block := d.Device.Size(), d.Device.BlockSize()
	switch {
	case size != int64(len(d.Content)):
		return fmt.Errorf("its size is %d, not %d", size, len(d.Content))
	case block < blockdev.MinBlockSize || block&(block-1) != 0:
		return fmt.Errorf("its block size is %d", block)
	case size%int64(block) != 0:
		return fmt.Errorf("its size, %d, is no multiple of its block size, %d", size, block)
	case d.Device.ReadOnly() != readOnly:
		return fmt.Errorf("it says that read-only is %v", !readOnly)
	default:
		return nil
	}
}

// contentsOf reads, as a whole and in parts.
func contentsOf(t *testing.T, d Disk, seed uint64) error {
	w := d.work(seed)
	for range steps {
		if err := w.do(actRead); err != nil {
			return err
		}
	}
	return finish(t, d, w)
}

// sequence does random operations, and opens the disk again now and then.
func sequence(t *testing.T, d Disk, seed uint64) error {
	t.Logf("seed %d", seed)
	w := d.work(seed)
	again := seeded(seed, 1)
	for range steps {
		if err := w.random(mixSequence); err != nil {
			return err
		}
		if d.Reopen == nil || again.IntN(steps/5) > 0 {
			continue
		}
		if err := w.flush(); err != nil {
			return err
		}
		w.dev = d.Reopen(t)
	}
	return finish(t, d, w)
}

// zeros makes zeros of ranges around places where disks may change what they do, among bytes that are none.
func zeros(t *testing.T, d Disk) error {
	w := d.work(0)
	size := int64(len(d.Content))
	deltas := []int64{0, 1, 7, 511, 512, 513, 4095, 4096, 4097, 9000}
	places := []int64{0, size, size - size%blockBytes}
	for _, unit := range units {
		places = append(places, min(unit, size), size/unit*unit)
	}
	delta := func() int64 { return deltas[w.rng.IntN(len(deltas))] }
	for _, place := range places {
		around := extent{place - 3*blockBytes, place + 3*blockBytes}.clip(extent{0, size})
		for range 10 {
			for _, act := range []action{actDiscard, actZero} {
				e := extent{place - delta(), place + delta()}.clip(around)
				if err := w.zeroed(act, around, e); err != nil {
					return err
				}
			}
		}
	}
	// Everything; and once more what is zeros already.
	for range 2 {
		for _, act := range []action{actDiscard, actZero} {
			if err := w.zeroed(act, extent{100, min(size, largest)}, extent{0, size}); err != nil {
				return err
			}
			if err := w.change(act, change{extent: extent{1, size - 1}}); err != nil {
				return err
			}
		}
	}
	return finish(t, d, w)
}

// zeroed writes a range, makes another one zeros, and compares what there is.
func (w *worker) zeroed(act action, written, zeroed extent) error {
	if err := w.change(actWrite, change{written, randomBytes(w.rng, written.len())}); err != nil {
		return err
	}
	if err := w.change(act, change{extent: zeroed}); err != nil {
		return err
	}
	return w.read(written)
}
