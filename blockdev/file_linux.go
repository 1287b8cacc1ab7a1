package blockdev

import (
	"errors"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
)

// hostBlockSize is the logical block size of a block device, MinBlockSize for a file.
func hostBlockSize(f *os.File) (int, error) {
	info, err := f.Stat()
	if err != nil || info.Mode()&fs.ModeDevice == 0 {
		return MinBlockSize, err
	}
	size := 0
	err = control(f, func(fd int) (err error) {
		size, err = unix.IoctlGetInt(fd, unix.BLKSSZGET)
		return err
	})
	return size, err
}

// syncData makes a file's contents durable. Its size does not change, so that fdatasync is enough.
func syncData(f *os.File) error { return control(f, unix.Fdatasync) }

// punchHole takes the space of a range away. An error that wraps errors.ErrUnsupported says to write zeros instead.
func punchHole(f *os.File, off, n int64) error {
	return allocate(f, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
}

// zeroRange zeroes a range in place; its errors are those of punchHole.
func zeroRange(f *os.File, off, n int64) error {
	return allocate(f, unix.FALLOC_FL_ZERO_RANGE|unix.FALLOC_FL_KEEP_SIZE, off, n)
}

func allocate(f *os.File, mode uint32, off, n int64) error {
	err := control(f, func(fd int) error { return unix.Fallocate(fd, mode, off, n) })
	// A block device says EINVAL to ranges that are not aligned to its blocks.
	if errors.Is(err, unix.EINVAL) {
		return errors.ErrUnsupported
	}
	return err
}

// lockFile takes the lock of an open file, which ends with the file: ErrInUse if somebody has it.
func lockFile(f *os.File) error {
	err := control(f, func(fd int) error { return unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB) })
	if errors.Is(err, unix.EWOULDBLOCK) {
		return ErrInUse
	}
	return err
}

// syncDir makes the names in a directory durable.
func syncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// control makes a system call while f can't be closed.
func control(f *os.File, call func(fd int) error) error {
	conn, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var cerr error
	err = conn.Control(func(fd uintptr) {
		for {
			if cerr = call(int(fd)); !errors.Is(cerr, unix.EINTR) {
				return
			}
		}
	})
	if err != nil {
		return os.ErrClosed // the only reason that there is
	}
	return cerr
}
