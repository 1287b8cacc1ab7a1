package main

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"golang.org/x/sys/unix"
)

const (
	diskDevice  = "/dev/vda"
	diskDir     = "/disk"
	maxDisk     = 24 // files
	diskRecords = 4  // that a new file has at most
)

// othersDirs are not the disk job's.
var othersDirs = []string{"lost+found", databaseDir}

// hasDisk says whether there is a disk to put load on.
func hasDisk() bool {
	_, err := os.Stat(diskDevice)
	return err == nil
}

// volume is the mounted disk. It is unmounted when the last job that has taken it has released it.
type volume struct {
	mu    sync.Mutex
	users int
}

func (v *volume) take() error {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.users == 0 {
		if err := os.MkdirAll(diskDir, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(diskDevice, diskDir, "ext4", 0, ""); err != nil {
			return fmt.Errorf("mount %s: %w", diskDevice, err)
		}
	}
	v.users++
	return nil
}

func (v *volume) release() error {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.users--; v.users > 0 {
		return nil
	}
	return os.NewSyscallError("unmount "+diskDir, unix.Unmount(diskDir, 0))
}

// diskFile is a file whose name says what is in it: its id and its version. Every one of its records depends on these
// and on its place.
type diskFile struct {
	dir, id, version, records uint64
}

func (f diskFile) parent(root string) string {
	return filepath.Join(root, fmt.Sprintf("dir-%d", f.dir))
}

func (f diskFile) path(root string) string {
	return filepath.Join(f.parent(root), fmt.Sprintf("%d.%d", f.id, f.version))
}

// record is one of the file's records.
func (f diskFile) record(i uint64) []byte {
	return content(6+f.version<<4, f.id<<8|i, recordSize)
}

// disk writes to a file system: files are made, appended to, renamed, overwritten and removed, and directories with
// them, all of it synced in several ways.
type disk struct {
	root  string
	done  func() error // at the end
	files []diskFile
}

// newDisk mounts the disk.
func (v *volume) newDisk() (job, error) {
	if err := v.take(); err != nil {
		return nil, err
	}
	return &disk{root: diskDir, done: v.release}, nil
}

func (d *disk) step(n uint64) (string, error) {
	var err error
	i := 0
	if len(d.files) > 0 {
		i = int(n * 7 % uint64(len(d.files)))
		if err := d.check(d.files[i]); err != nil {
			return "", err
		}
	}
	what := "create"
	switch op := n % 6; {
	case len(d.files) < 4 || op < 2 && len(d.files) < maxDisk:
		err = d.create(n)
	case op < 2:
		what, err = "remove", d.remove(i)
	case op == 2, op == 3:
		what, err = "append", d.grow(i, op == 3)
	case op == 4:
		what, err = "rename", d.rename(i, diskFile{dir: n / 8, id: d.files[i].id, version: d.files[i].version, records: d.files[i].records})
	default:
		what, err = "overwrite", d.overwrite(i)
	}
	return fmt.Sprintf("%s files=%d", what, len(d.files)), err
}

// create makes a file, in a new directory now and then.
func (d *disk) create(n uint64) error {
	f := diskFile{dir: n / 8, id: n, records: 1 + n%diskRecords}
	if err := os.MkdirAll(f.parent(d.root), 0o755); err != nil {
		return err
	}
	if err := d.write(f, 0, unix.O_CREAT|unix.O_EXCL, (*os.File).Sync); err != nil {
		return err
	}
	d.files = append(d.files, f)
	return syncDir(f.parent(d.root))
}

// write writes the records of a file from one on, and syncs it.
func (d *disk) write(f diskFile, from uint64, flags int, sync func(*os.File) error) (err error) {
	out, err := os.OpenFile(f.path(d.root), os.O_WRONLY|flags, 0o644)
	if errors.Is(err, unix.EINVAL) && flags&unix.O_DIRECT != 0 { // a file system in memory
		out, err = os.OpenFile(f.path(d.root), os.O_WRONLY, 0)
	}
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	// Pages of their own: O_DIRECT needs memory that is aligned.
	buf, err := unix.Mmap(-1, 0, recordSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return os.NewSyscallError("mmap", err)
	}
	defer func() { err = errors.Join(err, unix.Munmap(buf)) }()
	for i := from; i < f.records; i++ {
		copy(buf, f.record(i))
		if _, err := out.WriteAt(buf, int64(i)*recordSize); err != nil {
			return err
		}
	}
	return sync(out)
}

// grow appends a record, and syncs all of the file or only what it wrote.
func (d *disk) grow(i int, rangeOnly bool) error {
	f := d.files[i]
	f.records++
	sync := (*os.File).Sync
	if rangeOnly {
		sync = func(out *os.File) error {
			const flags = unix.SYNC_FILE_RANGE_WAIT_BEFORE | unix.SYNC_FILE_RANGE_WRITE | unix.SYNC_FILE_RANGE_WAIT_AFTER
			return os.NewSyscallError("sync_file_range", unix.SyncFileRange(int(out.Fd()), int64(f.records-1)*recordSize, recordSize, flags))
		}
	}
	if err := d.write(f, f.records-1, 0, sync); err != nil {
		return err
	}
	d.files[i] = f
	return nil
}

// rename gives a file another name, and removes the directory that it leaves empty.
func (d *disk) rename(i int, to diskFile) error {
	from := d.files[i]
	if err := os.MkdirAll(to.parent(d.root), 0o755); err != nil {
		return err
	}
	if err := os.Rename(from.path(d.root), to.path(d.root)); err != nil {
		return err
	}
	d.files[i] = to
	return errors.Join(syncDir(to.parent(d.root)), d.tidy(from))
}

// overwrite replaces all records in place, past the page cache.
func (d *disk) overwrite(i int) error {
	to := d.files[i]
	to.version++
	if err := d.rename(i, to); err != nil {
		return err
	}
	return d.write(to, 0, unix.O_DIRECT, (*os.File).Sync)
}

func (d *disk) remove(i int) error {
	f := d.files[i]
	if err := os.Remove(f.path(d.root)); err != nil {
		return err
	}
	d.files = slices.Delete(d.files, i, i+1)
	return d.tidy(f)
}

// tidy removes the directory of a file that has left it, if it was the last.
func (d *disk) tidy(f diskFile) error {
	if slices.ContainsFunc(d.files, func(o diskFile) bool { return o.dir == f.dir }) {
		return syncDir(f.parent(d.root))
	}
	return errors.Join(os.Remove(f.parent(d.root)), syncDir(d.root))
}

func syncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// check compares a file with what its name says.
func (d *disk) check(f diskFile) error {
	got, err := os.ReadFile(f.path(d.root))
	if err != nil {
		return err
	}
	if len(got) != int(f.records)*recordSize {
		return fmt.Errorf("%s has %d bytes, want %d", f.path(d.root), len(got), f.records*recordSize)
	}
	for i := range f.records {
		if !bytes.Equal(got[i*recordSize:(i+1)*recordSize], f.record(i)) {
			return fmt.Errorf("record %d of %s is wrong", i, f.path(d.root))
		}
	}
	return nil
}

// checkAll checks every file, and that there are no others.
func (d *disk) checkAll() error {
	var errs []error
	want := map[string]bool{}
	for _, f := range d.files {
		errs = append(errs, d.check(f))
		want[f.path(d.root)] = true
	}
	errs = append(errs, filepath.WalkDir(d.root, func(path string, e fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case e.IsDir() && slices.Contains(othersDirs, e.Name()):
			return fs.SkipDir
		case !e.IsDir() && !want[path]:
			return fmt.Errorf("%s should not be there", path)
		}
		return nil
	}))
	return errors.Join(errs...)
}

func (d *disk) finish() error { return errors.Join(d.checkAll(), d.done()) }
