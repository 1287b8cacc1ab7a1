package snapshot

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// mountTmpfs mounts a tmpfs for the test, or skips it where that isn't permitted.
func mountTmpfs(t *testing.T, options string) string {
	t.Helper()
	dir := t.TempDir()
	err := unix.Mount("tmpfs", dir, "tmpfs", 0, options)
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES) {
		t.Skipf("mounting a tmpfs: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil { // fails if a file is still open
			t.Errorf("unmount: %v", err)
			unix.Unmount(dir, unix.MNT_DETACH)
		}
	})
	return dir
}

// TestRealFileSystems fills a real file system, and then makes it read-only.
func TestRealFileSystems(t *testing.T) {
	dir := mountTmpfs(t, "size=4m")
	s, err := OpenStore(filepath.Join(dir, "store"))
	if err != nil {
		t.Fatal(err)
	}
	l := &lab{s, newKey(t), t}
	rnd := testRand(t)
	g := newGuest(16 << 20)
	b := make([]byte, PageSize)
	fillRandom(rnd, b)
	for p := range g.size / PageSize {
		g.set(p, bytes.Clone(b))
		fillRandom(rnd, b[:512])
	}
	opts := l.options()
	opts.Codec = CodecStored
	_, err = l.write(g, g.layout(), opts)
	mustBe(t, err, unix.ENOSPC)
	if left := l.files(); len(left) != 0 {
		t.Errorf("left %v", left)
	}
	fits := []Range{{0, 1 << 20}}
	info, err := l.write(g, fits, opts)
	if err != nil {
		t.Fatalf("after a full disk: %v", err)
	}
	if err := unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	_, err = l.write(g, fits, opts)
	mustBe(t, err, unix.EROFS)
	mustBe(t, l.Delete(context.Background(), info.ID), unix.EROFS)
	r, err := l.Open(context.Background(), info.ID, l.key)
	if err != nil {
		t.Fatal(err)
	}
	rep, err := r.Verify(context.Background(), nil)
	if err != nil || rep.Err() != nil {
		t.Error(err, rep.Err())
	}
	r.Close()
}

// TestDescriptors: nothing stays open, whatever happened.
func TestDescriptors(t *testing.T) {
	l, g, info := small(t)
	before := countFDs(t)
	r, err := l.Open(context.Background(), info.ID, l.key)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Fetch(context.Background(), 0, nop); err != nil {
		t.Fatal(err)
	}
	r.Close()
	w, err := l.Create(context.Background(), l.options())
	if err != nil {
		t.Fatal(err)
	}
	if err := w.WriteMemory(context.Background(), g.size, g.layout(), g.view); err != nil {
		t.Fatal(err)
	}
	if countFDs(t) == before {
		t.Error("the pack being written is no descriptor: this test sees nothing")
	}
	w.Abort()
	l.mustWrite(g, g.layout(), l.options())
	if _, err := l.Open(context.Background(), info.ID, newKey(t)); err == nil {
		t.Error("a wrong key opened")
	}
	if after := countFDs(t); after != before {
		t.Errorf("%d descriptors, were %d", after, before)
	}
}

func countFDs(t *testing.T) int {
	t.Helper()
	d, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(d)
}

// TestUnnamedFiles: on the file systems that have them, nothing has a name while
// it is being written.
func TestUnnamedFiles(t *testing.T) {
	dir := t.TempDir()
	f, err := stageUnnamed(dir)
	if errors.Is(err, errors.ErrUnsupported) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	defer f.Discard()
	if names, err := os.ReadDir(dir); err != nil || len(names) != 0 {
		t.Errorf("%v %v", names, err)
	}
	path := filepath.Join(dir, "name")
	writeFile(t, path, nil)
	mustBe(t, f.Publish(path), ErrExists)
	if err := f.Publish(path + "2"); err != nil {
		t.Error(err)
	}
	mustBe(t, f.Publish(path+"3"), ErrClosed)
	if _, err := stageUnnamed(filepath.Join(dir, "none")); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
}

// TestSyncReachesTheKernel: the crash model believes that a Sync waits for the disk, and does not call the real one. Here the
// kernel has the last word: it syncs no pipes, and no directories of /proc, and says so.
func TestSyncReachesTheKernel(t *testing.T) {
	read, pipe, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer read.Close()
	defer pipe.Close()
	swap := func(f **os.File) {
		(*f).Close()
		*f = pipe
	}
	path := filepath.Join(t.TempDir(), "file")
	writeFile(t, path, nil)
	for name, base := range bases {
		staged, err := base.Stage(filepath.Dir(path))
		if err != nil {
			t.Fatal(err)
		}
		switch f := staged.(type) {
		case *unnamedFile:
			swap(&f.File)
		case *namedFile:
			swap(&f.File)
		default:
			t.Fatalf("%s: a file that this test does not know: %T", name, f)
		}
		if err := staged.Sync(); !errors.Is(err, unix.EINVAL) {
			t.Errorf("%s: a pipe was synced: %v", name, err)
		}
	}
	over, err := osFiles{}.Overwrite(path)
	if err != nil {
		t.Fatal(err)
	}
	file := over.(sizedFile)
	swap(&file.File)
	if err := overwrite(file, 0); !errors.Is(err, unix.EINVAL) {
		t.Errorf("a pipe was overwritten and synced: %v", err)
	}
	if err := (osFiles{}).SyncDir("/proc/self"); !errors.Is(err, unix.EINVAL) {
		t.Errorf("a directory of /proc was synced: %v", err)
	}
}
