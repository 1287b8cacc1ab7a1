package blockdevtest

import (
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"testing"

	"golang.org/x/sync/errgroup"
)

const (
	writers        = 4
	readers        = 2
	stepsOfWriters = 200
)

func concurrentSuite(t *testing.T, newDisk maker, run runner) {
	for i, place := range []struct {
		name string
		at   int64
	}{{"start", 0}, {"64 KiB", 64 << 10}, {"128 KiB", 128 << 10}, {"1 MiB", 1 << 20}, {"end", math.MaxInt64}} {
		run(t, "concurrent/"+place.name, func(t *testing.T) error {
			d, rng := newDisk(t), seeded(uint64(i), 2)
			return concurrent(t, d, rng, cutClose(rng, around(place.at, int64(len(d.Content)))))
		})
	}
	run(t, "concurrent/blocks", func(t *testing.T) error {
		d, rng := newDisk(t), seeded(0, 6)
		return concurrent(t, d, rng, cutBlocks(around(64<<10, int64(len(d.Content)))))
	})
	run(t, "concurrent/everywhere", func(t *testing.T) error {
		d, rng := newDisk(t), seeded(0, 3)
		return concurrent(t, d, rng, cutWide(rng, int64(len(d.Content))))
	})
}

// around returns some blocks of a disk around a place, or at its end.
func around(place, size int64) extent {
	from := max(0, min(place-closeBytes/2, size-closeBytes)) &^ (blockBytes - 1)
	to := min(from+closeBytes, size)
	if size-to < blockBytes {
		to = size // with the last block, which may be a part of one
	}
	return extent{from, to}
}

// concurrent has writers work at the same time, each in pieces of its own, while readers read what nobody writes. A
// piece keeps what its writer made of it whatever happens to its neighbours.
func concurrent(t *testing.T, d Disk, rng *rand.Rand, pieces []extent) error {
	whole := newModel(d.Content)
	models := divide(rng, whole, pieces, writers+1)
	var writing, reading errgroup.Group
	stop := make(chan struct{})
	for i, m := range models[:writers] {
		w := &worker{dev: d.Device, model: m, rng: seeded(rng.Uint64(), uint64(i)), limit: largest}
		writing.Go(func() error {
			for range stepsOfWriters {
				if err := w.random(mixWriters); err != nil {
					return fmt.Errorf("writer %d: %w", i, err)
				}
			}
			return w.check()
		})
	}
	for i := range readers {
		w := &worker{dev: d.Device, model: models[writers], rng: seeded(rng.Uint64(), uint64(i)), limit: largest}
		reading.Go(func() error {
			for {
				if err := w.do(actRead); err != nil {
					return fmt.Errorf("a reader of what nobody writes: %w", err)
				}
				select {
				case <-stop:
					return nil
				default:
				}
			}
		})
	}
	err := writing.Wait()
	close(stop)
	if err := errors.Join(err, reading.Wait()); err != nil {
		return err
	}
	return finish(t, d, &worker{dev: d.Device, model: whole})
}
