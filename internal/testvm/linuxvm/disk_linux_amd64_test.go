package linuxvm

import (
	"errors"
	"path/filepath"

	"filippo.io/age"

	"github.com/cryovisor/cryovisor/blockdev"
	"github.com/cryovisor/cryovisor/lifecycle"
)

// overlays are the files with what machines have written to the disk and not stored.
func (s *saga) overlays() []string {
	s.t.Helper()
	files, err := filepath.Glob(filepath.Join(s.job.DiskDir, "*.overlay"))
	if err != nil {
		s.fatalf("%v", err)
	}
	return files
}

// leftDisk writes the disk of a machine that has powered off to a raw image.
func (s *saga) leftDisk() string {
	s.t.Helper()
	left := s.overlays()
	if len(left) != 1 {
		s.fatalf("the machine has left %q", left)
	}
	disk, err := lifecycle.OpenOverlay(s.t.Context(), left[0], s.diskOptions())
	if err != nil {
		s.fatalf("%v", err)
	}
	return s.export(disk)
}

// pausedDisk writes the disk of the last pause to a raw image. No file may be left of the machine that was paused.
func (s *saga) pausedDisk() string {
	s.t.Helper()
	if left := s.overlays(); len(left) > 0 {
		s.fatalf("a pause leaves %q", left)
	}
	opts := s.diskOptions()
	r, err := opts.Store.Open(s.t.Context(), s.job.ID, opts.Identities...)
	if err != nil {
		s.fatalf("%v", err)
	}
	defer r.Close()
	disk, err := lifecycle.OpenDisk(s.t.Context(), r, diskName, opts)
	if err != nil {
		s.fatalf("%v", err)
	}
	return s.export(disk)
}

func (s *saga) diskOptions() lifecycle.OpenDiskOptions {
	s.t.Helper()
	key, err := age.ParseX25519Identity(s.job.Identity)
	if err != nil {
		s.fatalf("%v", err)
	}
	return lifecycle.OpenDiskOptions{Store: s.store(), Identities: []age.Identity{key}}
}

func (s *saga) export(disk *lifecycle.OpenedDisk) string {
	s.t.Helper()
	path := filepath.Join(s.t.TempDir(), "exported")
	if err := errors.Join(blockdev.Export(s.t.Context(), path, disk, nil), disk.Close()); err != nil {
		s.fatalf("%v", err)
	}
	return path
}
