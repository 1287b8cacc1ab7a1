// Package newfile makes files that have their name when they are complete and durable, and not before.
package newfile

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
)

// Create has fill write a new file, for the user alone, and then gives it the name path, durably. After an error there is nothing
// of it; an error that wraps fs.ErrExist says that the name is taken. A process that is killed meanwhile may leave a file in
// the same directory whose name begins with ".tmp-".
func Create(path string, fill func(f *os.File) error) error {
	if err := absent(path); err != nil { // only to fail early: name finds out for good
		return err
	}
	if err := write(path, fill, name); err != nil {
		return err
	}
	if err := syncDir(filepath.Dir(path)); err != nil {
		return errors.Join(err, os.Remove(path))
	}
	return nil
}

// Replace is Create for a name that may be taken: what has it loses it in the same instant. After an error the file that had it is there, or
// the new one is, complete, if only the name could not be made durable.
func Replace(path string, fill func(f *os.File) error) error {
	if err := write(path, fill, os.Rename); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

// write makes a file under another name, and then names it.
func write(path string, fill func(f *os.File) error, name func(temp, path string) error) (err error) {
	f, err := os.CreateTemp(filepath.Dir(path), ".tmp-") // 0600
	if err != nil {
		return err
	}
	defer func() {
		if rerr := os.Remove(f.Name()); !errors.Is(rerr, fs.ErrNotExist) {
			err = errors.Join(err, rerr)
		}
	}()
	err = fill(f)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil { // Windows renames only what is closed
		return err
	}
	return name(f.Name(), path)
}

// absent returns an error unless nothing has a name.
func absent(path string) error {
	_, err := os.Lstat(path)
	if err == nil {
		return &fs.PathError{Op: "create", Path: path, Err: fs.ErrExist}
	}
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// name gives a file a name that must be free.
func name(temp, path string) error {
	// A link never replaces a file that came into being meanwhile, as a rename does; but not every file system has links.
	err := os.Link(temp, path)
	if err == nil {
		_ = os.Remove(temp) // before the directory is synced; write tries again
	}
	if err == nil || errors.Is(err, fs.ErrExist) {
		return err
	}
	if err := absent(path); err != nil {
		return err
	}
	return os.Rename(temp, path)
}

// syncDir makes the names in a directory durable.
func syncDir(dir string) error {
	if runtime.GOOS == "windows" { // which has no such call
		return nil
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
