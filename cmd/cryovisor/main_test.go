package main

import (
	"bytes"
	"os"
	"testing"

	"github.com/cryovisor/cryovisor/internal/testplugin"
)

// commandEnv makes of this program the command: what confines itself needs a process of its own.
const commandEnv = "CRYOVISOR_TEST_COMMAND"

func TestMain(m *testing.M) {
	testplugin.Main()
	if os.Getenv(commandEnv) != "" {
		main()
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// command runs a verb, and returns what it prints to standard output.
func command(t *testing.T, args ...string) (string, error) {
	t.Helper()
	var out, failed bytes.Buffer
	cmd := newRootCommand()
	cmd.SetArgs(args)
	cmd.SetOut(&out)
	cmd.SetErr(&failed)
	err := cmd.ExecuteContext(t.Context())
	if failed.Len() > 0 {
		t.Logf("%v: %s", args, failed.String())
	}
	return out.String(), err
}

func succeed(t *testing.T, args ...string) string {
	t.Helper()
	out, err := command(t, args...)
	if err != nil {
		t.Fatalf("%v: %v", args, err)
	}
	return out
}
