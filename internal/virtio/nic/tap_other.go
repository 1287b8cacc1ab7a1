//go:build !linux

package nic

import (
	"errors"
	"fmt"
)

// OpenTap fails with an error that wraps errors.ErrUnsupported: taps are a thing of Linux.
func OpenTap(name string) (Tap, error) {
	return nil, fmt.Errorf("nic: tap %q: %w", name, errors.ErrUnsupported)
}

// NewTap fails as OpenTap does.
func NewTap(fd int) (Tap, error) {
	return nil, fmt.Errorf("nic: tap on descriptor %d: %w", fd, errors.ErrUnsupported)
}
