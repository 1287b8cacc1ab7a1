// Package qcow2 is disks in the image format of QEMU: reading images, and writing the content of any disk as a new image.
package qcow2

import (
	"compress/flate"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"sync/atomic"

	reader "github.com/lima-vm/go-qcow2reader/image/qcow2"

	"github.com/cryovisor/cryovisor/blockdev"
)

// Image is a read-only blockdev.Device with the active state of a qcow2 image; internal snapshots are ignored. Use Open.
//
// Whatever the image says, an Image takes at most maxL1Bytes (4 MiB) for the L1 table, and twice that for a moment in Open,
// 16 clusters (32 MiB) for L2 tables, and in each ReadAt two clusters (4 MiB).
type Image struct {
	file   *os.File
	name   string
	src    *source
	tables *reader.Qcow2
	closed atomic.Bool
}

var _ blockdev.Device = (*Image)(nil)

// Open opens an image of version 2 or 3 for reading. Its clusters may be compressed with deflate; what else an image can
// have, a backing file above all, is an error that wraps blockdev.ErrNotDisk and an error of this package. No other file is
// opened. The file must not change until Close.
func Open(path string) (*Image, error) {
	file, size, err := openFile(path)
	if err != nil {
		return nil, fmt.Errorf("qcow2: %w", err)
	}
	img, err := newImage(file, size, path)
	if err != nil {
		_ = file.Close()
		return nil, err
	}
	img.file = file
	return img, nil
}

// Is says whether a file starts as a qcow2 image does. What is neither a file nor a block device does not.
func Is(path string) (bool, error) {
	file, size, err := openFile(path)
	if errors.Is(err, blockdev.ErrNotDisk) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("qcow2: %w", err)
	}
	defer file.Close()
	var b [len(magic)]byte
	if size < int64(len(b)) {
		return false, nil
	}
	if _, err := file.ReadAt(b[:], 0); err != nil {
		return false, fmt.Errorf("qcow2: %w", err)
	}
	return string(b[:]) == magic, nil
}

// openFile opens a file or a block device, and says how many bytes it has.
func openFile(path string) (*os.File, int64, error) {
	// Looked at before it is opened, since opening a pipe would block.
	info, err := os.Stat(path)
	if err != nil {
		return nil, 0, err
	}
	if m := info.Mode(); !m.IsRegular() && m.Type() != fs.ModeDevice {
		return nil, 0, fmt.Errorf("%w: %s is %v; give a regular file or a block device", blockdev.ErrNotDisk, path, m)
	}
	file, err := os.Open(path)
	if err != nil {
		return nil, 0, err
	}
	size, err := file.Seek(0, io.SeekEnd)
	if err != nil {
		_ = file.Close()
		return nil, 0, err
	}
	return file, size, nil
}

// newImage is an Image of the size bytes of r. Its errors name the file.
func newImage(r io.ReaderAt, size int64, name string) (*Image, error) {
	h, err := readHeader(r, size)
	if err != nil {
		return nil, openError(name, err)
	}
	// The library is shown no more than what was checked: with the image's own header it would open backing files, and
	// print warnings.
	seen := header{clusterBits: h.clusterBits, size: h.size, l1Entries: uint32(h.l1Needed()), l1Offset: h.l1Offset}
	img := &Image{name: name, src: &source{file: r, size: size, cluster: 1 << h.clusterBits, header: seen.marshal()}}
	err = guard(func() (err error) {
		if img.tables, err = reader.Open(img.src, nil); err == nil {
			err = img.tables.Readable()
		}
		return err
	})
	if err != nil {
		return nil, openError(name, damage(err))
	}
	img.src.header = nil
	return img, nil
}

func readHeader(r io.ReaderAt, size int64) (*header, error) {
	var b [headerBytes]byte
	n, err := r.ReadAt(b[:min(size, headerBytes)], 0)
	switch {
	case err != nil && !errors.Is(err, io.EOF):
		return nil, err
	case n < len(magic) || string(b[:len(magic)]) != magic:
		return nil, fmt.Errorf("%w: it is no qcow2 image; is it a raw image?", ErrUnsupported)
	case n < len(b):
		return nil, fmt.Errorf("%w: the file has %d bytes only", ErrCorrupt, n)
	}
	h := parseHeader(&b)
	return &h, h.check(size)
}

// openError makes the error of Open. An error of the file says nothing about whether it could be a disk.
func openError(name string, err error) error {
	if pathErr := (*fs.PathError)(nil); errors.As(err, &pathErr) {
		return fmt.Errorf("qcow2: %w", err)
	}
	return fmt.Errorf("%w: %s: %w", blockdev.ErrNotDisk, name, err)
}

