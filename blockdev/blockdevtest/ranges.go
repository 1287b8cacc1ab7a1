package blockdevtest

import (
	"errors"
	"fmt"
	"math"
	"testing"

	"github.com/cryovisor/cryovisor/blockdev"
)

// call is an operation on a disk by its name.
type call struct {
	name string
	do   func(d blockdev.Device, off, n int64) error
}

var reading = call{"read", func(d blockdev.Device, off, n int64) error {
	_, err := d.ReadAt(make([]byte, n), off)
	return err
}}

var changing = []call{
	{"write", func(d blockdev.Device, off, n int64) error {
		_, err := d.WriteAt(make([]byte, n), off)
		return err
	}},
	{"discard", blockdev.Device.Discard},
	{"write zeroes", blockdev.Device.WriteZeroes},
}

// wrongRange returns an error unless a call says that its range is not within the disk.
func wrongRange(d blockdev.Device, c call, off, n int64) error {
	err := c.do(d, off, n)
	var wrong *blockdev.RangeError
	if !errors.As(err, &wrong) {
		return fmt.Errorf("%s %d bytes at %d of %d: not a RangeError: %w", c.name, n, off, d.Size(), unexpected(err))
	}
	if wrong.Off != off || wrong.N != n || wrong.Size != d.Size() {
		return fmt.Errorf("%s %d bytes at %d of %d: it says %d at %d of %d", c.name, n, off, d.Size(),
			wrong.N, wrong.Off, wrong.Size)
	}
	return nil
}

// unexpected returns an error also where there was none.
func unexpected(err error) error {
	if err == nil {
		return errors.New("no error")
	}
	return err
}

// outsideOf returns ranges that are not within a disk.
func outsideOf(size int64) []struct{ off, n int64 } {
	return []struct{ off, n int64 }{
		{-1, 0},
		{-1, 1},
		{-512, 1024},
		{0, size + 1},
		{1, size},
		{size - 1, 2},
		{size - 512, 1024},
		{size, 1},
		{size + 1, 0},
		{size + 4096, 512},
		{math.MaxInt64, 1},
		{math.MaxInt64 - 511, 512},
		{math.MinInt64, 16},
	}
}

// outOfRange calls everything with ranges that are not within the disk, and sees that nothing has changed.
func outOfRange(t *testing.T, d Disk) error {
	size := int64(len(d.Content))
	for _, r := range outsideOf(size) {
		for _, c := range append([]call{reading}, changing...) {
			if err := wrongRange(d.Device, c, r.off, r.n); err != nil {
				return err
			}
		}
	}
	for _, r := range []struct{ off, n int64 }{
		{0, -1}, {1, -1}, {size, -size}, {0, math.MinInt64}, {-1, math.MinInt64}, {1, math.MaxInt64}, {size, math.MaxInt64},
	} {
		for _, c := range changing[1:] {
			if err := wrongRange(d.Device, c, r.off, r.n); err != nil {
				return err
			}
		}
	}
	return finish(t, d, d.work(0))
}

// nothing calls everything with no bytes, which does nothing.
func nothing(t *testing.T, d Disk) error {
	size := int64(len(d.Content))
	for _, off := range []int64{0, 1, 4096, size - 1, size} {
		for _, c := range append([]call{reading}, changing...) {
			if err := c.do(d.Device, off, 0); err != nil {
				return fmt.Errorf("%s 0 bytes at %d of %d: %w", c.name, off, size, err)
			}
		}
	}
	return finish(t, d, d.work(0))
}
