//go:build !linux

package snapshot

import "errors"

func stageUnnamed(string) (stagedFile, error) { return nil, errors.ErrUnsupported }
