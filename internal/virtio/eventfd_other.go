//go:build !linux

package virtio

import (
	"errors"
	"fmt"
)

// EventFD exists on Linux only.
type EventFD struct{ Bell }

// NewEventFD fails with an error that wraps errors.ErrUnsupported.
func NewEventFD() (*EventFD, error) {
	return nil, fmt.Errorf("virtio: eventfd: %w", errors.ErrUnsupported)
}

// FD is the file descriptor.
func (e *EventFD) FD() int { return -1 }
