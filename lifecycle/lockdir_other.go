//go:build !linux

package lifecycle

import (
	"errors"
	"fmt"
	"os"
)

// lockDir fails: sandboxes need KVM, and so Linux.
func lockDir(path string) (*os.File, error) {
	return nil, fmt.Errorf("lock %s: a manager needs Linux: %w", path, errors.ErrUnsupported)
}
