package snapshot

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// crashModel is a file system as POSIX promises it to somebody who loses power: what was not synced may be there, or
// not, or in part, and in any order. It is a tree of nodes, each with what is on stable storage and what is on its way.
type crashModel struct {
	root *node
	open map[int]*node // files that are being written, by a number
}

// node is a file or a directory.
type node struct {
	dir bool
	// Of a file: what it has, what of that is durable, and the writes since.
	cached, durable []byte
	pending         []pendingWrite
	failed          bool // a sync: what was pending then may be lost even if a later one succeeds
	// Of a directory.
	names, durableNames map[string]*node
	changes             []dirChange // not synced yet
}

type pendingWrite struct {
	at   int
	data []byte
}

// dirChange puts a node under a name, or takes it from one; a rename does both.
type dirChange struct {
	node         *node
	add, removed string // "": not that
}

// newCrashModel has the contents of a real directory, all of it durable.
func newCrashModel(tree map[string][]byte) *crashModel {
	m := &crashModel{root: newDirNode(), open: map[int]*node{}}
	for _, path := range slices.Sorted(maps.Keys(tree)) { // directories before what is in them
		d, name := m.at(path)
		n := &node{cached: tree[path], durable: tree[path]}
		if tree[path] == nil {
			n = newDirNode()
		}
		d.names[name], d.durableNames[name] = n, n
	}
	return m
}

func newDirNode() *node {
	return &node{dir: true, names: map[string]*node{}, durableNames: map[string]*node{}}
}

// readTree returns the contents of all files below dir, by their paths in it. Those of directories are nil.
func readTree(t testing.TB, dir string) map[string][]byte {
	t.Helper()
	tree := map[string][]byte{}
	err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || path == dir {
			return err
		}
		rel, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		rel = filepath.ToSlash(rel)
		if tree[rel] = nil; d.IsDir() {
			return nil
		}
		b, err := os.ReadFile(path)
		tree[rel] = append([]byte{}, b...)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return tree
}

// at returns the directory of a path, as it is now, and the last element.
func (m *crashModel) at(path string) (*node, string) {
	n := m.root
	parts := strings.Split(path, "/")
	for _, name := range parts[:len(parts)-1] {
		if n = n.names[name]; n == nil {
			panic("crash model: no directory for " + path)
		}
	}
	return n, parts[len(parts)-1]
}

func (m *crashModel) lookup(path string) *node {
	if path == "." {
		return m.root
	}
	d, name := m.at(path)
	return d.names[name]
}

func (m *crashModel) add(path string, n *node) {
	d, name := m.at(path)
	d.names[name] = n
	d.changes = append(d.changes, dirChange{node: n, add: name})
}

func (m *crashModel) remove(path string) {
	d, name := m.at(path)
	d.changes = append(d.changes, dirChange{node: d.names[name], removed: name})
	delete(d.names, name)
}

// rename is within one directory.
func (m *crashModel) rename(from, to string) {
	d, old := m.at(from)
	_, name := m.at(to)
	n := d.names[old]
	d.changes = append(d.changes, dirChange{node: n, add: name, removed: old})
	delete(d.names, old)
	d.names[name] = n
}

func (m *crashModel) syncDir(path string) {
	n := m.lookup(path)
	n.durableNames, n.changes = maps.Clone(n.names), nil
}

func (n *node) write(at int, p []byte) {
	p = bytes.Clone(p)
	n.cached = patched(n.cached, at, p)
	n.pending = append(n.pending, pendingWrite{at, p})
}

func (n *node) sync() {
	if !n.failed {
		n.durable, n.pending = n.cached, nil
	}
}

// patched returns a copy of b with p at an offset.
func patched(b []byte, at int, p []byte) []byte {
	out := make([]byte, max(len(b), at+len(p)))
	copy(out, b)
	copy(out[at:], p)
	return out
}

// A decider says of each thing that was not synced whether it survives. It is asked in a fixed order.
type decider interface {
	// change says what of a change of a directory survives: 0 nothing, 1 all, 2 of a rename only the new name.
	change(c dirChange) int
	// contents returns what is in a file of which writes are pending.
	contents(n *node) []byte
}

// survivors is the tree that is left, as readTree would return it.
func (m *crashModel) survivors(d decider) map[string][]byte {
	tree := map[string][]byte{}
	m.root.survive(d, "", tree)
	return tree
}

func (n *node) survive(d decider, prefix string, tree map[string][]byte) {
	left := maps.Clone(n.durableNames)
	for _, c := range n.changes {
		how := d.change(c)
		// What concerns one name happens in order: a name that was never given can't be taken away.
		if how == 1 && c.removed != "" && left[c.removed] == c.node {
			delete(left, c.removed)
		}
		if how != 0 && c.add != "" {
			left[c.add] = c.node
		}
	}
	for _, name := range slices.Sorted(maps.Keys(left)) {
		child := left[name]
		switch {
		case child.dir:
			tree[prefix+name] = nil
			child.survive(d, prefix+name+"/", tree)
		case len(child.pending) == 0:
			tree[prefix+name] = append([]byte{}, child.durable...)
		default:
			tree[prefix+name] = append([]byte{}, d.contents(child)...)
		}
	}
}

// torn is what a file may have of which nothing since the last sync is certain: any length since, and of each page that was
// written the old or the new, or the beginning of the new.
func (n *node) torn(rnd *rand.Rand) []byte {
	size := len(n.cached)
	if rnd.IntN(2) == 0 {
		size = len(n.durable) + rnd.IntN(len(n.cached)-len(n.durable)+1)
	}
	out := make([]byte, size)
	copy(out, n.durable)
	for _, w := range n.pending {
		for page := w.at / PageSize; page*PageSize < min(w.at+len(w.data), size); page++ {
			from, to := max(page*PageSize, w.at), min((page+1)*PageSize, w.at+len(w.data), size)
			if from >= to {
				break
			}
			switch rnd.IntN(3) {
			case 0:
				to = from
			case 1:
				to = from + rnd.IntN(to-from+1)
			}
			copy(out[from:to], w.data[from-w.at:])
		}
	}
	return out
}

// pendingChanges is how many changes of directories have not been synced.
func (m *crashModel) pendingChanges() int { return m.root.countChanges() }

func (n *node) countChanges() int {
	count := len(n.changes)
	for _, name := range slices.Sorted(maps.Keys(n.durableNames)) {
		count += n.durableNames[name].countChanges()
	}
	for name, child := range n.names {
		if n.durableNames[name] != child {
			count += child.countChanges()
		}
	}
	return count
}

// writeTree makes a directory of what survived.
func writeTree(t testing.TB, dir string, tree map[string][]byte) {
	t.Helper()
	for _, path := range slices.Sorted(maps.Keys(tree)) {
		full := filepath.Join(dir, filepath.FromSlash(path))
		if tree[path] == nil {
			if err := os.MkdirAll(full, dirMode); err != nil {
				t.Fatal(err)
			}
			continue
		}
		writeFile(t, full, tree[path])
	}
}

// sumOf identifies a tree, but for what is in files that nobody looks into.
func sumOf(tree map[string][]byte) (sum [sha256.Size]byte) {
	h := sha256.New()
	for _, path := range slices.Sorted(maps.Keys(tree)) {
		fmt.Fprintf(h, "%s %v ", path, tree[path] == nil)
		if !strings.Contains(path, tempPrefix) && !strings.Contains(path, deletedPrefix) {
			fmt.Fprintf(h, "%x", sha256.Sum256(tree[path]))
		}
	}
	h.Sum(sum[:0])
	return sum
}
