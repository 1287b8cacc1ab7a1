package vmm_test

import (
	"testing"

	"github.com/cryovisor/cryovisor/confine/confinetest"
)

// TestConfined has machines with all devices in a process that is confined.
func TestConfined(t *testing.T) {
	confinetest.Rerun(t, "TestProbe", "TestDevicesThroughMachines", "TestTimersGoOn", "TestConsoleThroughMachines",
		"TestTrackDirtyOfALazyMachine", "TestShell")
}
