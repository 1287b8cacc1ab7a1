package memory_test

import (
	"testing"
	"time"

	"github.com/cryovisor/cryovisor/internal/testvm/kvmlab"
)

// TestLinuxRealKVM runs what has a vCPU or another kernel writer in it where the
// processor runs the guests, and on an older kernel.
func TestLinuxRealKVM(t *testing.T) {
	kvmlab.RunTest(t, kvmlab.Config{TimeLimit: 10 * time.Minute}, func(t *testing.T) {
		t.Run("missing pages", TestKVMRunOnMissingPages)
		t.Run("vCPUs during a still", TestKVMRunDuringStill)
		t.Run("memory closed", TestKVMRunStillClosed)
		t.Run("still", TestStillIsExact)
		t.Run("writers wait", TestStillIsReadToLetWritersGo)
		t.Run("given up", TestStillGivenUp)
		t.Run("discarded", TestProtectOfDiscarded)
		t.Run("zeros", TestStillOfZeros)
		t.Run("protect alone", TestProtectAlone)
		t.Run("refused", TestRefusedWrite)
		t.Run("reclaimed", TestReclaimIsExact)
		t.Run("vCPUs while pages are reclaimed", TestKVMRunDuringReclaim)
	})
}
