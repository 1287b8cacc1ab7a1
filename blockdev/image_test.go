package blockdev_test

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/cryovisor/cryovisor/blockdev"
)

// TestExport writes a raw image. As long as it is not complete nothing has its name, and if it can't be completed nothing is left.
func TestExport(t *testing.T) {
	dir := t.TempDir()
	lower, path := filepath.Join(dir, "disk"), filepath.Join(t.TempDir(), "exported")
	want := make([]byte, 3<<20)
	copy(want[2<<20:], "contents")
	if err := os.WriteFile(lower, want, 0o600); err != nil {
		t.Fatal(err)
	}
	disk, err := blockdev.OpenFile(lower, blockdev.Options{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	defer disk.Close()
	nothing := func(int64, int64) {
		if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("it has its name before it is complete: %v", err)
		}
	}

	ctx, cancel := context.WithCancel(t.Context())
	err = blockdev.Export(ctx, path, disk, func(done, total int64) {
		nothing(done, total)
		cancel() // with a part written
	})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("interrupted: %v", err)
	}
	if left, err := os.ReadDir(filepath.Dir(path)); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}

	if err := blockdev.Export(t.Context(), path, disk, nothing); err != nil {
		t.Fatal(err)
	}
	if err := blockdev.Export(t.Context(), path, disk, nil); !errors.Is(err, fs.ErrExist) {
		t.Errorf("a file is in the way: %v", err)
	}
	if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, want) {
		t.Errorf("%d bytes that differ, or %v", len(got), err)
	}
}
