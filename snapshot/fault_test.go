package snapshot

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
)

// TestCancelMidWrite cancels while workers are busy.
func TestCancelMidWrite(t *testing.T) {
	l, g := newLab(t), newGuest(32<<20)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	w, err := l.Create(ctx, l.options())
	if err != nil {
		t.Fatal(err)
	}
	var calls atomic.Int64
	full := make([]byte, MaxChunkSize)
	for i := range full {
		full[i] = byte(i * i >> 8)
	}
	err = w.WriteMemory(ctx, g.size, g.layout(), func(gpa uint64, n int) ([]byte, error) {
		if calls.Add(1) == 8 {
			cancel()
		}
		return full[:n], nil
	})
	mustBe(t, err, context.Canceled)
	if n := calls.Load(); n > 16 {
		t.Errorf("%d chunks after the cancellation", n-8)
	}
	_, err = w.Commit(context.Background())
	mustBe(t, err, context.Canceled)
	for range 2 {
		if err := w.Abort(); err != nil {
			t.Error(err)
		}
	}
	if left := l.files(); len(left) != 0 {
		t.Errorf("left %v", left)
	}
	l.check(l.open(l.mustWrite(g, g.layout(), l.options()).ID), g)
	for name, f := range map[string]func() error{
		"Create": func() error { _, err := l.Create(ctx, l.options()); return err },
		"Open":   func() error { _, err := l.Open(ctx, NewID(), l.key); return err },
		"Delete": func() error { return l.Delete(ctx, NewID()) },
	} {
		if err := f(); !errors.Is(err, context.Canceled) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestCancelCommitFetchVerify(t *testing.T) {
	l, _, info := small(t)
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	r := l.open(info.ID)
	mustBe(t, r.Fetch(ctx, 0, nop), context.Canceled)
	_, err := r.Verify(ctx, nil)
	mustBe(t, err, context.Canceled)
	w, err := l.Create(context.Background(), l.options())
	if err != nil {
		t.Fatal(err)
	}
	before := len(l.files())
	if err := w.WriteMemory(context.Background(), PageSize, []Range{{0, PageSize}}, newGuest(PageSize).view); err != nil {
		t.Fatal(err)
	}
	_, err = w.Commit(ctx)
	mustBe(t, err, context.Canceled)
	mustBe(t, w.WriteMemory(context.Background(), PageSize, nil, nil), ErrClosed)
	if now := len(l.files()); now != before {
		t.Errorf("%d files, were %d", now, before)
	}
}

func TestViewError(t *testing.T) {
	l := newLab(t)
	broken := errors.New("broken")
	for name, view := range map[string]View{
		"error": func(uint64, int) ([]byte, error) { return nil, broken },
		"short": func(uint64, int) ([]byte, error) { return make([]byte, 7), nil },
	} {
		w, err := l.Create(context.Background(), l.options())
		if err != nil {
			t.Fatal(err)
		}
		err = w.WriteMemory(context.Background(), 1<<20, []Range{{0, 1 << 20}}, view)
		if !errors.Is(err, broken) && !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
		w.Abort()
	}
}

// TestReadOnlyDirectory needs a user whom permissions concern; root is told by
// the file system instead, in TestRealFileSystems.
func TestReadOnlyDirectory(t *testing.T) {
	l, g := newLab(t), newGuest(PageSize)
	info := l.mustWrite(g, nil, l.options())
	for _, dir := range []string{l.packs(), l.manifests(), l.Dir()} {
		if err := os.Chmod(dir, 0o500); err != nil {
			t.Fatal(err)
		}
		defer os.Chmod(dir, 0o700)
	}
	l.check(l.open(info.ID), g)
	g.set(0, []byte{1, PageSize - 1: 0})
	_, err := l.write(g, g.layout(), l.options())
	if os.Geteuid() == 0 || runtime.GOOS == "windows" {
		if err != nil {
			t.Error(err)
		}
		return
	}
	mustBe(t, err, os.ErrPermission)
}

// TestCrashBeforeManifest leaves what a process leaves that dies between
// publishing the packs and publishing the manifest.
func TestCrashBeforeManifest(t *testing.T) {
	l, g, rnd := newLab(t), newGuest(1<<20), testRand(t)
	for p := range g.size / PageSize {
		g.set(p, page(rnd))
	}
	kept := l.open(l.mustWrite(g, g.layout(), l.options()).ID)
	before := strings.Join(l.files(), "\n")
	lost := l.mustWrite(g, g.layout(), l.options())
	if err := os.Remove(l.ManifestPath(lost.ID)); err != nil {
		t.Fatal(err)
	}
	half := filepath.Join(l.manifests(), deletedPrefix+NewID().String())
	writeFile(t, half, []byte("half deleted"))
	fresh := filepath.Join(l.packs(), tempPrefix+NewID().String())
	writeFile(t, fresh, nil)
	old := filepath.Join(l.packs(), tempPrefix+NewID().String())
	writeFile(t, old, nil)
	long := kept.Header().Created.Add(-2 * staleTemp)
	if err := os.Chtimes(old, long, long); err != nil {
		t.Fatal(err)
	}
	got, err := l.Collect(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	if len(got.Packs) == 0 || got.Bytes == 0 || got.Temps != 2 {
		t.Errorf("collected %+v", got)
	}
	if _, err := os.Stat(fresh); err != nil {
		t.Errorf("a temporary file that may be in use: %v", err)
	}
	os.Remove(fresh)
	if now := strings.Join(l.files(), "\n"); now != before {
		t.Errorf("left\n%s\nwant\n%s", now, before)
	}
	l.check(kept, g)
}

// TestCollectSparesWhatItCantRead: an unreadable manifest may need any pack.
func TestCollectSparesWhatItCantRead(t *testing.T) {
	l, _, info := small(t)
	other := l.mustWrite(newGuest(PageSize), nil, l.options())
	path := l.ManifestPath(info.ID)
	good := readFile(t, path)
	writeFile(t, path, good[:50])
	before := len(l.files())
	_, err := l.Collect(context.Background())
	mustBe(t, err, ErrCorrupt)
	if now := len(l.files()); now != before {
		t.Errorf("%d files, were %d", now, before)
	}
	entries, err := l.List()
	mustBe(t, err, ErrCorrupt)
	if len(entries) != 1 || entries[0].ID != other.ID {
		t.Errorf("entries %v", entries)
	}
	mustBe(t, l.Delete(context.Background(), other.ID), ErrCorrupt)
	writeFile(t, path, good)
	if err := tryAll(l, info.ID); err != nil {
		t.Error(err)
	}
	// What can't be read can be deleted, and its packs collected.
	writeFile(t, path, good[:50])
	if err := l.Delete(context.Background(), info.ID); err != nil {
		t.Error(err)
	}
	if _, err := l.Collect(context.Background()); err != nil {
		t.Error(err)
	}
	if left := l.files(); len(left) != 0 {
		t.Errorf("left %v", left)
	}
}

// TestParentDeletedMeanwhile: a diff can't be committed on packs that are gone.
func TestParentDeletedMeanwhile(t *testing.T) {
	l, g, info := small(t)
	opts := l.options()
	opts.Parent = l.open(info.ID)
	w, err := l.Create(context.Background(), opts)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Abort()
	if err := w.WriteMemory(context.Background(), g.size, nil, g.view); err != nil {
		t.Fatal(err)
	}
	if err := l.Delete(context.Background(), info.ID); err != nil {
		t.Fatal(err)
	}
	_, err = w.Commit(context.Background())
	mustBe(t, err, os.ErrNotExist)
	if left := l.files(); len(left) != 0 {
		t.Errorf("left %v", left)
	}
}

// TestDeleteShreds keeps the manifest's blocks by a second link and looks at them.
func TestDeleteShreds(t *testing.T) {
	l, _, info := small(t)
	path, link := l.ManifestPath(info.ID), filepath.Join(t.TempDir(), "link")
	if err := os.Link(path, link); err != nil {
		t.Skipf("no hard links here: %v", err)
	}
	was := readFile(t, path)
	if err := l.Delete(context.Background(), info.ID); err != nil {
		t.Fatal(err)
	}
	now := readFile(t, link)
	same := 0
	for i := range now {
		if now[i] == was[i] {
			same++
		}
	}
	if len(now) != len(was) || same > len(was)/50 {
		t.Errorf("%d of %d bytes of the manifest survive", same, len(was))
	}
	mustBe(t, l.Delete(context.Background(), info.ID), ErrNotFound)
	_, err := l.Header(info.ID)
	mustBe(t, err, ErrNotFound)
}

func TestStoreOfNothing(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "no", "such")
	s, err := OpenStore(dir)
	if err != nil {
		t.Fatal(err)
	}
	if e, err := s.List(); err != nil || len(e) != 0 {
		t.Error(e, err)
	}
	if g, err := s.Collect(context.Background()); err != nil || len(g.Packs) != 0 {
		t.Error(g, err)
	}
	_, err = s.Open(context.Background(), NewID(), newKey(t))
	mustBe(t, err, ErrNotFound)
	_, err = s.Find("00")
	mustBe(t, err, ErrNotFound)
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Error("looking made a directory")
	}
	file := filepath.Join(t.TempDir(), "file")
	writeFile(t, file, nil)
	_, err = OpenStore(file)
	mustBe(t, err, ErrInvalid)
}

func TestFind(t *testing.T) {
	l, g := newLab(t), newGuest(0)
	a, b := l.mustWrite(g, nil, l.options()).ID, l.mustWrite(g, nil, l.options()).ID
	if got, err := l.Find(a.String()); got != a || err != nil {
		t.Error(got, err)
	}
	n := 0
	for a.String()[n] == b.String()[n] {
		n++
	}
	if got, err := l.Find(b.String()[:n+1]); got != b || err != nil {
		t.Error(got, err)
	}
	_, err := l.Find("")
	mustBe(t, err, ErrInvalid)
	if fmt.Sprint(a) != a.String() {
		t.Error("an ID prints as something else")
	}
}

// TestCollectBesideWriters: several users of one directory, as in several
// processes, write diffs, delete and collect at the same time. What was committed
// must be whole, and in the end nothing else may be left.
func TestCollectBesideWriters(t *testing.T) {
	l, g := newLab(t), newGuest(64*PageSize)
	base := l.open(l.mustWrite(g, g.layout(), l.options()).ID)
	var stop atomic.Bool
	var writers, collector sync.WaitGroup
	collector.Go(func() {
		other, err := OpenStore(l.Dir())
		if err != nil {
			t.Error(err)
			return
		}
		for !stop.Load() {
			if _, err := other.Collect(context.Background()); err != nil {
				t.Error(err)
			}
		}
	})
	for n := range uint64(3) {
		writers.Go(func() {
			if err := writeAndDelete(l, base, n); err != nil {
				t.Error(err)
			}
		})
	}
	writers.Wait()
	stop.Store(true)
	collector.Wait()
	entries, err := l.List()
	if err != nil || len(entries) != 1+3 {
		t.Errorf("%d snapshots, %v", len(entries), err)
	}
	files := len(entries)
	for _, e := range entries {
		files += len(e.Packs)
		if err := tryAll(l, e.ID); err != nil {
			t.Error(err)
		}
	}
	if left := l.files(); len(left) != files {
		t.Errorf("%d files are needed, there are %v", files, left)
	}
}

// writeAndDelete makes a chain of diffs of base, deleting each but the last once
// it has a child. The chain's packs are not shared with anybody else.
func writeAndDelete(l *lab, base *Reader, seed uint64) error {
	store, err := OpenStore(l.Dir())
	if err != nil {
		return err
	}
	mine := &lab{store, l.key, l.t}
	g, parent := newGuest(64*PageSize), base
	for n := range uint64(20) {
		g.set(n, bytes.Repeat([]byte{byte(seed + 1), byte(n)}, PageSize/2))
		opts := mine.options()
		opts.Parent = parent
		info, err := mine.write(g, []Range{{n % 7 * PageSize, PageSize}, {n%7*PageSize + 8*PageSize, PageSize}}, opts)
		if err != nil {
			return err
		}
		child, err := store.Open(context.Background(), info.ID, l.key)
		if err != nil {
			return err
		}
		if parent != base {
			if err := store.Delete(context.Background(), parent.Header().ID); err != nil {
				return err
			}
		}
		if err := errors.Join(tryAll(mine, info.ID), child.Close()); err != nil {
			return err
		}
		parent = child
	}
	return nil
}
