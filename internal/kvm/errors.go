//go:build linux && amd64

package kvm

import (
	"errors"
	"fmt"
	"strings"
)

// Error is a KVM operation that the kernel refused, or that was not asked of
// it because its arguments were wrong.
type Error struct {
	// Op is the operation, as the kernel's documentation calls it, with what
	// it was about: "KVM_CREATE_VCPU 3".
	Op string
	// Err is the kernel's answer, a unix.Errno, or what is wrong with the
	// arguments.
	Err error
}

// Error implements error.
func (e *Error) Error() string { return "kvm: " + e.Op + ": " + e.Err.Error() }

// Unwrap returns Err.
func (e *Error) Unwrap() error { return e.Err }

// MSRError is a model specific register that the kernel refused to read or
// write. The registers before it in the list have been read or written.
type MSRError struct {
	// Op is KVM_GET_MSRS or KVM_SET_MSRS.
	Op string
	// Index is the register's number.
	Index uint32
	// Position is its place in the caller's list.
	Position int
}

// Error implements error.
func (e *MSRError) Error() string {
	return fmt.Sprintf("kvm: %s: register %#x (number %d of the list) was refused", e.Op, e.Index, e.Position)
}

// CapabilityError says that this host's KVM lacks capabilities. It is an
// errors.ErrUnsupported.
type CapabilityError struct {
	Missing []Cap
}

// Error implements error.
func (e *CapabilityError) Error() string {
	names := make([]string, len(e.Missing))
	for i, c := range e.Missing {
		names[i] = c.String()
	}
	return "kvm: this host's KVM lacks " + strings.Join(names, ", ") + ": a newer kernel may have it"
}

// Is reports whether target is errors.ErrUnsupported.
func (e *CapabilityError) Is(target error) bool { return target == errors.ErrUnsupported }

// Errors in arguments, found before the kernel is asked. They come wrapped in
// an *Error.
var (
	// ErrShortBuffer is a buffer smaller than what the kernel would read or write.
	ErrShortBuffer = errors.New("buffer too short")
	// ErrNoSlot is a memory slot that holds no region.
	ErrNoSlot = errors.New("no memory region in this slot")
	// ErrBadExit is an exit whose data does not lie within the kvm_run page.
	ErrBadExit = errors.New("exit data out of bounds")
	// ErrClosed is the use of an object after its Close.
	ErrClosed = errors.New("already closed")
)
