package main

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"testing"
)

// leaveDisk runs the disk job on a directory, and leaves it as it is.
func leaveDisk(t *testing.T, steps uint64) *disk {
	t.Helper()
	d := &disk{root: t.TempDir()}
	for n := range steps {
		if _, err := d.step(n); err != nil {
			t.Fatal(err)
		}
	}
	return d
}

func TestCheckNames(t *testing.T) {
	for _, steps := range []uint64{0, 1, 50, 400} {
		d := leaveDisk(t, steps)
		for _, other := range othersDirs {
			if err := os.MkdirAll(filepath.Join(d.root, other, "more"), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(d.root, other, "file"), []byte{1}, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		for _, crashed := range []bool{false, true} {
			if files, err := checkNames(d.root, crashed); err != nil || files != len(d.files) {
				t.Errorf("after %d steps: %d files, want %d; %v", steps, files, len(d.files), err)
			}
		}
	}
}

// damage is what can be wrong with a file of the disk job.
type damage struct {
	busy bool // a crash may leave it so
	do   func(t *testing.T, d *disk, f diskFile)
}

func setBytes(at int, b ...byte) func(t *testing.T, d *disk, f diskFile) {
	return func(t *testing.T, d *disk, f diskFile) {
		t.Helper()
		file, err := os.OpenFile(f.path(d.root), os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		if _, err := file.WriteAt(b, int64(at)); err != nil {
			t.Fatal(err)
		}
	}
}

func truncate(n int64) func(t *testing.T, d *disk, f diskFile) {
	return func(t *testing.T, d *disk, f diskFile) {
		t.Helper()
		if err := os.Truncate(f.path(d.root), n); err != nil {
			t.Fatal(err)
		}
	}
}

// move gives a file, whose content stays, another name.
func move(change func(f *diskFile)) func(t *testing.T, d *disk, f diskFile) {
	return func(t *testing.T, d *disk, f diskFile) {
		t.Helper()
		to := f
		change(&to)
		if err := os.Rename(f.path(d.root), to.path(d.root)); err != nil {
			t.Fatal(err)
		}
	}
}

// overwriteHalf is an overwriting that has come to the middle of the first record.
func overwriteHalf(t *testing.T, d *disk, f diskFile) {
	t.Helper()
	to := f
	to.version++
	move(func(f *diskFile) { f.version++ })(t, d, f)
	setBytes(0, to.record(0)[:recordSize/2]...)(t, d, to)
}

var damages = map[string]damage{
	"overwritten in part":    {true, overwriteHalf},
	"of the version before":  {true, move(func(f *diskFile) { f.version++ })},
	"a sector of zeros":      {true, setBytes(sectorSize, make([]byte, sectorSize)...)},
	"short":                  {true, truncate(recordSize - sectorSize)},
	"no record":              {true, truncate(0)},
	"half a sector of zeros": {false, setBytes(sectorSize, make([]byte, sectorSize/2)...)},
	"another's content":      {false, setBytes(0, diskFile{id: 1000}.record(0)...)},
	"a byte more":            {false, setBytes(int(recordSize)*10, 1)},
	"of an older version":    {false, move(func(f *diskFile) { f.version += 2 })},
	"of another id":          {false, move(func(f *diskFile) { f.id += 1000 })},
}

// TestCheckNamesSeesDamage damages one file, and then another in the same way: a crash can't do that.
func TestCheckNamesSeesDamage(t *testing.T) {
	for name, damage := range damages {
		t.Run(name, func(t *testing.T) {
			d := leaveDisk(t, 100)
			damage.do(t, d, d.files[2])
			if _, err := checkNames(d.root, false); err == nil {
				t.Error("it is not seen")
			}
			if _, err := checkNames(d.root, true); (err == nil) != damage.busy {
				t.Errorf("after a crash: %v", err)
			}
			damage.do(t, d, d.files[3])
			if _, err := checkNames(d.root, true); err == nil {
				t.Error("of two files, it is not seen after a crash")
			}
		})
	}
}

// TestCheckNamesSeesNames adds files that are no files of the job.
func TestCheckNamesSeesNames(t *testing.T) {
	d := leaveDisk(t, 100)
	f := d.files[2]
	content, err := os.ReadFile(f.path(d.root))
	if err != nil {
		t.Fatal(err)
	}
	other := f
	other.dir = d.files[slices.IndexFunc(d.files, func(o diskFile) bool { return o.dir != f.dir })].dir
	for _, path := range []string{
		f.path(d.root) + "x", f.parent(d.root) + "/0" + filepath.Base(f.path(d.root)), d.root + "/file", other.path(d.root),
	} {
		if err := os.WriteFile(path, bytes.Clone(content), 0o644); err != nil {
			t.Fatal(err)
		}
		for _, crashed := range []bool{false, true} {
			if _, err := checkNames(d.root, crashed); err == nil {
				t.Errorf("%s is not seen", path)
			}
		}
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
}
