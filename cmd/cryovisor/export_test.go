//go:build linux && amd64

package main

import (
	"debug/elf"
	"errors"
	"io/fs"
	"path/filepath"
	"strings"
	"testing"

	"filippo.io/age"

	"github.com/cryovisor/cryovisor/internal/testvm"
	"github.com/cryovisor/cryovisor/lifecycle"
	"github.com/cryovisor/cryovisor/snapshot"
	"github.com/cryovisor/cryovisor/vmm"
)

// pausedBeacon is the id of a snapshot, and the directory and the identity file that are named to verbs.
func pausedBeacon(t *testing.T) (id snapshot.ID, store, identity string) {
	t.Helper()
	if _, err := vmm.Probe(); errors.Is(err, vmm.ErrNoKVM) || errors.Is(err, vmm.ErrPermission) {
		t.Skip(err)
	}
	image, err := testvm.Beacon(testvm.BeaconConfig{Memory: 8 << 20, Period: 1e6, Every: 1000})
	if err != nil {
		t.Fatal(err)
	}
	m, err := lifecycle.Boot(t.Context(), vmm.Config{MemoryBytes: 8 << 20, VCPUs: 1, Boot: image.Program()}, lifecycle.Disks{})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if err := m.VM.Start(); err != nil {
		t.Fatal(err)
	}
	key, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	store, identity = t.TempDir(), filepath.Join(t.TempDir(), "key")
	if err := writeIdentity(identity, key, key.Recipient()); err != nil {
		t.Fatal(err)
	}
	s, err := snapshot.OpenStore(store)
	if err != nil {
		t.Fatal(err)
	}
	p, err := m.Pause(t.Context(), s, lifecycle.PauseOptions{Recipients: []age.Recipient{key.Recipient()}})
	if err != nil {
		t.Fatal(err)
	}
	return p.ID, store, identity
}

func TestExportVerb(t *testing.T) {
	id, store, identity := pausedBeacon(t)
	path := filepath.Join(t.TempDir(), "core.elf")
	args := []string{"export", id.String()[:8], "--store", store, "--identity", identity, "-o", path}
	load := func() uint64 {
		t.Helper()
		f, err := elf.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		return f.Progs[1].Vaddr
	}
	succeed(t, args...)
	if at := load(); at != lifecycle.CorePhysical {
		t.Errorf("physical memory is at %#x", at)
	}
	_, err := command(t, args...)
	if !errors.Is(err, fs.ErrExist) || !strings.Contains(err.Error(), "--force") {
		t.Errorf("the file is there: %v", err)
	}
	succeed(t, append(args, "--force", "--paging=false")...)
	if at := load(); at != 0 {
		t.Errorf("without paging, physical memory is at %#x", at)
	}
	if _, err := command(t, "export", id.String(), "--store", store); err == nil || !strings.Contains(err.Error(), "output") {
		t.Errorf("without a file: %v", err)
	}
}
