package confine

import (
	"testing"

	"github.com/cryovisor/cryovisor/internal/testvm/kvmlab"
)

// TestLinuxOlderKernel makes the attempts on the lab's kernel: its Landlock is of version 2, with the least that is used.
func TestLinuxOlderKernel(t *testing.T) {
	kvmlab.RunTest(t, kvmlab.Config{}, func(t *testing.T) {
		if kvmlab.Inside() && Supported().Landlock == 0 {
			t.Error("the lab's kernel has no Landlock")
		}
		t.Run("attempts", TestAttempts)
		t.Run("missing", TestMissing)
	})
}
