package snapshot

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"filippo.io/age"
)

// world is a store with some snapshots, as files to begin with again and again, and what every snapshot holds that was ever
// begun.
type world struct {
	tree    map[string][]byte
	key     *age.X25519Identity
	holds   map[ID]*held
	a, b, c ID // b is a diff of a, c of b; c needs no pack of b
}

// held is what a snapshot must hold, all of it.
type held struct {
	g    *guest
	disk *testDisk
}

// storeAt is where the store is in the tree: below directories that nobody needs to have made.
const storeAt = "var/lib/store"

const worldPages = 24

// newWorld makes the snapshots, and garbage as processes leave it that die.
func newWorld(t *testing.T) *world {
	t.Helper()
	dir := fastDir(t)
	w := &world{key: newKey(t), holds: map[ID]*held{}}
	l := w.lab(t, dir, quickFiles{})
	rnd := testRand(t)
	state := &held{newGuest(worldPages * PageSize), newTestDisk(0, true, 8*PageSize+512)}
	step := func(parent ID, pages ...uint64) ID {
		state = state.clone()
		for _, p := range pages {
			b := make([]byte, PageSize)
			fillRandom(rnd, b[:64+rnd.IntN(PageSize-64)])
			state.g.set(p, b)
		}
		id, err := w.write(l, state, pages, parent, 1)
		if err != nil {
			t.Fatal(err)
		}
		return id
	}
	w.a = step(ID{}, 0, 1, 2, 3, 4, 5, 6, 7)
	w.b = step(w.a, 2, 3, 12)
	w.c = step(w.b, 2, 3, 12, 13)
	for _, name := range []string{
		packName(NewID()), packName(NewID()), packDir + "/" + tempPrefix + NewID().String(),
		manifestDir + "/" + tempPrefix + NewID().String(), manifestDir + "/" + deletedPrefix + NewID().String(),
	} {
		writeFile(t, inDir(l.Dir(), name), bytes.Repeat([]byte("garbage"), 2000))
	}
	w.tree = readTree(t, dir)
	return w
}

func (h *held) clone() *held { return &held{h.g.clone(), h.disk.clone()} }

// lab is a lab of the store of a tree.
func (w *world) lab(t *testing.T, dir string, files fileSystem) *lab {
	t.Helper()
	s, err := OpenStore(filepath.Join(dir, filepath.FromSlash(storeAt)))
	if err != nil {
		t.Fatal(err)
	}
	s.files = files
	return &lab{s, w.key, t}
}

// write stores pages of a state, and a block of its disk for each of them.
func (w *world) write(l *lab, state *held, pages []uint64, parent ID, workers int) (ID, error) {
	ctx := context.Background()
	opts := l.options()
	opts.Workers, opts.ChunkSize = workers, 2*PageSize
	if !parent.IsZero() {
		r, err := l.Open(ctx, parent, l.key)
		if err != nil {
			return ID{}, err
		}
		defer r.Close()
		opts.Parent = r
	}
	writer, err := l.Create(ctx, opts)
	if err != nil {
		return ID{}, err
	}
	defer writer.Abort()
	w.holds[writer.ID()] = state
	contents := Contents{Memory: &Memory{Size: state.g.size, View: state.g.view}}
	d := Disk{Index: 0, Size: uint64(len(state.disk.content)), Layered: true, ReadAt: bytes.NewReader(state.disk.content).ReadAt}
	for _, p := range pages {
		contents.Memory.Data = append(contents.Memory.Data, Range{p * PageSize, PageSize})
		if p < 8 {
			copy(state.disk.block(p), fmt.Sprintf("block %d of %v", p, writer.ID()))
			state.disk.held[p] = true
			d.Data = append(d.Data, Range{p * PageSize, PageSize})
		}
	}
	contents.Disks = []Disk{d}
	if err := writer.Write(ctx, contents); err != nil {
		return ID{}, err
	}
	info, err := writer.Commit(ctx)
	return info.ID, err
}

// operation is something that is done to the store.
type operation struct {
	name    string
	empty   bool // the store is not there before
	changes bool // only what is there, or nobody sees
	removes func(*world) ID
	do      func(*world, *lab) (ID, error) // the snapshot that it made, if it made one
}

