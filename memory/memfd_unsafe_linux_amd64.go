package memory

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// imageSeals are those of an image: nobody who has it can resize it, which would make
// others fault beyond its end, or seal it against writing.
const imageSeals = unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_SEAL

// newImageFile makes an empty memfd of n bytes: sparse, sealed, not executable where
// the kernel knows that flag (6.3 and later), closed on exec.
func newImageFile(n uint64) (*os.File, error) {
	fd, err := unix.MemfdCreate("cryovisor-image", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING|unix.MFD_NOEXEC_SEAL)
	if errors.Is(err, unix.EINVAL) {
		fd, err = unix.MemfdCreate("cryovisor-image", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	}
	if err != nil {
		return nil, fmt.Errorf("memory: create the image: %w", err)
	}
	f := os.NewFile(uintptr(fd), "cryovisor-image")
	if err := f.Truncate(int64(n)); err != nil {
		f.Close()
		return nil, fmt.Errorf("memory: size the image: %w", err)
	}
	if _, err := unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, imageSeals); err != nil {
		f.Close()
		return nil, fmt.Errorf("memory: seal the image: %w", err)
	}
	return f, nil
}

// checkImageFile says whether f, which somebody else has made, can be an image of n
// bytes: no access to it, now or later, can find its end, or a page that is not small.
func checkImageFile(f *os.File, n uint64) error {
	seals, err := unix.FcntlInt(f.Fd(), unix.F_GET_SEALS, 0)
	if err != nil {
		return fmt.Errorf("%w: it has no seals: %w", ErrImageFile, err)
	}
	if seals&^unix.F_SEAL_EXEC != imageSeals {
		return fmt.Errorf("%w: its seals are %#x, not %#x", ErrImageFile, seals, imageSeals)
	}
	var st unix.Stat_t
	var fs unix.Statfs_t
	if err := errors.Join(unix.Fstat(int(f.Fd()), &st), unix.Fstatfs(int(f.Fd()), &fs)); err != nil {
		return fmt.Errorf("memory: look at the image: %w", err)
	}
	if fs.Type != unix.TMPFS_MAGIC || st.Mode&unix.S_IFMT != unix.S_IFREG || st.Size < 0 || uint64(st.Size) != n {
		return fmt.Errorf("%w: %d bytes in a file system of type %#x, not %d of shared memory", ErrImageFile, st.Size, fs.Type, n)
	}
	flags, err := unix.FcntlInt(f.Fd(), unix.F_GETFL, 0)
	if err != nil {
		return fmt.Errorf("memory: look at the image: %w", err)
	}
	if flags&unix.O_ACCMODE != unix.O_RDWR || flags&unix.O_APPEND != 0 {
		return fmt.Errorf("%w: it is opened with flags %#x", ErrImageFile, flags)
	}
	return nil
}

// dataIn returns the first part of r that image has pages for; it is empty if there is
// none. A page that is being written is not there yet: the kernel counts those that
// are up to date. The offset of the file, which this moves, is of no use to anybody.
func dataIn(image *os.File, r Range) (Range, error) {
	none := Range{GPA: r.End()}
	lo, err := unix.Seek(int(image.Fd()), int64(r.GPA), unix.SEEK_DATA)
	if errors.Is(err, unix.ENXIO) || err == nil && uint64(lo) >= r.End() {
		return none, nil
	}
	var hi int64
	if err == nil {
		hi, err = unix.Seek(int(image.Fd()), lo, unix.SEEK_HOLE)
	}
	if err != nil {
		return none, fmt.Errorf("memory: look for pages of the image at GPA %#x: %w", r.GPA, err)
	}
	return Range{GPA: uint64(lo), Len: min(uint64(hi), r.End()) - uint64(lo)}, nil
}

// allocated is how much of the host's memory image takes, in bytes.
func allocated(image *os.File) (uint64, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(image.Fd()), &st); err != nil {
		return 0, fmt.Errorf("memory: look at the image: %w", err)
	}
	return uint64(st.Blocks) * 512, nil
}

// punch gives the memory of r back. Private copies of its pages are not affected.
func punch(image *os.File, r Range) error {
	const mode = unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE
	if err := unix.Fallocate(int(image.Fd()), mode, int64(r.GPA), int64(r.Len)); err != nil {
		return fmt.Errorf("memory: punch %d bytes at GPA %#x out of the image: %w", r.Len, r.GPA, err)
	}
	return nil
}

// hugeShmem finds out whether a one-page write to a memfd makes more than one
// page present.
func hugeShmem() (bool, error) {
	f, err := newImageFile(2 * hugePage)
	if err != nil {
		return false, err
	}
	defer f.Close()
	var n uint64
	if _, err = f.WriteAt(make([]byte, PageSize), hugePage); err == nil {
		n, err = allocated(f)
	}
	if err != nil {
		return false, fmt.Errorf("memory: probe shared memory: %w", err)
	}
	return n > PageSize, nil
}
