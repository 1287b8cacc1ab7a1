package snapshot

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// unnamedFile is a stagedFile that has no name at all before it is published
// (open(2), O_TMPFILE): whatever happens, the kernel cleans up.
type unnamedFile struct {
	*os.File
	done            bool
	written, pushed int64 // bytes, and those that the kernel was told to write out
}

// pushBytes is how much is written before the kernel is told to begin moving it
// to the disk, so that Sync finds little left to wait for.
const pushBytes = 8 << 20

// stageUnnamed returns an error wrapping errors.ErrUnsupported if the file
// system of dir has no unnamed files, or /proc is not there to name them later.
func stageUnnamed(dir string) (stagedFile, error) {
	f, err := os.OpenFile(dir, unix.O_TMPFILE|os.O_RDWR, fileMode)
	switch {
	// An old kernel takes the flag for O_DIRECTORY alone, and says EISDIR.
	case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EISDIR):
		return nil, fmt.Errorf("%w: %w", errors.ErrUnsupported, err)
	case err != nil:
		return nil, err
	}
	u := &unnamedFile{File: f}
	if _, err := os.Stat(u.procPath()); err != nil {
		f.Close()
		return nil, fmt.Errorf("%w: %w", errors.ErrUnsupported, err)
	}
	return u, nil
}

func (f *unnamedFile) Write(p []byte) (int, error) {
	n, err := f.File.Write(p)
	f.written += int64(n)
	if todo := f.written - f.pushed; todo >= pushBytes {
		// Only a hint: Sync will report what goes wrong.
		_ = unix.SyncFileRange(int(f.Fd()), f.pushed, todo, unix.SYNC_FILE_RANGE_WRITE)
		f.pushed = f.written
	}
	return n, err
}

func (f *unnamedFile) procPath() string { return fmt.Sprintf("/proc/self/fd/%d", f.Fd()) }

func (f *unnamedFile) Publish(path string) error {
	if f.done {
		return ErrClosed
	}
	if err := f.link(path); err != nil {
		return err
	}
	f.done = true
	_ = f.Close() // what was synced and has its name is there
	return nil
}

// Replace needs a name in between, as link(2) replaces nothing.
func (f *unnamedFile) Replace(path string) error {
	if f.done {
		return ErrClosed
	}
	temp := filepath.Join(filepath.Dir(path), tempPrefix+NewID().String())
	if err := f.link(temp); err != nil {
		return err
	}
	if err := os.Rename(temp, path); err != nil {
		return errors.Join(err, os.Remove(temp))
	}
	f.done = true
	f.Close() // nothing is to be written any more: an error here would say that the name was not given
	return nil
}

// link gives the file a name, which must not exist.
func (f *unnamedFile) link(path string) error {
	err := unix.Linkat(unix.AT_FDCWD, f.procPath(), unix.AT_FDCWD, path, unix.AT_SYMLINK_FOLLOW)
	if errors.Is(err, unix.EEXIST) {
		err = fmt.Errorf("%w: %w", ErrExists, err)
	}
	if err != nil {
		return &fs.PathError{Op: "publish", Path: path, Err: err}
	}
	return nil
}

func (f *unnamedFile) Discard() error {
	if f.done {
		return nil
	}
	f.done = true
	return f.Close()
}
