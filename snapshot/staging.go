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

// fileSystem is what a Store needs of a file system, all of it: the tests put faults in, and lose what was not synced.
type fileSystem interface {
	Open(path string) (Blob, error)
	ReadDir(dir string) ([]fs.DirEntry, error)
	Stat(path string) (fs.FileInfo, error)
	Mkdir(dir string) error
	Stage(dir string) (stagedFile, error)
	// Overwrite opens a file to read it and to replace bytes of it.
	Overwrite(path string) (overwrittenFile, error)
	Rename(from, to string) error
	Remove(path string) error
	// SyncDir waits until the names in a directory are on stable storage.
	SyncDir(dir string) error
	// Lock waits for the lock of a file, which is made if need be; Close releases it.
	Lock(path string, exclusive bool) (io.Closer, error)
}

// overwrittenFile is a file of which bytes are being replaced in place.
type overwrittenFile interface {
	Blob
	io.WriterAt
	Stat() (fs.FileInfo, error)
	Sync() error
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

func (osFiles) ReadDir(dir string) ([]fs.DirEntry, error) { return os.ReadDir(dir) }
func (osFiles) Stat(path string) (fs.FileInfo, error)     { return os.Stat(path) }
func (osFiles) Mkdir(dir string) error                    { return os.Mkdir(dir, dirMode) }
func (osFiles) SyncDir(dir string) error                  { return syncDir(dir) }
func (osFiles) Rename(from, to string) error              { return os.Rename(from, to) }
func (osFiles) Remove(path string) error                  { return os.Remove(path) }

func (osFiles) Open(path string) (Blob, error) { return openSized(path, os.O_RDONLY) }

func (osFiles) Overwrite(path string) (overwrittenFile, error) { return openSized(path, os.O_RDWR) }

func (osFiles) Lock(path string, exclusive bool) (io.Closer, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, fileMode)
	if err != nil {
		return nil, err
	}
	if err := lockFile(f, exclusive); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// sizedFile is an open file that knows its size.
type sizedFile struct {
	*os.File
	size int64
}

func (f sizedFile) Size() int64 { return f.size }

func openSized(path string, flag int) (overwrittenFile, error) {
	f, err := os.OpenFile(path, flag, 0)
	if err != nil {
		return nil, err
	}
	fi, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, err
	}
	return sizedFile{f, fi.Size()}, nil
}

// overwrite puts noise over all bytes of a file from an offset on, and waits until that is on stable storage.
func overwrite(f overwrittenFile, from int64) error {
	noise := make([]byte, 64<<10)
	for at := from; at < f.Size(); at += int64(len(noise)) {
		_, _ = rand.Read(noise) // never fails, by its documentation
		if _, err := f.WriteAt(noise[:min(int64(len(noise)), f.Size()-at)], at); err != nil {
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
