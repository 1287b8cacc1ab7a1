//go:build linux && amd64

package lifecycle_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/cryovisor/cryovisor/lifecycle"
	"github.com/cryovisor/cryovisor/snapshot"
)

// kinds are the problems that Fsck finds in a directory.
func kinds(t *testing.T, dir string, opts lifecycle.FsckOptions) []lifecycle.ProblemKind {
	t.Helper()
	report, err := lifecycle.Fsck(t.Context(), dir, opts)
	if err != nil {
		t.Fatal(err)
	}
	var found []lifecycle.ProblemKind
	for _, p := range report.Problems {
		t.Logf("%+v", p)
		found = append(found, p.Kind)
	}
	return found
}

// TestFsck breaks a directory in one way after another, and has that found and repaired.
func TestFsck(t *testing.T) {
	m := newManager(t, lifecycle.ManagerOptions{})
	a, b := m.create(t, lifecycle.CreateOptions{}), m.create(t, lifecycle.CreateOptions{})
	m.mark(t, a, 1)
	m.mark(t, b, 2)
	pause(t, a)
	pause(t, b)
	store, err := snapshot.OpenStore(filepath.Join(m.dir, "store"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := lifecycle.Fsck(t.Context(), m.dir, lifecycle.FsckOptions{}); !errors.Is(err, lifecycle.ErrLocked) {
		t.Errorf("while a Manager has it: %v", err)
	}
	if err := m.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	deep, repair := lifecycle.FsckOptions{Deep: true}, lifecycle.FsckOptions{Repair: true, Deep: true}
	want := func(what string, opts lifecycle.FsckOptions, want ...lifecycle.ProblemKind) {
		t.Helper()
		if got := kinds(t, m.dir, opts); !slices.Equal(got, want) {
			t.Errorf("%s: found %v, want %v", what, got, want)
		}
	}
	want("nothing", deep)

	overlay := filepath.Join(m.dir, "disks", "root-x.overlay")
	pack := store.PackPath(snapshot.NewID())
	if err := errors.Join(os.MkdirAll(filepath.Dir(overlay), 0o700), os.WriteFile(overlay, nil, 0o600), os.WriteFile(pack, nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	want("orphans", deep, lifecycle.ProblemOrphan, lifecycle.ProblemOrphan)
	want("orphans", repair, lifecycle.ProblemOrphan, lifecycle.ProblemOrphan)
	want("orphans, repaired", deep)

	flip(t, packOf(t, store, manifestOf(t, m, b)))
	want("a pack", lifecycle.FsckOptions{})
	want("a pack", deep, lifecycle.ProblemDamaged)
	want("a pack, which can't be repaired", repair, lifecycle.ProblemDamaged)
	flip(t, packOf(t, store, manifestOf(t, m, b)))

	flip(t, store.ManifestPath(manifestOf(t, m, b)))
	want("a manifest", deep, lifecycle.ProblemDamaged)
	flip(t, store.ManifestPath(manifestOf(t, m, b)))

	keys := filepath.Join(m.dir, "keys", "master.txt")
	if err := os.Rename(keys, keys+".away"); err != nil {
		t.Fatal(err)
	}
	if _, err := lifecycle.Fsck(t.Context(), m.dir, deep); !errors.Is(err, lifecycle.ErrKey) {
		t.Errorf("without a master key: %v", err)
	}
	if _, err := lifecycle.OpenLocalKeys(keys); err != nil { // another's
		t.Fatal(err)
	}
	want("another's key", deep, lifecycle.ProblemKey, lifecycle.ProblemKey, lifecycle.ProblemKey)
	if err := os.Rename(keys+".away", keys); err != nil {
		t.Fatal(err)
	}

	if err := os.Remove(store.ManifestPath(manifestOf(t, m, a))); err != nil {
		t.Fatal(err)
	}
	m.Manager = openManager(t, m.dir, m.clock, lifecycle.ManagerOptions{}).Manager // it opens, for the others' sake
	if info, err := m.Get(a.ID()); err != nil || info.LastError == "" {
		t.Errorf("%+v, %v", info, err)
	}
	if _, _, err := m.Connect(t.Context(), a.ID(), lifecycle.ConnectOptions{}); !errors.Is(err, snapshot.ErrNotFound) {
		t.Errorf("without a manifest: %v", err)
	}
	connect(t, mustSandbox(t, m, b.ID()))
	m.wantMark(t, mustSandbox(t, m, b.ID()), 2)
	if err := m.Close(context.Background()); err != nil {
		t.Fatal(err)
	}
	want("no manifest", deep, lifecycle.ProblemMissing, lifecycle.ProblemOrphan)
	want("no manifest", repair, lifecycle.ProblemMissing, lifecycle.ProblemOrphan)
	want("no manifest, repaired", deep)
	m.Manager = openManager(t, m.dir, m.clock, lifecycle.ManagerOptions{}).Manager
	if _, err := m.Get(a.ID()); !errors.Is(err, lifecycle.ErrNotFound) {
		t.Errorf("repaired: %v", err)
	}
	if _, err := lifecycle.Fsck(t.Context(), t.TempDir(), deep); err == nil {
		t.Error("an empty directory was checked")
	}
}

// manifestOf is the snapshot of a sandbox, in a directory that no Manager has.
func manifestOf(t *testing.T, m *managed, s *lifecycle.Sandbox) snapshot.ID {
	t.Helper()
	id, err := lifecycle.SnapshotOf(t.Context(), m.dir, s.ID())
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// packOf is a pack that only one snapshot has.
func packOf(t *testing.T, store *snapshot.Store, id snapshot.ID) string {
	t.Helper()
	entries, err := store.List()
	if err != nil {
		t.Fatal(err)
	}
	users := make(map[snapshot.ID]int)
	for _, e := range entries {
		for _, p := range e.Packs {
			users[p]++
		}
	}
	for _, e := range entries {
		for _, p := range e.Packs {
			if e.ID == id && users[p] == 1 {
				return store.PackPath(p)
			}
		}
	}
	t.Fatal("the snapshot shares all of its packs")
	return ""
}

// flip changes the last byte of a file, and changes it back.
func flip(t *testing.T, path string) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	b[len(b)-1] ^= 1
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}
