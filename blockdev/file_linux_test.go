package blockdev_test

import (
	"bytes"
	"os"
	"syscall"
	"testing"

	"github.com/cryovisor/cryovisor/blockdev"
)

// A discarded range takes no space, where the file system of the tests can do that at all.
func TestDiscardGivesSpaceBack(t *testing.T) {
	const size = 4 << 20
	path := image(t, size)
	d := open(t, path, blockdev.Options{})
	if _, err := d.WriteAt(bytes.Repeat([]byte{7}, size), 0); err != nil {
		t.Fatal(err)
	}
	if err := d.Flush(); err != nil {
		t.Fatal(err)
	}
	before := blocks(t, path)
	if err := syscall.Fallocate(fd(t, path), 0x3, 0, 4096); err != nil {
		t.Skipf("no holes on this file system: %v", err)
	}
	if err := d.Discard(0, size); err != nil {
		t.Fatal(err)
	}
	if err := d.Flush(); err != nil {
		t.Fatal(err)
	}
	if after := blocks(t, path); after > before/2 {
		t.Errorf("%d blocks of 512 bytes before, %d after", before, after)
	}
}

func fd(t *testing.T, path string) int {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return int(f.Fd())
}

func blocks(t *testing.T, path string) int64 {
	var s syscall.Stat_t
	if err := syscall.Stat(path, &s); err != nil {
		t.Fatal(err)
	}
	return s.Blocks
}
