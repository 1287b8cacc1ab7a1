//go:build linux && amd64

package lifecycle_test

import (
	"testing"

	"github.com/cryovisor/cryovisor/confine/confinetest"
)

// TestConfined takes machines and sandboxes through what there is to do with them, with disks, in a process that is confined.
func TestConfined(t *testing.T) {
	confinetest.Rerun(t, "TestCheckpoint", "TestCheckpointDisks", "TestPrepareDisks", "TestDisksOfClones", "TestImages", "TestFork",
		"TestReclaim", "TestLimitImage", "TestPool", "TestShareBothFetch", "TestSandbox", "TestRotateKeys", "TestExportCoreOfGuest")
}
