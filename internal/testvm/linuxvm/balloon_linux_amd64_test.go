package linuxvm

import (
	"context"
	"fmt"
	"testing"
	"time"

	"filippo.io/age"

	"github.com/cryovisor/cryovisor/internal/testvm/kvmlab"
	"github.com/cryovisor/cryovisor/lifecycle"
	"github.com/cryovisor/cryovisor/snapshot"
)

// hogMiB is what a process of the guest allocates, fills and frees. It is much against what else changes in the guest
// meanwhile, and the blocks that are reported, of 2 MiB.
const hogMiB = 128

// TestLinuxFreePages demands that memory which the guest has freed is in no snapshot: what it reports by itself, and what it
// gives up when it is asked to.
func TestLinuxFreePages(t *testing.T) {
	hog := fmt.Sprintf("hog %d", hogMiB)
	Run(t, labConfig, func(t *testing.T, lab *Lab) {
		g, _ := lab.Boot(t, Options{Kernel: kvmlab.Cloud, MemoryMiB: 320, Modules: deviceModules(kvmlab.Cloud)})
		m := &lifecycle.Machine{VM: g.VM}
		store, err := snapshot.OpenStore(t.TempDir())
		if err != nil {
			t.Fatal(err)
		}
		order(t, g, hog)
		full := snapshotOf(t, m, store)
		order(t, g, "unhog")
		const most, least = hogMiB << 20, hogMiB << 20 * 8 / 10
		free := awaitDirty(t, m, full.CandidateBytes-least)
		freed := snapshotOf(t, m, store)
		t.Logf("%d MiB stored of a guest that holds %d MiB; %d MiB when it has freed them and reported %d MiB",
			full.StoredBytes>>20, hogMiB, freed.StoredBytes>>20, (full.CandidateBytes-free)>>20)
		if less := int64(full.StoredBytes) - int64(freed.StoredBytes); less < least {
			t.Errorf("the snapshot is smaller by %d MiB, want about %d", less>>20, hogMiB)
		}

		// The balloon takes what the kernel had kept for itself, too.
		if err := g.VM.SetBalloon(most); err != nil {
			t.Fatal(err)
		}
		await(t, "the balloon", func() bool { return g.VM.Balloon() == most })
		if err := g.VM.SetBalloon(0); err != nil {
			t.Fatal(err)
		}
		await(t, "the balloon's end", func() bool { return g.VM.Balloon() == 0 })
		order(t, g, hog)
		order(t, g, "unhog")
		if lines := Warnings(order(t, g, "warnings")); len(lines) > 0 {
			t.Errorf("the kernel warns: %q", lines)
		}
	})
}

func order(t *testing.T, g *Guest, text string) []string {
	t.Helper()
	lines, err := g.Order(t.Context(), text)
	if err != nil {
		t.Fatalf("order %q: %v", text, err)
	}
	return lines
}

// snapshotOf stores a machine, which runs on.
func snapshotOf(t *testing.T, m *lifecycle.Machine, store *snapshot.Store) lifecycle.Paused {
	t.Helper()
	identity, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	p, err := m.Pause(t.Context(), store, lifecycle.PauseOptions{Recipients: []age.Recipient{identity.Recipient()}})
	if err != nil {
		t.Fatal(err)
	}
	if err := m.VM.Resume(); err != nil {
		t.Fatal(err)
	}
	return p
}

// awaitDirty waits until no more than so many bytes of memory are dirty, and says how many are.
func awaitDirty(t *testing.T, m *lifecycle.Machine, most uint64) (n uint64) {
	t.Helper()
	await(t, "free pages to be reported", func() bool {
		ranges, err := m.VM.Memory().Dirty(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		n = 0
		for _, r := range ranges {
			n += r.Len
		}
		return n <= most
	})
	return n
}

// await waits for a condition that nobody announces.
func await(t *testing.T, what string, reached func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), lineLimit)
	defer cancel()
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for !reached() {
		select {
		case <-tick.C:
		case <-ctx.Done():
			t.Fatalf("waiting for %s: %v", what, context.Cause(ctx))
		}
	}
}
