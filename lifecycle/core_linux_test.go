//go:build linux && amd64

package lifecycle_test

import (
	"bytes"
	"os"
	"syscall"
	"testing"

	"github.com/cryovisor/cryovisor/internal/testvm"
	"github.com/cryovisor/cryovisor/lifecycle"
)

// TestExportCoreIsSparse: pages of zeros take no room.
func TestExportCoreIsSparse(t *testing.T) {
	path, _ := newFrozen().export(t, lifecycle.CoreOptions{})
	fi, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	// Every second page is zero; a file system may need some room besides.
	stored := fi.Sys().(*syscall.Stat_t).Blocks * 512
	if fi.Size() < coreRAM || stored > coreRAM/2+1<<20 {
		t.Errorf("%d bytes of a file of %d are stored", stored, fi.Size())
	}
}

// TestExportCoreOfGuest compares the core of a guest that was resumed and paused again, so that its snapshot is a diff, with the
// machine.
func TestExportCoreOfGuest(t *testing.T) {
	g := newGuest(t, testvm.WorkerConfig{Memory: scaled(128 << 20), VCPUs: 2})
	m := g.boot(t, testvm.NoLimit)
	first := g.pause(t, m)
	m = g.resume(t, first.ID, false, testvm.NoLimit)
	second := g.pause(t, m)
	state, err := m.VM.State()
	if err != nil {
		t.Fatal(err)
	}
	r, err := g.store.Open(t.Context(), second.ID, g.key)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	path := t.TempDir() + "/core"
	info, err := lifecycle.ExportCore(t.Context(), path, r, lifecycle.CoreOptions{})
	if err != nil || info.Mappings == 0 || info.Incomplete {
		t.Fatalf("%+v, %v", info, err)
	}
	core := openCore(t, path)
	compareNotes(t, contents(t, core.Progs[0]), state.VCPUs)
	ram := make([]byte, m.VM.Memory().Size())
	if _, err := m.VM.Memory().ReadAt(ram, 0); err != nil {
		t.Fatal(err)
	}
	for _, p := range core.Progs[1:] {
		// The guest's virtual addresses are its physical ones.
		if p.Vaddr != p.Paddr && p.Vaddr != lifecycle.CorePhysical {
			t.Errorf("virtual address %#x is %#x", p.Vaddr, p.Paddr)
		}
		if !bytes.Equal(contents(t, p), ram[p.Paddr:][:p.Filesz]) {
			t.Errorf("the memory at %#x differs", p.Vaddr)
		}
	}
}
