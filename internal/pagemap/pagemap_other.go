//go:build !(linux && amd64)

package pagemap

import (
	"errors"
	"fmt"
)

// A Map does not exist on this system: Open fails.
type Map struct{}

// Open returns an error that matches errors.ErrUnsupported.
func Open() (*Map, error) { return nil, fmt.Errorf("pagemap: %w", errors.ErrUnsupported) }

// Close does nothing.
func (m *Map) Close() error { return nil }

// Private returns an error that matches errors.ErrUnsupported.
func (m *Map) Private(start, end uintptr) ([]Region, error) { return nil, errors.ErrUnsupported }

// Mapped returns an error that matches errors.ErrUnsupported.
func (m *Map) Mapped(start, end uintptr) ([]Region, error) { return nil, errors.ErrUnsupported }
