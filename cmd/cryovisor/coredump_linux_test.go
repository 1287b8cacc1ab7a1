package main

import (
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// envCrash has the test binary be a program that crashes: by itself, or after it was the command.
const envCrash = "CRYOVISOR_TEST_CRASH"

// TestCrashProcess is that program.
func TestCrashProcess(t *testing.T) {
	what := os.Getenv(envCrash)
	if what == "" {
		t.Skip("it is for TestNoCoreDump")
	}
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_CORE, &limit); err != nil {
		t.Fatal(err)
	}
	limit.Cur = limit.Max
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &limit); err != nil {
		t.Fatal(err)
	}
	if what == "command" {
		os.Args = []string{"cryovisor", "help"}
		main()
	}
	_ = unix.Kill(os.Getpid(), unix.SIGABRT)
	select {}
}

// crash says whether the kernel has dumped the program.
func crash(t *testing.T, what string) bool {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestCrashProcess$")
	cmd.Dir = t.TempDir()
	cmd.Env = append(os.Environ(), envCrash+"="+what, "GOTRACEBACK=crash") // with it, Go leaves the signal to the kernel
	out, err := cmd.CombinedOutput()
	status, ok := cmd.ProcessState.Sys().(syscall.WaitStatus)
	if !ok || !status.Signaled() {
		t.Fatalf("it did not crash: %v: %s", err, out)
	}
	return status.CoreDump()
}

// TestNoCoreDump: the command leaves no core when it crashes, where another program does.
func TestNoCoreDump(t *testing.T) {
	pattern, err := os.ReadFile("/proc/sys/kernel/core_pattern")
	if err != nil {
		t.Skip(err)
	}
	if strings.HasPrefix(string(pattern), "|") || strings.HasPrefix(string(pattern), "/") {
		t.Skip("cores would go elsewhere than to the test's directory: ", string(pattern))
	}
	if !crash(t, "alone") {
		t.Skip("no program leaves a core here")
	}
	if crash(t, "command") {
		t.Error("the command has left a core")
	}
}
