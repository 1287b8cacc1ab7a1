//go:build unix

package snapshot

import (
	"encoding/binary"
	"fmt"
	"runtime"
	"slices"
	"testing"

	"filippo.io/age"
)

// TestSharesAgree damages large tables where the parts of two goroutines meet: several of them must find what one finds.
func TestSharesAgree(t *testing.T) {
	key, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	const goroutines = 3
	tables := bigTables(6, key.String())
	good := tables.marshal()
	chunksAt := bodyFixed + len(tables.packs)*packRecBytes
	extentsAt := chunksAt + len(tables.chunks)*chunkRecBytes
	agree := func(what string, b []byte) error {
		one, want := parseWith(1, b)
		several, got := parseWith(goroutines, b)
		if fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("%s: %v, want %v", what, got, want)
		} else if got == nil && (one.mapped != several.mapped || one.blocks != several.blocks ||
			one.maxStored != several.maxStored || one.maxPages != several.maxPages) {
			t.Errorf("%s: the sums are not the same", what)
		}
		return got
	}
	if err := agree("undamaged", good); err != nil {
		t.Fatal(err)
	}
	refused, step := 0, 4
	if testing.Short() {
		step = 12
	}
	for _, table := range []struct {
		name              string
		at, records, size int
	}{
		{"chunk", chunksAt, len(tables.chunks), chunkRecBytes},
		{"extent", extentsAt, len(tables.extents), extentRecBytes},
	} {
		if table.records < goroutines*share {
			t.Fatalf("%d of table %s are too few", table.records, table.name)
		}
		b := slices.Clone(good)
		for record := 0; record < table.records; record += 1000 {
			binary.LittleEndian.PutUint32(b[table.at+record*table.size+8:], none)
		}
		if agree("damage all over "+table.name, b) == nil {
			t.Errorf("damage all over table %s passes", table.name)
		}
		for boundary := range goroutines - 1 {
			record := (boundary + 1) * table.records / goroutines
			for field := table.at + (record-1)*table.size; field < table.at+(record+1)*table.size; field += step {
				was := binary.LittleEndian.Uint32(good[field:])
				for _, is := range []uint32{0, none, was - 1, was + 1, was + 1<<15} {
					b := slices.Clone(good)
					binary.LittleEndian.PutUint32(b[field:], is)
					if agree(fmt.Sprintf("%d instead of %d, at byte %d for %s %d", is, was, field, table.name, record), b) != nil {
						refused++
					}
				}
			}
		}
	}
	if refused < 400/step {
		t.Errorf("only %d were refused", refused)
	}
	b := slices.Clone(good) // on both sides of a boundary
	for i := len(tables.chunks)/goroutines - 1; i <= len(tables.chunks)/goroutines; i++ {
		binary.LittleEndian.PutUint32(b[chunksAt+i*chunkRecBytes+8:], 7)
	}
	if agree("no such pack", b) == nil {
		t.Error("chunks may be in a pack that is not there")
	}
}

func parseWith(goroutines int, b []byte) (*body, error) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(goroutines))
	return parseBody(b)
}
