//go:build linux && amd64

package lifecycle_test

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/cryovisor/cryovisor/internal/testvm"
	"github.com/cryovisor/cryovisor/lifecycle"
	"github.com/cryovisor/cryovisor/memory"
)

// guestMaps returns the mappings of this process that show what guests hold, and those of them that a core dump would have: VmFlags
// of /proc/PID/smaps, without "dd" (proc(5)).
func guestMaps(t *testing.T, machines ...*lifecycle.Machine) (all, dumped []string) {
	t.Helper()
	b, err := os.ReadFile("/proc/self/smaps")
	if err != nil {
		t.Fatal(err)
	}
	mapping, ours := "", false
	for line := range strings.Lines(string(b)) {
		var lo, hi uint64
		if n, _ := fmt.Sscanf(line, "%x-%x ", &lo, &hi); n == 2 {
			mapping = strings.TrimSpace(line)
			ours = strings.Contains(line, "memfd:") || strings.Contains(line, "kvm-vcpu")
			for _, m := range machines {
				mem := m.VM.Memory()
				base := uint64(mem.HostAddr(0))
				for _, r := range mem.Ranges() {
					ours = ours || lo < base+r.End() && hi > base+r.GPA
				}
			}
		}
		flags, ok := strings.CutPrefix(line, "VmFlags:")
		if !ok || !ours {
			continue
		}
		all = append(all, mapping)
		if !slices.Contains(strings.Fields(flags), "dd") {
			dumped = append(dumped, mapping)
		}
	}
	return all, dumped
}

// TestGuestsAreNotDumped: a core dump of the process has no guest memory, whichever way a machine came by it, and no kvm_run page.
func TestGuestsAreNotDumped(t *testing.T) {
	g := newGuest(t, testvm.WorkerConfig{Memory: 16 << 20, WorkingSet: 1 << 20, VCPUs: 2})
	booted := g.boot(t, testvm.NoLimit)
	g.work(t, booted, 5)
	id := g.pause(t, booted).ID
	saved := g.device.State()
	clone := func() *guest { return g.past(saved) }

	lazy := clone().resume(t, id, false, testvm.NoLimit)
	eager := clone().resume(t, id, true, testvm.NoLimit)
	tpl, err := lifecycle.Open(t.Context(), g.store, id, g.key)
	if err != nil {
		t.Fatal(err)
	}
	defer tpl.Close()
	socket := t.TempDir() + "/image.sock"
	share(t, tpl, socket)
	adopted, err := lifecycle.OpenShared(t.Context(), g.store, id, socket, g.key)
	if err != nil {
		t.Fatal(err)
	}
	defer adopted.Close()
	shared, err := adopted.Resume(t.Context(), lifecycle.ResumeOptions{Hardware: clone().hardware(testvm.NoLimit)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeMachine(t, shared) })
	machines := []*lifecycle.Machine{booted, lazy, eager, shared}
	for _, m := range machines {
		still, err := m.VM.Memory().Protect(t.Context(), []memory.Range{{GPA: 2 << 20, Len: 2 << 20}})
		if err != nil {
			t.Skip(err)
		}
		defer still.Close()
	}
	all, dumped := guestMaps(t, machines...)
	if want := len(machines) * (1 + 2); len(all) < want {
		t.Errorf("%d mappings of %d machines with 2 vCPUs: %q", len(all), len(machines), all)
	}
	if len(dumped) > 0 {
		t.Errorf("a core dump has %q", dumped)
	}
}
