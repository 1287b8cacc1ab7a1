//go:build unix && !solaris && !illumos && !aix

package snapshot

import (
	"errors"
	"fmt"
	"os"
	"syscall"
)

// lockFile waits for the lock of an open file; closing the file releases it.
func lockFile(f *os.File, exclusive bool) error {
	how := syscall.LOCK_SH
	if exclusive {
		how = syscall.LOCK_EX
	}
	for {
		if err := syscall.Flock(int(f.Fd()), how); err != syscall.EINTR {
			return err
		}
	}
}

// syncDir waits until the names in dir are on stable storage. The error wraps errors.ErrUnsupported where directories can't be
// synced.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	err = d.Sync()
	if errors.Is(err, syscall.EINVAL) {
		err = fmt.Errorf("%w: %w", errors.ErrUnsupported, err)
	}
	return err
}
