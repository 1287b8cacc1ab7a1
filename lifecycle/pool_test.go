//go:build linux && amd64

package lifecycle_test

import (
	"errors"
	"testing"

	"github.com/cryovisor/cryovisor/internal/testvm"
	"github.com/cryovisor/cryovisor/lifecycle"
	"github.com/cryovisor/cryovisor/vmm"
)

func newPool(t *testing.T, memoryBytes uint64, n int) *lifecycle.Pool {
	t.Helper()
	p, err := lifecycle.NewPool(memoryBytes, n)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(p.Err(), p.Close(), p.Close()); err != nil {
			t.Error(err)
		}
	})
	return p
}

// resumeFrom resumes a snapshot in a VM of a pool, and has the guest work.
func (g *guest) resumeFrom(t *testing.T, tpl *lifecycle.Template, p *lifecycle.Pool, eager bool) {
	t.Helper()
	c := g.past(g.device.State())
	m, err := tpl.Resume(t.Context(), lifecycle.ResumeOptions{Hardware: c.hardware(testvm.NoLimit), Pool: p, Eager: eager})
	if err != nil {
		t.Fatal(err)
	}
	defer closeMachine(t, m)
	if err := m.Resume(); err != nil {
		t.Fatal(err)
	}
	c.work(t, m, 10)
	c.compare(t, m)
}

// TestPool: machines run in VMs that were made in advance; those that are used are replaced, and those
// that do not fit stay.
func TestPool(t *testing.T) {
	checkLeaks(t)
	g := newGuest(t, testvm.WorkerConfig{Memory: 32 << 20})
	m := g.boot(t, testvm.NoLimit)
	g.work(t, m, 10)
	id := g.pause(t, m).ID
	closeMachine(t, m)
	tpl, err := lifecycle.Open(t.Context(), g.store, id, g.key)
	if err != nil {
		t.Fatal(err)
	}
	defer tpl.Close()
	fits, other := newPool(t, 32<<20, 2), newPool(t, 5<<30, 2)
	for i := range 5 { // more than it has
		g.resumeFrom(t, tpl, fits, i%2 == 0)
	}
	eventually(t, "what was used is replaced", func() bool { return fits.Ready() == 2 })
	for range 3 {
		g.resumeFrom(t, tpl, other, false)
	}
	eventually(t, "what does not fit is put back", func() bool { return other.Ready() == 2 })
	if err := fits.Close(); err != nil {
		t.Fatal(err)
	}
	g.resumeFrom(t, tpl, fits, false) // of a pool that is closed
	for _, n := range []int{0, 1025} {
		if _, err := lifecycle.NewPool(32<<20, n); !errors.Is(err, vmm.ErrConfig) {
			t.Errorf("a pool of %d: %v", n, err)
		}
	}
}
