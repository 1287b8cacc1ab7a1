package snapshot_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"filippo.io/age"
	"github.com/pierrec/lz4/v4"

	"github.com/cryovisor/cryovisor/snapshot"
)

// plainReader reads a snapshot by docs/FORMAT.md alone, with age, LZ4 and the
// offsets that the document gives: it shares no code with the package.
type plainReader struct {
	dir  string
	body []byte
}

var le = binary.LittleEndian

func (r *plainReader) open(manifest []byte, key age.Identity) error {
	size := le.Uint32(manifest[12:])
	header := manifest[:size]
	sum := sha256.Sum256(header[:size-32])
	if string(header[:8]) != "\x89CRYO\r\n\x1a" || le.Uint32(header[8:]) != 1 || !bytes.Equal(sum[:], header[size-32:]) {
		return fmt.Errorf("bad header % x", header)
	}
	plain, err := age.Decrypt(bytes.NewReader(manifest[size:]), key)
	if err != nil {
		return err
	}
	if r.body, err = io.ReadAll(plain); err != nil {
		return err
	}
	if string(r.body[:8]) != "CRYOBODY" || !bytes.Equal(r.body[8:40], sum[:]) {
		return fmt.Errorf("body is not the header's")
	}
	return nil
}

// memory returns the first size bytes of guest memory.
func (r *plainReader) memory(size int) ([]byte, error) {
	packs, chunks, extents := int(le.Uint32(r.body[40:])), int(le.Uint32(r.body[44:])), int(le.Uint32(r.body[48:]))
	chunkTable := r.body[64+128*packs:]
	extentTable := chunkTable[24*chunks:]
	var plain [][]byte
	for p := range packs {
		b, err := r.pack(r.body[64+128*p:][:128])
		if err != nil {
			return nil, err
		}
		plain = append(plain, b)
	}
	mem := make([]byte, size)
	for i := range extents {
		e := extentTable[20*i:]
		page, count, chunk, first := le.Uint64(e), le.Uint32(e[8:]), le.Uint32(e[12:]), le.Uint32(e[16:])
		c := chunkTable[24*chunk:]
		stored := plain[le.Uint32(c[8:])][le.Uint64(c):][:le.Uint32(c[12:])]
		pages := make([]byte, 4096*le.Uint32(c[16:]))
		switch le.Uint32(c[20:]) {
		case 1:
			copy(pages, stored)
		case 2:
			if n, err := lz4.UncompressBlock(stored, pages); err != nil || n != len(pages) {
				return nil, fmt.Errorf("chunk %d: %d bytes, %w", chunk, n, err)
			}
		}
		copy(mem[4096*page:], pages[4096*first:4096*(first+count)])
	}
	return mem, nil
}

// pack returns the plaintext of the pack of a record.
func (r *plainReader) pack(rec []byte) ([]byte, error) {
	f, err := os.ReadFile(filepath.Join(r.dir, "packs", fmt.Sprintf("%x.pack", rec[:16])))
	if err != nil {
		return nil, err
	}
	key, err := age.ParseX25519Identity(string(rec[48:122]))
	if err != nil {
		return nil, err
	}
	plain, err := age.Decrypt(bytes.NewReader(f), key)
	if err != nil {
		return nil, err
	}
	b, err := io.ReadAll(plain)
	if err != nil {
		return nil, err
	}
	want := append([]byte("CRYOPACK\x01\x00\x00\x00\x00\x00\x00\x00"), rec[16:32]...)
	want = append(want, rec[:16]...)
	if le.Uint64(rec[32:]) != uint64(len(b)) || le.Uint64(rec[40:]) != uint64(len(f)) || !bytes.HasPrefix(b, want) {
		return nil, fmt.Errorf("pack %x is not what its record says", rec[:16])
	}
	return b, nil
}

// TestFormatDocument restores a full snapshot and a diff of it by the document.
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
	r := plainReader{dir: store.Dir()}
	if err := r.open(manifest, key); err != nil {
		t.Fatal(err)
	}
	got, err := r.memory(len(mem))
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
	section := r.body[len(r.body)-16-len("config2 vCPUs"):]
	if want := "\x06\x01\x00\x00\x01\x00\x00\x00\x07\x00\x00\x00\x00\x00\x00\x00config2 vCPUs"; string(section) != want {
		t.Errorf("section %q", section)
	}
}
