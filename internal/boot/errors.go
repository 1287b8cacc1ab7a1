package boot

import (
	"errors"
	"fmt"
)

var (
	// ErrNotKernel says that a file is no kernel that Load knows.
	ErrNotKernel = errors.New("boot: not a kernel")
	// ErrUnsupportedKernel matches every *UnsupportedKernelError.
	ErrUnsupportedKernel = errors.New("boot: unsupported kernel")
	// ErrMalformed says that a kernel, or a Config, contradicts itself.
	ErrMalformed = errors.New("boot: malformed")
	// ErrTruncated says that a file ends before what its headers promise.
	ErrTruncated = errors.New("boot: truncated file")
	// ErrTooLarge matches every *TooLargeError.
	ErrTooLarge = errors.New("boot: too large")
	// ErrOverlap matches every *OverlapError.
	ErrOverlap = errors.New("boot: overlap")
	// ErrCmdline says that a command line can't be passed to a kernel.
	ErrCmdline = errors.New("boot: bad command line")
)

// UnsupportedKernelError is a kernel that lacks what this loader needs. It matches ErrUnsupportedKernel.
type UnsupportedKernelError struct{ What string }

func (e *UnsupportedKernelError) Error() string { return "boot: unsupported kernel: " + e.What }

// Is reports whether target is ErrUnsupportedKernel.
func (e *UnsupportedKernelError) Is(target error) bool { return target == ErrUnsupportedKernel }

// TooLargeError is something that does not fit; sizes are in bytes. It matches ErrTooLarge.
type TooLargeError struct {
	What       string
	Need, Have uint64
}

func (e *TooLargeError) Error() string {
	return fmt.Sprintf("boot: %s needs %d bytes, and there is room for %d", e.What, e.Need, e.Have)
}

// Is reports whether target is ErrTooLarge.
func (e *TooLargeError) Is(target error) bool { return target == ErrTooLarge }

// OverlapError is two things that want the same guest memory. It matches ErrOverlap.
type OverlapError struct {
	A, B           string
	ARange, BRange Range
}

func (e *OverlapError) Error() string {
	return fmt.Sprintf("boot: %s at %s overlaps %s at %s", e.A, e.ARange, e.B, e.BRange)
}

// Is reports whether target is ErrOverlap.
func (e *OverlapError) Is(target error) bool { return target == ErrOverlap }

// MemoryError is a failed write to guest memory; Err is what the io.WriterAt returned.
type MemoryError struct {
	What string
	GPA  uint64
	Err  error
}

func (e *MemoryError) Error() string {
	return fmt.Sprintf("boot: write %s to guest memory at %#x: %v", e.What, e.GPA, e.Err)
}

func (e *MemoryError) Unwrap() error { return e.Err }
