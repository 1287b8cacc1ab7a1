package snapshot_test

import (
	"bytes"
	"encoding/binary"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"filippo.io/age"
	"github.com/cryovisor/cryovisor/internal/secondreader"
	"github.com/cryovisor/cryovisor/snapshot"
)

var le = binary.LittleEndian

// TestFormatDocument restores a full snapshot and a diff of it, as they are written today, with a reader that was written
// from docs/FORMAT.md alone.
func TestFormatDocument(t *testing.T) {
	store, key, cleanup := tempStore()
	defer cleanup()
	rnd := rand.New(rand.NewPCG(1, 2))
	mem := make([]byte, 4<<20)
	for at := 0; at < len(mem); at += 4096 * (1 + rnd.IntN(3)) {
		for i := range 4096 {
			mem[at+i] = byte(rnd.IntN(1 + rnd.IntN(256)))
		}
	}
	opts := snapshot.Options{Recipients: []age.Recipient{key.Recipient()}}
	full, err := save(store, opts, mem, snapshot.Range{Len: uint64(len(mem))})
	if err != nil {
		t.Fatal(err)
	}
	checkDocument(t, store, key, full.ID, mem)

	if opts.Parent, err = store.Open(t.Context(), full.ID, key); err != nil {
		t.Fatal(err)
	}
	defer opts.Parent.Close()
	var dirty []snapshot.Range
	for at := 0; at < len(mem); at += 32 << 10 {
		clear(mem[at:][:4096])
		copy(mem[at+4096:], "written since")
		dirty = append(dirty, snapshot.Range{GPA: uint64(at), Len: 8192})
	}
	diff, err := save(store, opts, mem, dirty...)
	if err != nil {
		t.Fatal(err)
	}
	checkDocument(t, store, key, diff.ID, mem)
}

func checkDocument(t *testing.T, store *snapshot.Store, key age.Identity, id snapshot.ID, mem []byte) {
	t.Helper()
	manifest, err := os.ReadFile(filepath.Join(store.Dir(), "snapshots", id.String()+".cryo"))
	if err != nil {
		t.Fatal(err)
	}
	r, err := secondreader.Open(store.Dir(), id.String(), key)
	if err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(mem))
	err = r.Memory(func(page uint64, b []byte) error {
		copy(got[4096*page:], b)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, mem) {
		t.Error("memory read by the document differs")
	}
	// The fields of the header, and the one section, where the document says.
	e, err := store.Header(id)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(manifest[20:36], id[:]) || !bytes.Equal(manifest[36:52], e.Parent[:]) ||
		le.Uint64(manifest[60:]) != uint64(len(mem)) || le.Uint64(manifest[84:]) != e.PagesMapped ||
		le.Uint64(manifest[52:]) != uint64(e.Created.UnixNano()) || le.Uint32(manifest[92:]) != uint32(len(e.Packs)) {
		t.Errorf("header % x is not %v", manifest[:104], e)
	}
	plain, err := age.Decrypt(bytes.NewReader(manifest[le.Uint32(manifest[12:]):]), key)
	if err != nil {
		t.Fatal(err)
	}
	body, err := io.ReadAll(plain)
	if err != nil {
		t.Fatal(err)
	}
	section := body[len(body)-16-len("config2 vCPUs"):]
	if want := "\x06\x01\x00\x00\x01\x00\x00\x00\x07\x00\x00\x00\x00\x00\x00\x00config2 vCPUs"; string(section) != want {
		t.Errorf("section %q", section)
	}
}
