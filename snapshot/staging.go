package snapshot

import (
	"crypto/rand"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"
)

// stagedFile is a file being written that nobody sees under its final name.
type stagedFile interface {
	io.Writer
	Sync() error
	// Publish gives the file its final name, which must not exist, and closes it.
	Publish(path string) error
	// Replace gives the file the name of another, which loses it in the same instant, and closes it.
	Replace(path string) error
	// Discard removes the file, unless it was published, and closes it. It may
	// be called again.
	Discard() error
}

// fileSystem is what writing and rekeying need of a file system; the tests put faults in.
type fileSystem interface {
	Stage(dir string) (stagedFile, error)
	SyncDir(dir string) error
	Remove(path string) error
	// Overwrite puts noise over all bytes of a file from an offset on, and syncs it.
	Overwrite(f *os.File, from int64) error
}

const (
	fileMode = 0o600
	dirMode  = 0o700

	tempPrefix    = ".tmp-"
	deletedPrefix = ".deleted-"

	// staleTemp is the age at which a temporary file can't belong to a living
	// writer any more.
	staleTemp = 24 * time.Hour
)

// osFiles is the operating system's file system.
type osFiles struct{}

func (osFiles) Stage(dir string) (stagedFile, error) {
	f, err := stageUnnamed(dir)
	if errors.Is(err, errors.ErrUnsupported) {
		return stageNamed(dir)
	}
	return f, err
}

func (osFiles) SyncDir(dir string) error { return syncDir(dir) }
func (osFiles) Remove(path string) error { return os.Remove(path) }

func (osFiles) Overwrite(f *os.File, from int64) error {
	fi, err := f.Stat()
	if err != nil {
		return err
	}
	noise := make([]byte, 64<<10)
	for at := from; at < fi.Size(); at += int64(len(noise)) {
		_, _ = rand.Read(noise) // never fails, by its documentation
		if _, err := f.WriteAt(noise[:min(int64(len(noise)), fi.Size()-at)], at); err != nil {
			return err
		}
	}
	return f.Sync()
}

// namedFile is a stagedFile under a temporary name, for where the operating
// system or the file system has no unnamed files.
type namedFile struct {
	*os.File
	done bool
}

func stageNamed(dir string) (stagedFile, error) {
	path := filepath.Join(dir, tempPrefix+NewID().String())
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, fileMode)
	if err != nil {
		return nil, err
	}
	return &namedFile{File: f}, nil
}

func (f *namedFile) Publish(path string) error {
	if f.done {
		return ErrClosed
	}
	if _, err := os.Lstat(path); err == nil {
		return &fs.PathError{Op: "publish", Path: path, Err: ErrExists}
	}
	return f.rename(path)
}

func (f *namedFile) Replace(path string) error {
	if f.done {
		return ErrClosed
	}
	return f.rename(path)
}

func (f *namedFile) rename(path string) error {
	// Windows renames only what is closed.
	if err := f.Close(); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return err
	}
	f.done = true
	return nil
}

func (f *namedFile) Discard() error {
	if f.done {
		return nil
	}
	f.done = true
	f.Close()
	return os.Remove(f.Name())
}
