package blockdevtest

import (
	"errors"
	"fmt"
	"testing"

	"golang.org/x/sync/errgroup"

	"github.com/cryovisor/cryovisor/blockdev"
)

func readOnlySuite(t *testing.T, newDisk maker, run runner) {
	run(t, "what it is", func(t *testing.T) error { return describe(newDisk(t), true) })
	run(t, "contents", func(t *testing.T) error { return contentsOf(t, newDisk(t), 0) })
	run(t, "changes", func(t *testing.T) error { return refusesChanges(t, newDisk(t)) })
	run(t, "ranges", func(t *testing.T) error {
		d := newDisk(t)
		for _, r := range outsideOf(int64(len(d.Content))) {
			if err := wrongRange(d.Device, reading, r.off, r.n); err != nil {
				return err
			}
		}
		return nil
	})
	run(t, "concurrent", func(t *testing.T) error {
		d := newDisk(t)
		var g errgroup.Group
		for seed := range uint64(writers) {
			g.Go(func() error { return contentsOf(t, Disk{Device: d.Device, Content: d.Content}, seed) })
		}
		return g.Wait()
	})
}

func refusesChanges(t *testing.T, d Disk) error {
	size := int64(len(d.Content))
	for _, e := range []extent{{0, 1}, {0, size}, {511, 5000}, {size - 1, size}} {
		for _, c := range changing {
			if err := c.do(d.Device, e.off, e.len()); !errors.Is(err, blockdev.ErrReadOnly) {
				return fmt.Errorf("%s %d bytes at %d: not ErrReadOnly: %w", c.name, e.len(), e.off, unexpected(err))
			}
		}
	}
	return finish(t, d, d.work(0))
}
