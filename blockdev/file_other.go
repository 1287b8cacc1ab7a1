//go:build !linux

package blockdev

import (
	"errors"
	"os"
)

func hostBlockSize(*os.File) (int, error) { return MinBlockSize, nil }

func syncData(f *os.File) error { return f.Sync() }

func punchHole(*os.File, int64, int64) error { return errors.ErrUnsupported }

func zeroRange(*os.File, int64, int64) error { return errors.ErrUnsupported }

// lockFile does nothing: disks are for machines, which are on Linux.
func lockFile(*os.File) error { return nil }

func syncDir(string) error { return nil }
