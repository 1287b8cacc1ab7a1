package testvm

import (
	"testing"

	"github.com/cryovisor/cryovisor/internal/testvm/kvmlab"
)

// TestLinuxRealKVM runs the tests of this package where the processor runs the
// guests, kernel mode included.
func TestLinuxRealKVM(t *testing.T) {
	kvmlab.RunTest(t, kvmlab.Config{}, func(t *testing.T) {
		t.Run("worker", TestWorker)
		t.Run("stop and go", TestWorkerStopAndGo)
		t.Run("damage", TestWorkerShowsDamage)
		t.Run("fault", TestWorkerFault)
		t.Run("power off", TestWorkerPowerOff)
		t.Run("timer", TestTimer)
		t.Run("crash", TestCrash)
	})
}
