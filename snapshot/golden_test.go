package snapshot

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"filippo.io/age"
	"filippo.io/age/agessh"

	"github.com/cryovisor/cryovisor/internal/secondreader"
)

// goldenDir holds snapshots of version 1 of the format, and what a reader must make of them. They were written once, by
// makeGolden, and stay: every later version must read them.
const (
	goldenDir   = "../testdata/golden/v1"
	goldenStore = goldenDir + "/store"
)

var makeGoldens = flag.Bool("update", false, "write testdata/golden/v1, which must not exist")

// vector is one snapshot, perhaps after it was damaged, and what a reader must make of it.
type vector struct {
	Name  string   `json:"name"`
	ID    ID       `json:"id"`
	Keys  []string `json:"keys,omitempty"`  // files of keys/ that the reader is given
	Edits []edit   `json:"edits,omitempty"` // of a copy of store/
	// Want is "ok" or the class of error: ErrFormat, ErrVersion, ErrCorrupt, ErrKey or ErrNotFound; two with a "|" between
	// them if which one is up to the reader.
	Want string `json:"want"`
	// Restore is the same for restoring a machine by a reader that knows the critical sections "disks" and "golden/state",
	// both of version 1. It is given where Want is "ok".
	Restore string `json:"restore,omitempty"`
	// Memory is the SHA-256 of all pages that are not zero, ascending: for each its number in 8 bytes, and its contents.
	Memory string       `json:"memory,omitempty"`
	Disks  []vectorDisk `json:"disks,omitempty"`
}

type vectorDisk struct {
	Size   int64  `json:"size"`
	Base   string `json:"base,omitempty"` // a file
	SHA256 string `json:"sha256"`         // of the disk's contents
}

// edit damages a file of a store. What it says is done in the order of its fields. Offsets below 0 count from the end.
type edit struct {
	File     string `json:"file"`
	Copy     string `json:"copy,omitempty"`     // the file becomes a copy of this one
	Remove   bool   `json:"remove,omitempty"`   // or is removed
	Truncate *int   `json:"truncate,omitempty"` // or is cut off there
	At       int    `json:"at,omitempty"`
	Put      string `json:"put,omitempty"`    // hex digits of bytes that are put at At
	Xor      byte   `json:"xor,omitempty"`    // the byte at At is changed by these bits
	Append   string `json:"append,omitempty"` // hex digits of what is appended
	Reseal   bool   `json:"reseal,omitempty"` // the header gets the checksum that fits
}

func (e *edit) apply(t *testing.T, dir string) {
	t.Helper()
	path := filepath.Join(dir, e.File)
	if e.Remove {
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		return
	}
	from := e.File
	if e.Copy != "" {
		from = e.Copy
	}
	b := readFile(t, filepath.Join(dir, from))
	if e.Truncate != nil {
		b = b[:from0(*e.Truncate, len(b))]
	}
	at := from0(e.At, len(b))
	copy(b[at:], unhex(t, e.Put))
	if e.Xor != 0 {
		b[at] ^= e.Xor
	}
	b = append(b, unhex(t, e.Append)...)
	if e.Reseal {
		reseal(b[:binary.LittleEndian.Uint32(b[12:])])
	}
	writeFile(t, path, b)
}

func from0(at, size int) int {
	if at < 0 {
		return at + size
	}
	return at
}

