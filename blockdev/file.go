package blockdev

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"sync"
)

// Options are the choices for a file. The zero value is a good choice.
type Options struct {
	// ReadOnly opens the file for reading only.
	ReadOnly bool
	// BlockSize is the block size that the disk claims. 0 is the host device's own, or MinBlockSize for a file.
	BlockSize int
}

// File is a Device whose bytes are those of a raw image file or of a block device of the host. Use OpenFile.
type File struct {
	file      *os.File
	size      int64
	blockSize int
	readOnly  bool

	mu       sync.Mutex
	flushErr error // of the first Flush that failed
}

// OpenFile opens a raw image or a block device. Its size must be a multiple of the block size, and stays what it is: only
// this File should change it until Close. Two machines must not write to one file; nothing here prevents that.
func OpenFile(path string, opts Options) (*File, error) {
	// Looked at before it is opened, since opening a pipe would block.
	if info, err := os.Stat(path); err != nil {
		return nil, fmt.Errorf("blockdev: %w", err)
	} else if !isDisk(info.Mode()) {
		return nil, fmt.Errorf("%w: %s is %v; give a regular file or a block device", ErrNotDisk, path, info.Mode())
	}
	flag := os.O_RDWR
	if opts.ReadOnly {
		flag = os.O_RDONLY
	}
	file, err := os.OpenFile(path, flag, 0)
	if err != nil {
		return nil, fmt.Errorf("blockdev: %w", err)
	}
	d := &File{file: file, blockSize: opts.BlockSize, readOnly: opts.ReadOnly}
	if err := d.measure(); err != nil {
		_ = file.Close()
		return nil, err
	}
	return d, nil
}

func isDisk(m fs.FileMode) bool {
	return m.IsRegular() || m&fs.ModeDevice != 0 && m&fs.ModeCharDevice == 0
}

// measure finds out the size and the block size.
func (d *File) measure() error {
	// The end of a block device is found in this way too, while Stat says 0.
	size, err := d.file.Seek(0, io.SeekEnd)
	if err != nil {
		return fmt.Errorf("blockdev: size of %s: %w", d.file.Name(), err)
	}
	if d.blockSize == 0 {
		if d.blockSize, err = hostBlockSize(d.file); err != nil {
			return fmt.Errorf("blockdev: block size of %s: %w", d.file.Name(), err)
		}
	}
	if d.blockSize < MinBlockSize || d.blockSize&(d.blockSize-1) != 0 {
		return fmt.Errorf("%w: %s: block size %d is no power of two from %d on", ErrNotDisk, d.file.Name(), d.blockSize, MinBlockSize)
	}
	if size == 0 || size%int64(d.blockSize) != 0 {
		return fmt.Errorf("%w: %s has %d bytes, which is no positive multiple of the block size %d: extend it",
			ErrNotDisk, d.file.Name(), size, d.blockSize)
	}
	d.size = size
	return nil
}

// Size implements Device.
func (d *File) Size() int64 { return d.size }

// BlockSize implements Device.
func (d *File) BlockSize() int { return d.blockSize }

// ReadOnly implements Device.
func (d *File) ReadOnly() bool { return d.readOnly }

// ReadAt implements Device. A file that somebody made shorter is io.ErrUnexpectedEOF.
func (d *File) ReadAt(p []byte, off int64) (int, error) {
	if err := CheckRange("read", off, int64(len(p)), d.size); err != nil {
		return 0, err
	}
	n, err := d.file.ReadAt(p, off)
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return n, d.wrap("read", off, int64(len(p)), err)
}

// WriteAt implements Device.
func (d *File) WriteAt(p []byte, off int64) (int, error) {
	if err := d.writable("write", off, int64(len(p))); err != nil {
		return 0, err
	}
	n, err := d.file.WriteAt(p, off)
	return n, d.wrap("write", off, int64(len(p)), err)
}

// Discard implements Device.
func (d *File) Discard(off, n int64) error { return d.zero("discard", off, n, punchHole) }

// WriteZeroes implements Device.
func (d *File) WriteZeroes(off, n int64) error { return d.zero("write zeroes to", off, n, zeroRange) }

// zero asks the file system first, and writes zeros if that can't do it.
func (d *File) zero(op string, off, n int64, ask func(f *os.File, off, n int64) error) error {
	if err := d.writable(op, off, n); err != nil || n == 0 {
		return err
	}
	err := ask(d.file, off, n)
	if errors.Is(err, errors.ErrUnsupported) {
		err = d.fill(off, n)
	}
	return d.wrap(op, off, n, err)
}

var zeros [64 << 10]byte

func (d *File) fill(off, n int64) error {
	for n > 0 {
		k, err := d.file.WriteAt(zeros[:min(n, int64(len(zeros)))], off)
		if err != nil {
			return err
		}
		off, n = off+int64(k), n-int64(k)
	}
	return nil
}

// Flush implements Device. Once it has failed it fails for good: the kernel may have dropped what it could not write, and
// a later sync would know nothing of that. Open the file anew to see what is there.
func (d *File) Flush() error {
	if d.readOnly {
		return nil
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.flushErr == nil {
		if err := syncData(d.file); err != nil {
			d.flushErr = fmt.Errorf("blockdev: flush %s: %w", d.file.Name(), err)
		}
	}
	return d.flushErr
}

// Close gives the file back, without a Flush. Calls after it fail with os.ErrClosed.
func (d *File) Close() error { return d.file.Close() }

func (d *File) writable(op string, off, n int64) error {
	if d.readOnly {
		return fmt.Errorf("%w: %s %d bytes at %d of %s", ErrReadOnly, op, n, off, d.file.Name())
	}
	return CheckRange(op, off, n, d.size)
}

func (d *File) wrap(op string, off, n int64, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("blockdev: %s %d bytes at %d of %s: %w", op, n, off, d.file.Name(), err)
}
