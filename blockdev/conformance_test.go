package blockdev_test

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/cryovisor/cryovisor/blockdev"
	"github.com/cryovisor/cryovisor/blockdev/blockdevtest"
)

// rawDisk makes a raw image with random contents.
func rawDisk(t *testing.T, size int, opts blockdev.Options) blockdevtest.Disk {
	t.Helper()
	content := make([]byte, size)
	_, _ = rand.NewChaCha8([32]byte{1}).Read(content)
	path := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	d := open(t, path, opts)
	return blockdevtest.Disk{Device: d, Content: content, Reopen: func(t *testing.T) blockdev.Device {
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
		d = open(t, path, opts)
		return d
	}}
}

func TestFileConformance(t *testing.T) {
	for _, size := range []int{64 << 10, 64<<10 + 512, 2 << 20, 2<<20 + 512} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			blockdevtest.Run(t, func(t *testing.T) blockdevtest.Disk { return rawDisk(t, size, blockdev.Options{}) })
		})
		t.Run(fmt.Sprintf("%d read-only", size), func(t *testing.T) {
			blockdevtest.RunReadOnly(t, func(t *testing.T) blockdevtest.Disk {
				return rawDisk(t, size, blockdev.Options{ReadOnly: true})
			})
		})
	}
}