var operations = []operation{
	{name: "first", empty: true, do: func(w *world, l *lab) (ID, error) { return w.writeNew(l, ID{}, 1) }},
	{name: "full", do: func(w *world, l *lab) (ID, error) { return w.writeNew(l, ID{}, 2) }},
	{name: "diff", do: func(w *world, l *lab) (ID, error) { return w.writeNew(l, w.c, 1) }},
	{name: "flatten", do: func(w *world, l *lab) (ID, error) { return w.flatten(l) }},
	{
		name: "delete", removes: func(w *world) ID { return w.b },
		do: func(w *world, l *lab) (ID, error) { return ID{}, l.Delete(context.Background(), w.b) },
	},
	{
		name: "delete shared", removes: func(w *world) ID { return w.a },
		do: func(w *world, l *lab) (ID, error) { return ID{}, l.Delete(context.Background(), w.a) },
	},
	// To the same key: what is there has to open with it at any moment.
	{name: "rekey", changes: true, do: func(w *world, l *lab) (ID, error) { return ID{}, l.rekey(w.c, w.key, w.key.Recipient()) }},
	{name: "collect", changes: true, do: func(_ *world, l *lab) (ID, error) { return ID{}, collectGarbage(l) }},
}

// chosen are the operations to look at on a file system; with -short, as for the race detector, which has little to see here, one of them.
func chosen(base string) []operation {
	if !testing.Short() {
		return operations
	}
	return slices.DeleteFunc(slices.Clone(operations), func(op operation) bool {
		return base != "unnamed" || op.name != "rekey"
	})
}

func collectGarbage(l *lab) error {
	_, err := l.Collect(context.Background())
	return err
}

// writeNew stores a state that is like that of c, and new in some pages.
func (w *world) writeNew(l *lab, parent ID, workers int) (ID, error) {
	state := w.holds[w.c].clone()
	pages := []uint64{1, 3, 20}
	for _, p := range pages {
		state.g.set(p, bytes.Repeat([]byte{byte(p), 1, byte(len(w.holds))}, PageSize)[:PageSize])
	}
	if parent.IsZero() {
		pages = nil
		for p := range uint64(worldPages) {
			pages = append(pages, p)
		}
	}
	return w.write(l, state, pages, parent, workers)
}

func (w *world) flatten(l *lab) (ID, error) {
	r, err := l.Open(context.Background(), w.c, l.key)
	if err != nil {
		return ID{}, err
	}
	defer r.Close()
	opts := l.options()
	opts.Workers = 1
	info, err := l.Flatten(context.Background(), r, opts)
	if err == nil {
		w.holds[info.ID] = w.holds[w.c]
	}
	return info.ID, err
}

// known makes what Flatten has begun known to w: its id can't be had from Flatten, and it is a copy of c.
func (w *world) known(id ID) *held {
	if h := w.holds[id]; h != nil {
		return h
	}
	return w.holds[w.c]
}

// expectation is which snapshots must be there, and which others may be.
type expectation struct{ must, may map[ID]bool }

// before is what is there when an operation begins.
func (w *world) before(op *operation) expectation {
	e := expectation{map[ID]bool{}, map[ID]bool{}}
	if !op.empty {
		e.must = map[ID]bool{w.a: true, w.b: true, w.c: true}
	}
	return e
}

// during is what is there while it is under way.
func (w *world) during(op *operation) expectation {
	e := w.before(op)
	if op.removes != nil {
		delete(e.must, op.removes(w))
		e.may[op.removes(w)] = true
	}
	if !op.changes && op.removes == nil {
		e.may[ID{}] = true // one that is new
	}
	return e
}

// after is what is there when it has made the snapshot made.
func (w *world) after(op *operation, made ID) expectation {
	e := w.before(op)
	if op.removes != nil {
		delete(e.must, op.removes(w))
	}
	if !made.IsZero() {
		e.must[made] = true
	}
	return e
}

// check opens everything that a store lists, reads every byte of it, and compares it with what it should be.
func (w *world) check(l *lab, e expectation) error {
	entries, err := l.List()
	if err != nil {
		return fmt.Errorf("list: %w", err)
	}
	missing := maps.Clone(e.must)
	for _, entry := range entries {
		if !e.must[entry.ID] && !e.may[entry.ID] && !e.may[ID{}] {
			return fmt.Errorf("snapshot %v is there", entry.ID)
		}
		delete(missing, entry.ID)
		if err := w.checkSnapshot(l, entry.ID); err != nil {
			return fmt.Errorf("snapshot %v: %w", entry.ID, err)
		}
	}
	if len(missing) > 0 {
		return fmt.Errorf("of the snapshots %v are missing", missing)
	}
	return nil
}

