package vsock

import (
	"testing"

	"github.com/cryovisor/cryovisor/confine/confinetest"
)

// TestConfined makes connections from both sides in a process that is confined.
func TestConfined(t *testing.T) {
	confinetest.Rerun(t, "TestHostConnects", "TestGuestConnects", "TestManyConnections", "TestRestore", "TestPath", "TestCloseInTheMidst")
}
