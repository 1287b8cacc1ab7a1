package main

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
)

// sectorSize is the least that a disk writes.
const sectorSize = 512

// nameCheck checks all files of a disk job that is gone by their names alone.
type nameCheck struct {
	disk disk
	busy int               // files that may yet be between two versions
	ids  map[uint64]string // the paths of all files
	errs []error
}

// checkNames checks them, and returns how many there are. Each id must be there once. Of a job that crashed, the one file
// that it was busy with may be between two versions.
func checkNames(root string, crashed bool) (files int, err error) {
	c := nameCheck{disk: disk{root: root}, ids: map[uint64]string{}}
	if crashed {
		c.busy = 1
	}
	err = filepath.WalkDir(root, func(path string, e fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case e.IsDir() && slices.Contains(othersDirs, e.Name()):
			return fs.SkipDir
		case !e.IsDir():
			c.errs = append(c.errs, c.check(path))
		}
		return nil
	})
	return len(c.ids), errors.Join(append(c.errs, err)...)
}

func (c *nameCheck) check(path string) error {
	f, err := parseDiskFile(c.disk.root, path)
	if err != nil {
		return err
	}
	if other, dup := c.ids[f.id]; dup {
		return fmt.Errorf("%s is also there as %s", path, other)
	}
	c.ids[f.id] = path
	if f.records < 1+f.id%diskRecords {
		err = fmt.Errorf("%s has only %d whole records", path, f.records)
	} else {
		err = c.disk.check(f)
	}
	if err != nil && c.busy > 0 {
		c.busy--
		return c.disk.checkBusy(f)
	}
	return err
}

// parseDiskFile is the file of a name, with as many records as it has room for.
func parseDiskFile(root, path string) (f diskFile, err error) {
	rel, err := filepath.Rel(root, path)
	if err != nil {
		return f, err
	}
	// What Sscanf takes for a name need not be one.
	if _, err := fmt.Sscanf(rel, "dir-%d/%d.%d", &f.dir, &f.id, &f.version); err != nil || f.path(root) != path {
		return f, fmt.Errorf("%s should not be there", path)
	}
	info, err := os.Stat(path)
	if err != nil {
		return f, err
	}
	f.records = uint64(info.Size()) / recordSize
	return f, nil
}

// checkBusy checks a file that was being made, appended to or overwritten: each of its sectors is of its version or of the
// one before, or has not been written.
func (d *disk) checkBusy(f diskFile) error {
	got, err := os.ReadFile(f.path(d.root))
	if err != nil {
		return err
	}
	before := f
	before.version--
	empty := make([]byte, sectorSize)
	for at := 0; at < len(got); at += sectorSize {
		i, off := uint64(at/recordSize), at%recordSize
		end := min(sectorSize, len(got)-at)
		is := func(b []byte) bool { return bytes.Equal(got[at:at+end], b[:end]) }
		if !is(f.record(i)[off:]) && (f.version == 0 || !is(before.record(i)[off:])) && !is(empty) {
			return fmt.Errorf("sector %d of %s is of no version", at/sectorSize, f.path(d.root))
		}
	}
	return nil
}