func unhex(t *testing.T, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func readVectors(t testing.TB) (vectors []vector) {
	t.Helper()
	if err := json.Unmarshal(readFile(t, filepath.Join(goldenDir, "vectors.json")), &vectors); err != nil {
		t.Fatal(err)
	}
	return vectors
}

var goldenClasses = map[string]error{
	"ErrFormat": ErrFormat, "ErrVersion": ErrVersion, "ErrCorrupt": ErrCorrupt, "ErrKey": ErrKey, "ErrNotFound": ErrNotFound,
}

// TestGolden: this version of the program reads every snapshot of version 1, and refuses every damaged one for the right
// reason, and so does a reader that was written from docs/FORMAT.md alone. If it fails, mend the program: the snapshots
// that people have will not change. Only vectors of a new version are added, in a directory of their own.
func TestGolden(t *testing.T) {
	if *makeGoldens {
		makeGolden(t)
	}
	vectors := readVectors(t)
	covered := map[string]int{}
	for _, v := range vectors {
		for class := range strings.SplitSeq(v.Want, "|") {
			covered[class]++
		}
		t.Run(v.Name, func(t *testing.T) { v.run(t) })
	}
	for class, least := range map[string]int{"ok": 15, "ErrFormat": 30, "ErrVersion": 3, "ErrCorrupt": 30, "ErrKey": 4, "ErrNotFound": 1} {
		if covered[class] < least {
			t.Errorf("%d vectors for %s; some are lost", covered[class], class)
		}
	}
}

func (v *vector) run(t *testing.T) {
	dir := goldenStore
	if len(v.Edits) > 0 {
		dir = v.damaged(t)
	}
	keys := goldenKeys(t, v.Keys)
	restore, err := v.read(t, dir, keys)
	v.check(t, "this reader", v.Want, err)
	if v.Want == "ok" {
		v.check(t, "this reader, to restore", v.Restore, restore)
	}
	restore, err = v.readSecond(t, dir, keys)
	switch {
	case (err == nil) != (v.Want == "ok") || v.Want == "ok" && (restore == nil) != (v.Restore == "ok"):
		t.Errorf("second reader: %v, to restore: %v; want %s", err, restore, v.Want)
	case errors.Is(err, secondreader.ErrNewer) != (v.Want == "ErrVersion"):
		t.Errorf("second reader: %v, want %s", err, v.Want)
	}
}

// damaged returns a store with what the snapshot and the edits need, and the edits done. Nothing else may be missing: that
// would be damage too.
func (v *vector) damaged(t *testing.T) (dir string) {
	dir = t.TempDir()
	manifests := []string{manifestName(v.ID)}
	for _, e := range v.Edits {
		manifests = append(manifests, e.File, e.Copy)
	}
	names := slices.Clone(manifests)
	for _, name := range manifests {
		b, err := os.ReadFile(filepath.Join(goldenStore, name))
		if err != nil || !strings.HasSuffix(name, manifestExt) {
			continue
		}
		h, err := parseHeader(b)
		if err != nil {
			t.Fatal(err)
		}
		for _, id := range h.Packs {
			names = append(names, packName(id))
		}
	}
	for _, sub := range []string{manifestDir, packDir} {
		if err := os.Mkdir(filepath.Join(dir, sub), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range names {
		if b, err := os.ReadFile(filepath.Join(goldenStore, name)); err == nil {
			writeFile(t, filepath.Join(dir, name), b)
		}
	}
	for _, e := range v.Edits {
		e.apply(t, dir)
	}
	return dir
}

func (v *vector) check(t *testing.T, who, want string, err error) {
	t.Helper()
	if want == "ok" {
		if err != nil {
			t.Errorf("%s: %v", who, err)
		}
		return
	}
	fits := false
	for class := range strings.SplitSeq(want, "|") {
		fits = fits || errors.Is(err, goldenClasses[class])
	}
	if !fits {
		t.Errorf("%s: %v, want %s", who, err, want)
	}
	for name, class := range goldenClasses {
		if errors.Is(err, class) && !strings.Contains(want, name) {
			t.Errorf("%s: %v, which is %s besides %s", who, err, name, want)
		}
	}
}

// read reads the snapshot's memory and disks with this package.
func (v *vector) read(t *testing.T, dir string, keys []age.Identity) (restore, err error) {
	ctx := context.Background()
	s, err := OpenStore(dir)
	if err != nil {
		t.Fatal(err)
	}
	r, err := s.Open(ctx, v.ID, keys...)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	pages := map[uint64][]byte{}
	for c := range r.Chunks() {
		err := r.Fetch(ctx, c, func(gpa uint64, b []byte) error {
			for at := uint64(0); at < uint64(len(b)); at += PageSize {
				pages[(gpa+at)/PageSize] = bytes.Clone(b[at:][:PageSize])
			}
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	if rep, err := r.Verify(ctx, nil); err != nil || rep.Err() != nil {
		t.Errorf("Verify: %v, %v", rep.Err(), err)
	}
	v.same(t, "this reader: memory", digestPages(pages), v.Memory)
	for i, d := range v.Disks {
		b, err := readGoldenDisk(r.Disk(i), d.Size, goldenBase(t, d.Base))
		if err != nil {
			return nil, err
		}
		v.same(t, fmt.Sprintf("this reader: disk %d", i), digest(b), d.SHA256)
	}
	return r.CheckSections(func(name string, version uint32) bool {
		return version == 1 && (name == "disks" || name == "golden/state")
	}), nil
}

// readSecond is read with the other reader.
func (v *vector) readSecond(t *testing.T, dir string, keys []age.Identity) (restore, err error) {
	s, err := secondreader.Open(dir, v.ID.String(), keys...)
	if err != nil {
		return nil, err
	}
	pages := map[uint64][]byte{}
	err = s.Memory(func(page uint64, b []byte) error {
		pages[page] = b
		return nil
	})
	if err != nil {
		return nil, err
	}
	v.same(t, "second reader: memory", digestPages(pages), v.Memory)
	for i, d := range v.Disks {
		b, err := s.Disk(i, goldenBase(t, d.Base))
		if err != nil {
			return nil, err
		}
		v.same(t, fmt.Sprintf("second reader: disk %d", i), digest(b), d.SHA256)
	}
	return s.CanRestore("golden/state"), nil
}

func (v *vector) same(t *testing.T, what, got, want string) {
	t.Helper()
	if v.Want == "ok" && got != want {
		t.Errorf("%s is %s, want %s", what, got, want)
	}
}

func goldenBase(t *testing.T, name string) []byte {
	if name == "" {
		return nil
	}
	return readFile(t, filepath.Join(goldenDir, name))
}

// readGoldenDisk returns the first size bytes of a disk.
func readGoldenDisk(d *DiskReader, size int64, base []byte) ([]byte, error) {
	b := make([]byte, (size+PageSize-1)/PageSize*PageSize)
	copy(b, base)
	for at := int64(0); at < size; {
		_, n, chunk, within := d.Lookup(at)
		n = min(n, int64(len(b))-at)
		if chunk >= 0 {
			plain, err := d.ReadChunk(chunk)
			if err != nil {
				return nil, err
			}
			copy(b[at:at+n], plain[within:])
		}
		at += n
	}
	return b[:size], nil
}

func digest(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

// digestPages is vector.Memory.
func digestPages(pages map[uint64][]byte) string {
	var numbers []uint64
	for n, b := range pages {
		if !allZero(b) {
			numbers = append(numbers, n)
		}
	}
	slices.Sort(numbers)
	h := sha256.New()
	for _, n := range numbers {
		h.Write(binary.LittleEndian.AppendUint64(nil, n))
		h.Write(pages[n])
	}
	return hex.EncodeToString(h.Sum(nil))
}

// goldenKeys reads identities from keys/.
func goldenKeys(t testing.TB, names []string) (keys []age.Identity) {
	t.Helper()
	for _, name := range names {
		b := readFile(t, filepath.Join(goldenDir, "keys", name))
		var key age.Identity
		var err error
		switch {
		case strings.HasPrefix(name, "passphrase"):
			key, err = age.NewScryptIdentity(string(b))
		case strings.HasPrefix(name, "ssh"):
			key, err = agessh.ParseIdentity(b)
		default:
			var parsed []age.Identity
			if parsed, err = age.ParseIdentities(bytes.NewReader(b)); err == nil {
				key = parsed[0]
			}
		}
		if err != nil {
			t.Fatal(err)
		}
		keys = append(keys, key)
	}
	return keys
}
