package lifecycle_test

import (
	"encoding/json"
	"os"
	"path/filepath"
	"testing"

	"filippo.io/age"

	"github.com/cryovisor/cryovisor/blockdev"
	"github.com/cryovisor/cryovisor/lifecycle"
	"github.com/cryovisor/cryovisor/snapshot"
)

// TestGoldenDisks reads the section of disks of a snapshot that must stay readable, and knows the base image again.
func TestGoldenDisks(t *testing.T) {
	const dir = "../testdata/golden/v1"
	b, err := os.ReadFile(filepath.Join(dir, "vectors.json"))
	if err != nil {
		t.Fatal(err)
	}
	var vectors []struct {
		Name  string
		ID    snapshot.ID
		Disks []struct{ Size int64 }
	}
	if err := json.Unmarshal(b, &vectors); err != nil {
		t.Fatal(err)
	}
	keys, err := os.Open(filepath.Join(dir, "keys", "x25519.txt"))
	if err != nil {
		t.Fatal(err)
	}
	defer keys.Close()
	identities, err := age.ParseIdentities(keys)
	if err != nil {
		t.Fatal(err)
	}
	store, err := snapshot.OpenStore(filepath.Join(dir, "store"))
	if err != nil {
		t.Fatal(err)
	}
	base, err := blockdev.OpenFile(filepath.Join(dir, "base.img"), blockdev.Options{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	defer base.Close()
	seen := 0
	for _, v := range vectors {
		if len(v.Disks) == 0 {
			continue
		}
		seen++
		r, err := store.Open(t.Context(), v.ID, identities...)
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		disks, err := lifecycle.DisksOf(r)
		if err != nil || len(disks) != len(v.Disks) || disks[0].Base == nil || disks[1].Base != nil {
			t.Fatalf("%s: %+v, %v", v.Name, disks, err)
		}
		id, err := blockdev.Identify(t.Context(), base)
		if err != nil || id != disks[0].Base.Identity() {
			t.Errorf("%s: base image %v, want %v (%v)", v.Name, id, disks[0].Base.Identity(), err)
		}
		for i, d := range disks {
			if d.Size != v.Disks[i].Size {
				t.Errorf("%s: disk %s has %d bytes", v.Name, d.Name, d.Size)
			}
		}
	}
	if seen == 0 {
		t.Error("no golden snapshot has disks")
	}
}
