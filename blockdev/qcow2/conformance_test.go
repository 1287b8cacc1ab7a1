package qcow2_test

import (
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/cryovisor/cryovisor/blockdev/blockdevtest"
	"github.com/cryovisor/cryovisor/blockdev/qcow2"
)

// TestImageConformance runs the suite for disks over an image of ours and over those that QEMU makes of the same contents.
func TestImageConformance(t *testing.T) {
	want := content(rand.New(rand.NewPCG(31, 32)), 3<<20+512)
	dir := t.TempDir()
	raw := filepath.Join(dir, "raw")
	if err := os.WriteFile(raw, want, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, convert := range map[string][]string{
		"ours": nil, "QEMU's": {}, "small clusters": {"-o", "cluster_size=512"}, "compressed": {"-c"},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "image")
			if convert != nil {
				qemu(t, dir, "qemu-img", slices.Concat([]string{"convert", "-f", "raw", "-O", "qcow2"}, convert, []string{raw, path})...)
			} else if err := qcow2.Write(t.Context(), path, openRaw(t, raw)); err != nil {
				t.Fatal(err)
			}
			blockdevtest.RunReadOnly(t, func(t *testing.T) blockdevtest.Disk {
				return blockdevtest.Disk{Device: open(t, path), Content: slices.Clone(want)}
			})
		})
	}
}