func (w *world) checkSnapshot(l *lab, id ID) error {
	r, err := l.Open(context.Background(), id, l.key)
	if err != nil {
		return err
	}
	defer r.Close()
	rep, err := r.Verify(context.Background(), nil)
	if err = errors.Join(err, rep.Err()); err != nil {
		return err
	}
	h := w.known(id)
	if err := sameBytes(r, h); err != nil {
		return err
	}
	if len(r.Header().Packs) == 0 {
		return errors.New("it has no packs")
	}
	return nil
}

// sameBytes compares all of the memory and of the disk with what they should be.
func sameBytes(r *Reader, h *held) error {
	memory := &DiskReader{r: r}
	for what, d := range map[string]struct {
		from *DiskReader
		want func(page uint64) []byte
		n    int
	}{
		"page":  {memory, func(p uint64) []byte { return h.g.pages[p] }, worldPages},
		"block": {r.Disk(0), h.disk.block, len(h.disk.content)/PageSize + 1},
	} {
		for p := range uint64(d.n) {
			got, want := make([]byte, PageSize), make([]byte, PageSize)
			copy(want, d.want(p))
			if _, _, chunk, _ := d.from.Lookup(int64(p * PageSize)); chunk >= 0 {
				if _, err := d.from.readAt(got, int64(p*PageSize)); err != nil {
					return fmt.Errorf("%s %d: %w", what, p, err)
				}
			}
			if !bytes.Equal(got, want) {
				return fmt.Errorf("%s %d differs", what, p)
			}
		}
	}
	return nil
}

// checkUse wants the store to work on: garbage goes, snapshots come and go, and what should stay does.
func (w *world) checkUse(l *lab, e expectation) error {
	if err := w.checkCollect(l); err != nil {
		return err
	}
	parent := ID{}
	if e.must[w.c] {
		parent = w.c
	}
	id, err := w.writeNew(l, parent, 1)
	if err != nil {
		return fmt.Errorf("the next snapshot: %w", err)
	}
	if err := w.checkSnapshot(l, id); err != nil {
		return fmt.Errorf("the next snapshot: %w", err)
	}
	if err := l.Delete(context.Background(), id); err != nil {
		return fmt.Errorf("delete: %w", err)
	}
	delete(w.holds, id)
	if err := w.checkFiles(l); err != nil {
		return err
	}
	return w.check(l, e)
}

// checkCollect wants all garbage to go.
func (w *world) checkCollect(l *lab) error {
	if err := ageTemps(l); err != nil {
		return err
	}
	if err := collectGarbage(l); err != nil {
		return fmt.Errorf("collect: %w", err)
	}
	return w.checkFiles(l)
}

// checkFiles wants the manifests, the packs that they name, and nothing else.
func (w *world) checkFiles(l *lab) error {
	entries, err := l.List()
	if _, missing := os.Stat(l.Dir()); err != nil || errors.Is(missing, fs.ErrNotExist) {
		return err
	}
	want := map[string]bool{}
	for _, e := range entries {
		want[e.Path] = true
		for _, p := range e.Packs {
			want[l.PackPath(p)] = true
		}
	}
	got := l.files()
	if missing := slices.DeleteFunc(slices.Collect(maps.Keys(want)), func(p string) bool { return slices.Contains(got, p) }); len(missing) > 0 {
		return fmt.Errorf("missing are %v", missing)
	}
	if left := slices.DeleteFunc(got, func(p string) bool { return want[p] }); len(left) > 0 {
		return fmt.Errorf("left are %v", left)
	}
	return nil
}

// ageTemps makes temporary files so old that Collect takes them.
func ageTemps(l *lab) error {
	if _, err := os.Stat(l.Dir()); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	long := time.Now().Add(-2 * staleTemp)
	for _, f := range l.files() {
		if strings.HasPrefix(filepath.Base(f), tempPrefix) {
			if err := os.Chtimes(f, long, long); err != nil {
				return err
			}
		}
	}
	return nil
}

// quickFiles is the operating system's file system, of which nobody waits for the disk.
type quickFiles struct{ osFiles }

func (quickFiles) SyncDir(string) error { return nil }

func (q quickFiles) Stage(dir string) (stagedFile, error) {
	f, err := q.osFiles.Stage(dir)
	return quickStaged{f}, err
}

func (q quickFiles) Overwrite(path string) (overwrittenFile, error) {
	f, err := q.osFiles.Overwrite(path)
	return quickOverwritten{f}, err
}

type (
	quickStaged      struct{ stagedFile }
	quickOverwritten struct{ overwrittenFile }
)

func (quickStaged) Sync() error      { return nil }
func (quickOverwritten) Sync() error { return nil }

// fastDir is a directory for a test that makes thousands of files: in memory, where that can be had.
func fastDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "cryovisor-test-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}
