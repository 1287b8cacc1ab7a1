package blockdev

import (
	"errors"
	"fmt"
)

var (
	// ErrReadOnly says that a disk was to be changed that was opened for reading only.
	ErrReadOnly = errors.New("blockdev: the disk is read-only")
	// ErrNotDisk says that a file can't be a disk: what it is, or its size, does not fit.
	ErrNotDisk = errors.New("blockdev: not usable as a disk")
	// ErrOverlay says that a file is no overlay, or a damaged one.
	ErrOverlay = errors.New("blockdev: not a valid overlay")
	// ErrVersion says that an overlay was made by a newer version of this package.
	ErrVersion = errors.New("blockdev: the overlay needs a newer version of this program")
	// ErrInUse says that an overlay is open already, here or in another process.
	ErrInUse = errors.New("blockdev: the overlay is in use")
	// ErrBase says that a base image is not the one that a disk was made on; see BaseError.
	ErrBase = errors.New("blockdev: not the disk's base image")
	// ErrFrozen says that there is a Still of an overlay already.
	ErrFrozen = errors.New("blockdev: the overlay is frozen already; close its Still first")
	// ErrBlocks says that ranges are not whole blocks, ascending and apart.
	ErrBlocks = errors.New("blockdev: not whole blocks in ascending order")
	// ErrNotHeld says that a block does not belong to a Still, or has been read before.
	ErrNotHeld = errors.New("blockdev: the block is not held")
)

// RangeError says that a range is not within the disk.
type RangeError struct {
	Op     string
	Off, N int64
	Size   int64 // of the disk
}

func (e *RangeError) Error() string {
	return fmt.Sprintf("blockdev: %s %d bytes at %d of a disk of %d bytes", e.Op, e.N, e.Off, e.Size)
}

// CheckRange returns a *RangeError unless n bytes at off are within a disk of size bytes.
func CheckRange(op string, off, n, size int64) error {
	if off < 0 || n < 0 || off > size || n > size-off {
		return &RangeError{Op: op, Off: off, N: n, Size: size}
	}
	return nil
}

// BaseError says that the contents of a base image are not those that a disk was made on.
// It matches ErrBase.
type BaseError struct {
	Path       string
	Want, Have Identity
}

func (e *BaseError) Error() string {
	if e.Want.Size != e.Have.Size {
		return fmt.Sprintf("%v: %s has %d bytes, want %d; give the image that it was made on", ErrBase, e.Path, e.Have.Size, e.Want.Size)
	}
	return fmt.Sprintf("%v: the contents of %s have the identity %x, want %x; give the image that it was made on, unchanged",
		ErrBase, e.Path, e.Have.SHA256, e.Want.SHA256)
}

// Is makes it match ErrBase.
func (e *BaseError) Is(target error) bool { return target == ErrBase }
