package virtio

import (
	"errors"
	"fmt"
)

var (
	// ErrProtocol is wrapped by every error that says how a driver broke the protocol. The device needs a
	// reset then; the rest of the machine does not care.
	ErrProtocol = errors.New("virtio: the driver broke the protocol")
	// ErrState is wrapped by every error about a State that the device can't have been in, or an encoding
	// of one.
	ErrState = errors.New("virtio: invalid device state")
	// ErrBusy says that a call needs a quiesced device: call Quiesce first.
	ErrBusy = errors.New("virtio: the device is not quiesced")
	// ErrClosed says that the device was closed.
	ErrClosed = errors.New("virtio: the device is closed")
)

// StateVersionError says that a State was encoded by a newer version of the project.
type StateVersionError struct {
	Version, Newest uint16
}

func (e *StateVersionError) Error() string {
	return fmt.Sprintf("virtio: device state has version %d, and %d is the newest known here: use a newer version", e.Version, e.Newest)
}

// ProtocolErrorf returns an error that wraps ErrProtocol.
func ProtocolErrorf(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrProtocol, fmt.Sprintf(format, args...))
}

// StateErrorf returns an error that wraps ErrState.
func StateErrorf(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrState, fmt.Sprintf(format, args...))
}
