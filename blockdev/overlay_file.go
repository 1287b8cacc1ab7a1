package blockdev

import (
	"errors"
	"fmt"
	"os"
)

// overlayFile is the storage of an overlay in a file of the host.
type overlayFile struct{ *os.File }

func (f overlayFile) Sync() error                  { return syncData(f.File) }
func (f overlayFile) PunchHole(off, n int64) error { return punchHole(f.File, off, n) }

// createOverlayFile makes a file for the user alone.
func createOverlayFile(path string) (overlayFile, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return overlayFile{}, fmt.Errorf("blockdev: make overlay: %w", err)
	}
	if err := lockFile(f); err != nil {
		return overlayFile{}, errors.Join(fmt.Errorf("blockdev: make overlay %s: %w", path, err), f.Close(), removeFile(path))
	}
	return overlayFile{f}, nil
}

// openOverlayFile opens a file that nobody else has open as an overlay.
func openOverlayFile(path string) (overlayFile, error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return overlayFile{}, fmt.Errorf("blockdev: open overlay: %w", err)
	}
	if err := lockFile(f); err != nil {
		return overlayFile{}, errors.Join(fmt.Errorf("blockdev: open overlay %s: %w", path, err), f.Close())
	}
	return overlayFile{f}, nil
}

func removeFile(path string) error {
	if err := os.Remove(path); err != nil {
		return fmt.Errorf("blockdev: %w", err)
	}
	return nil
}

// OverlayInfo says what is in the header of an overlay's file.
type OverlayInfo struct {
	Size      int64 // of the disk, in bytes
	BlockSize int   // in bytes
	Lower     Lower
}

// ReadOverlay reads the header of an overlay's file, which may be in use. Errors: ErrOverlay if it is none, ErrVersion.
func ReadOverlay(path string) (OverlayInfo, error) {
	f, err := os.Open(path)
	if err != nil {
		return OverlayInfo{}, fmt.Errorf("blockdev: %w", err)
	}
	defer f.Close()
	head, err := readOverlayHeader(f)
	if err != nil {
		return OverlayInfo{}, fmt.Errorf("%s: %w", path, err)
	}
	return OverlayInfo{head.size, int(head.blockSize()), head.lower}, nil
}
