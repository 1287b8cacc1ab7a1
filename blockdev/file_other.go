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
