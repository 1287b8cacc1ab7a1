//go:build linux && amd64

package lifecycle_test

import (
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/cryovisor/cryovisor/lifecycle"
)

// TestImages asks for the images under a template, and under a sandbox that outlives it.
func TestImages(t *testing.T) {
	m := newManager(t, lifecycle.ManagerOptions{})
	check := func(when string, want ...string) {
		t.Helper()
		if got, err := m.Images(t.Context()); err != nil || !slices.Equal(got, want) {
			t.Errorf("%s: %v, %v; want %v", when, got, err, want)
		}
	}
	check("without disks")
	image := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(image, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	cfg := ticker(t, "disks")
	cfg.Disks = []lifecycle.Disk{{Name: "root", Image: image}, {Name: "blank", Size: 1 << 20}}
	info, err := m.CreateTemplate(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	check("of a template", image)
	s := m.create(t, lifecycle.CreateOptions{Template: "disks"})
	if _, err := s.Pause(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := m.DeleteTemplate(t.Context(), info.ID); err != nil {
		t.Fatal(err)
	}
	check("of a sandbox alone", image)
	if err := s.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	check("of nothing")
}
