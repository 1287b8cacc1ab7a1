package vsock

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"syscall"
)

// maxPath leaves room, in the 103 bytes that all systems allow for the address of a unix socket, for "_<port>" and
// for the directory in which the socket is made.
const maxPath = 88

// listener is the socket at Config.Path.
type listener struct {
	*net.UnixListener
	path string
	file fs.FileInfo // to tell our socket from one that took its place
}

// listen makes a socket at path that only its owner can use. A socket gets its permissions from the umask, which
// belongs to the whole process; so this one is made in a directory of its own that nobody else can enter, gets its
// mode there, and then its name by a link, which fails if the name is taken.
func listen(path string) (_ *listener, err error) {
	dir, err := os.MkdirTemp(filepath.Dir(path), ".v")
	if err != nil {
		return nil, fmt.Errorf("vsock: directory for the socket %s: %w", path, err)
	}
	// What it leaves behind, should it fail, is a name without use.
	defer func() { _ = os.RemoveAll(dir) }()
	hidden := filepath.Join(dir, "s")
	socket, err := net.ListenUnix("unix", &net.UnixAddr{Name: hidden, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("vsock: listen for %s: %w", path, err)
	}
	socket.SetUnlinkOnClose(false)
	defer func() {
		if err != nil {
			socket.Close()
		}
	}()
	if err := os.Chmod(hidden, 0o600); err != nil {
		return nil, fmt.Errorf("vsock: mode of the socket %s: %w", path, err)
	}
	if err := removeStale(path, filepath.Join(dir, "old")); err != nil {
		return nil, err
	}
	if err := os.Link(hidden, path); errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("%w: another process has just taken %s", ErrInUse, path)
	} else if err != nil {
		return nil, fmt.Errorf("vsock: name the socket %s: %w", path, err)
	}
	file, err := os.Lstat(path)
	if err != nil {
		return nil, fmt.Errorf("vsock: the socket %s: %w", path, err)
	}
	return &listener{socket, path, file}, nil
}

// removeStale removes the socket that a dead process left at path. Another process may do the same: so it is moved
// aside first, and looked at again.
func removeStale(path, aside string) error {
	if free, err := checkDead(path); free || err != nil {
		return err
	}
	if err := os.Rename(path, aside); errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return fmt.Errorf("vsock: remove the stale socket %s: %w", path, err)
	}
	_, err := checkDead(aside)
	if err != nil {
		// It is alive after all: one that was made in between. If its name is taken again, it is not ours to replace.
		if back := os.Link(aside, path); back != nil && !errors.Is(back, fs.ErrExist) {
			return fmt.Errorf("%w (and putting it back failed: %w)", err, back)
		}
	}
	return err
}

// checkDead reports whether nothing is at path, and fails unless that is so or nobody listens on the socket there.
func checkDead(path string) (free bool, err error) {
	file, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return true, nil
	}
	if err != nil {
		return false, fmt.Errorf("vsock: look at %s: %w", path, err)
	}
	if file.Mode().Type() != fs.ModeSocket {
		return false, fmt.Errorf("%w: %s is not a socket: remove it or choose another path", ErrInUse, path)
	}
	c, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: path, Net: "unix"})
	switch {
	case err == nil:
		c.Close()
		return false, fmt.Errorf("%w: a process listens on %s: choose another path", ErrInUse, path)
	case errors.Is(err, syscall.ECONNREFUSED):
		return false, nil
	}
	return false, fmt.Errorf("%w: %s: %w", ErrInUse, path, err)
}

// Close also removes the socket's name, unless that is another socket's by now. It looks before it closes: as long as
// the socket is open no other file can have its identity.
func (l *listener) Close() error {
	var err error
	if file, statErr := os.Lstat(l.path); statErr == nil && os.SameFile(file, l.file) {
		err = os.Remove(l.path)
	}
	return errors.Join(err, l.UnixListener.Close())
}
