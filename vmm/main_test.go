package vmm_test

import (
	"testing"

	"go.uber.org/goleak"

	"github.com/cryovisor/cryovisor/confine/confinetest"
)

func TestMain(m *testing.M) {
	confinetest.Main()
	goleak.VerifyTestMain(m)
}
