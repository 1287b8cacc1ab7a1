// Package confinetest runs the tests of a package once more in a process that is confined, where a system call or a file that
// package confine does not allow makes them fail.
package confinetest

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/cryovisor/cryovisor/confine"
)

// childEnv names the directory for temporary files of a process that confines itself.
const childEnv = "CRYOVISOR_CONFINED_TESTS"

// Main confines this process if Rerun has started it. TestMain calls it first.
func Main() {
	dir := os.Getenv(childEnv)
	if dir == "" {
		return
	}
	if _, err := confine.Apply(confine.Rules{ReadWrite: []string{dir}, ReadOnly: []string{"."}}); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// Rerun runs tests of this binary, by name, in a confined process that can write
// to its temporary directory, and read its package's. They must not start processes.
func Rerun(t *testing.T, tests ...string) {
	t.Helper()
	if !confine.Supported().Seccomp {
		t.Skip(confine.ErrUnsupported)
	}
	// Short, as the paths of sockets have to be.
	dir, err := os.MkdirTemp("", "cf")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	// They have run in full already, so they are short ones here.
	args := []string{"-test.v", "-test.short", "-test.run=^(" + strings.Join(tests, "|") + ")$"}
	cmd := exec.CommandContext(t.Context(), os.Args[0], args...)
	cmd.Env = append(os.Environ(), childEnv+"="+dir, "TMPDIR="+dir)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("confined, the tests fail: %v\n%s", err, out)
	}
	for _, name := range tests {
		switch {
		case bytes.Contains(out, []byte("--- PASS: "+name+" ")):
		case bytes.Contains(out, []byte("--- SKIP: "+name+" ")):
			t.Logf("skipped: %s", name)
		default:
			t.Errorf("%s did not run:\n%s", name, out)
		}
	}
}
