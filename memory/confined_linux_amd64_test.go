package memory_test

import (
	"testing"

	"github.com/cryovisor/cryovisor/confine/confinetest"
)

// TestConfined does what a machine's memory needs of the system in a process that is confined: faults, huge pages, a limit, what
// is given back, stills.
func TestConfined(t *testing.T) {
	confinetest.Rerun(t, "TestDiscardGivesBack", "TestLazyIsExact", "TestDirtyIsExact", "TestEagerIsExact", "TestCollapse",
		"TestCollapseIsShared", "TestReclaimFromHugePageInUse", "TestReclaimGivesBack", "TestLimitIsExact", "TestLimitTakesHugePages",
		"TestSharedIsExact", "TestStillIsExact", "TestKVMRunOnMissingPages")
}