// damage makes errors of the library those of a damaged image, but for errors of the file: its tables lead nowhere then, or
// to bytes that are no compressed data.
func damage(err error) error {
	pathErr := (*fs.PathError)(nil)
	switch {
	case errors.Is(err, ErrCorrupt), errors.As(err, &pathErr):
		return err
	case errors.Is(err, io.EOF):
		// An io.EOF would look like the end of the disk to callers.
		return fmt.Errorf("%w: %w (%s)", ErrCorrupt, io.ErrUnexpectedEOF, err.Error())
	}
	return fmt.Errorf("%w: %w", ErrCorrupt, err)
}

// guard calls the library. A panic of it becomes an error: it parses what a stranger wrote, and a machine, with all that its
// guest holds in memory, must not die of that.
func guard(call func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("%w: the reader failed: %v", ErrCorrupt, p)
		}
	}()
	return call()
}

// inflater fills p whenever it can. The library calls Read once, and for the rest decompresses again from the start of the
// cluster; and takes an io.EOF that comes with the last bytes of a cluster for the end of the disk.
type inflater struct{ io.ReadCloser }

func (z inflater) Read(p []byte) (int, error) { return io.ReadFull(z.ReadCloser, p) }

func init() {
	reader.SetDecompressor(reader.CompressionTypeZlib, func(r io.Reader) (io.ReadCloser, error) {
		return inflater{flate.NewReader(r)}, nil
	})
}

// source is the file as the library sees it.
type source struct {
	file    io.ReaderAt
	size    int64
	cluster int64
	header  *[headerBytes]byte // in place of the first cluster; nil once the image is open
}

// ReadAt implements io.ReaderAt. After the image was opened, the first cluster, which has nothing but the header, can't be
// read any more: tables lead there only if they are damaged.
func (s *source) ReadAt(p []byte, off int64) (int, error) {
	if off < s.cluster {
		if s.header == nil || off < 0 {
			return 0, fmt.Errorf("%w: a table leads to offset %d", ErrCorrupt, off)
		}
		clear(p)
		copy(p, s.header[min(off, headerBytes):])
		return len(p), nil
	}
	if off >= s.size {
		return 0, io.EOF
	}
	n, err := s.file.ReadAt(p[:min(int64(len(p)), s.size-off)], off)
	if err == nil && n < len(p) {
		err = io.EOF
	}
	return n, err
}

// Size implements blockdev.Device.
func (m *Image) Size() int64 { return m.tables.Size() }

// BlockSize implements blockdev.Device.
func (m *Image) BlockSize() int { return blockdev.MinBlockSize }

// ReadOnly implements blockdev.Device.
func (m *Image) ReadOnly() bool { return true }

// ReadAt implements blockdev.Device. Tables or compressed data that make no sense are ErrCorrupt, and so is what would be
// beyond the end of the file. A compressed cluster is decompressed from its start for each read.
func (m *Image) ReadAt(p []byte, off int64) (int, error) {
	if err := blockdev.CheckRange("read", off, int64(len(p)), m.Size()); err != nil {
		return 0, err
	}
	n, err := m.read(p, off)
	if err != nil {
		return n, fmt.Errorf("qcow2: read %d bytes at %d of %s: %w", len(p), off, m.name, err)
	}
	return n, nil
}

func (m *Image) read(p []byte, off int64) (n int, err error) {
	if m.closed.Load() {
		return 0, os.ErrClosed
	}
	err = guard(func() (err error) {
		n, err = m.tables.ReadAt(p, off)
		return err
	})
	switch {
	// The library says io.EOF at the end of the disk too.
	case n == len(p) && (err == nil || errors.Is(err, io.EOF)):
		return n, nil
	case err == nil:
		err = io.EOF
	}
	return n, damage(err)
}

// WriteAt implements blockdev.Device.
func (m *Image) WriteAt(p []byte, off int64) (int, error) {
	return 0, m.refuse("write", off, int64(len(p)))
}

// Discard implements blockdev.Device.
func (m *Image) Discard(off, n int64) error { return m.refuse("discard", off, n) }

// WriteZeroes implements blockdev.Device.
func (m *Image) WriteZeroes(off, n int64) error { return m.refuse("write zeroes to", off, n) }

func (m *Image) refuse(op string, off, n int64) error {
	return fmt.Errorf("%w: %s %d bytes at %d of %s", blockdev.ErrReadOnly, op, n, off, m.name)
}

// Flush implements blockdev.Device. There never is anything to do.
func (m *Image) Flush() error { return nil }

// Close gives the file back. Calls of ReadAt after it fail with os.ErrClosed.
func (m *Image) Close() error {
	m.closed.Store(true)
	return m.file.Close()
}
