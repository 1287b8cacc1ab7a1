package newfile

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"testing"
)

// names are what is in a directory.
func names(t *testing.T, dir string) (names []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// check checks that a file has these contents, and that nothing else is in its directory.
func check(t *testing.T, path, want string) {
	t.Helper()
	if b, err := os.ReadFile(path); err != nil || string(b) != want {
		t.Errorf("%q, %v, want %q", b, err, want)
	}
	if got := names(t, filepath.Dir(path)); len(got) != 1 {
		t.Errorf("there is %q", got)
	}
}

// fill writes, and looks whether the name is free, or with what it was before, meanwhile.
func fill(t *testing.T, path, text, before string) func(f *os.File) error {
	return func(f *os.File) error {
		if b, err := os.ReadFile(path); string(b) != before || before == "" && !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("before it is complete there is %q, %v", b, err)
		}
		_, err := f.WriteString(text)
		return err
	}
}

func TestCreate(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	if err := Create(path, fill(t, path, "a", "")); err != nil {
		t.Fatal(err)
	}
	check(t, path, "a")
	if fi, err := os.Stat(path); err != nil || runtime.GOOS != "windows" && fi.Mode() != 0o600 {
		t.Errorf("%v, %v", fi.Mode(), err)
	}
	err := Create(path, func(*os.File) error { t.Error("what would be refused was begun"); return nil })
	if !errors.Is(err, fs.ErrExist) {
		t.Errorf("the name is taken: %v", err)
	}
	check(t, path, "a")
	if err := Replace(path, fill(t, path, "b", "a")); err != nil {
		t.Fatal(err)
	}
	check(t, path, "b")
}

// TestTaken takes the name while the file is written.
func TestTaken(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	err := Create(path, func(f *os.File) error { return os.WriteFile(path, []byte("another's"), 0o600) })
	if !errors.Is(err, fs.ErrExist) {
		t.Errorf("%v, want %v", err, fs.ErrExist)
	}
	check(t, path, "another's")
}

// TestFails: after an error there is nothing, or what was there.
func TestFails(t *testing.T) {
	dir, broken := t.TempDir(), errors.New("broken")
	path := filepath.Join(dir, "file")
	fail := func(f *os.File) error { _, err := f.WriteString("a part"); return errors.Join(err, broken) }
	if err := Create(path, fail); !errors.Is(err, broken) {
		t.Errorf("%v, want %v", err, broken)
	}
	if got := names(t, dir); len(got) > 0 {
		t.Errorf("left: %q", got)
	}
	if err := os.WriteFile(path, []byte("old"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := Replace(path, fail); !errors.Is(err, broken) {
		t.Errorf("%v, want %v", err, broken)
	}
	check(t, path, "old")
	if err := Create(filepath.Join(dir, "missing", "file"), fail); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no directory: %v", err)
	}
}

// Where files can't have two names, they are renamed. A directory stands for such a file here.
func TestNoLinks(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "name")
	for _, want := range []error{nil, fs.ErrExist} {
		temp, err := os.MkdirTemp(dir, "")
		if err != nil {
			t.Fatal(err)
		}
		if err := name(temp, path); !errors.Is(err, want) {
			t.Errorf("%v, want %v", err, want)
		}
	}
	if err := name(filepath.Join(dir, "none"), filepath.Join(dir, "other")); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
}
