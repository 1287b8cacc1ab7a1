//go:build linux && amd64

package kvmlab

import (
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// kvmGetAPIVersion is the request KVM_GET_API_VERSION of linux/kvm.h, _IO(0xAE, 0x00). Its result
// has been 12 since Linux 2.6.22.
const (
	kvmGetAPIVersion = 0xAE00
	kvmAPIVersion    = 12
)

func TestLinuxHasKVM(t *testing.T) {
	RunTest(t, Config{Kernels: []string{Cloud}, Modules: []string{"tun"}}, func(t *testing.T) {
		kvm, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer kvm.Close()
		if version, err := unix.IoctlRetInt(int(kvm.Fd()), kvmGetAPIVersion); err != nil || version != kvmAPIVersion {
			t.Errorf("KVM_GET_API_VERSION = %d, %v, want %d", version, err, kvmAPIVersion)
		}
		if !Direct() {
			t.Error("the processor has neither VT-x nor SVM")
		}
		if !Inside() {
			return
		}
		if _, err := os.Stat("/dev/net/tun"); err != nil {
			t.Error("module tun was asked for:", err)
		}
		kernel, err := OpenKernel(Cloud)
		if err != nil {
			t.Fatal(err)
		}
		if info, err := os.Stat(kernel.Image); err != nil || info.Size() == 0 {
			t.Errorf("kernel image for guests: %v, %v", info, err)
		}
	})
}

func TestTestArgs(t *testing.T) {
	for _, tc := range []struct{ run, want string }{
		{"", "-test.run=^TestLinuxX$"},
		{"Linux", "-test.run=^TestLinuxX$"},
		{"LinuxX/a/b", "-test.run=^TestLinuxX$/a/b"},
	} {
		args := testArgs("TestLinuxX", tc.run, time.Minute)
		if !slices.Contains(args, tc.want) || !slices.Contains(args, "-test.timeout=50s") {
			t.Errorf("with -run %q: %q, want %s and a timeout of 50s", tc.run, args, tc.want)
		}
	}
	if args := testArgs("TestLinuxX", "", time.Second); !slices.Contains(args, "-test.timeout=500ms") {
		t.Errorf("of 1 s: %q, want a timeout of 500ms", args)
	}
}

func TestWithLong(t *testing.T) {
	for value, want := range map[string][]string{"": {"A=1"}, "yes": {"A=1", EnvLong + "=yes"}} {
		t.Setenv(EnvLong, value)
		if env := withLong([]string{"A=1"}); !slices.Equal(env, want) || Long() != (value != "") {
			t.Errorf("with %s=%s: %q, long: %t", EnvLong, value, env, Long())
		}
	}
}

func TestTestLog(t *testing.T) {
	for output, want := range map[string]struct{ passed, skipped bool }{
		"--- PASS: TestLinuxX (0.00s)\nPASS\n":                       {passed: true},
		"    --- PASS: TestLinuxX/sub (0.00s)\n":                     {},
		"--- PASS: TestLinuxXY (0.00s)\n":                            {},
		"    x_test.go:1: why\n--- SKIP: TestLinuxX (0.00s)\nPASS\n": {skipped: true},
		"testing: warning: no tests to run\nPASS":                    {},
	} {
		var lines []string
		log := testLog{name: "TestLinuxX", log: func(a ...any) { lines = append(lines, a[0].(string)) }}
		for _, b := range []byte(output) {
			if n, err := log.Write([]byte{b}); n != 1 || err != nil {
				t.Fatalf("Write = %d, %v", n, err)
			}
		}
		log.flush()
		if log.passed != want.passed || log.skipped != want.skipped {
			t.Errorf("%q: passed %t, skipped %t, want %+v", output, log.passed, log.skipped, want)
		}
		if got := strings.Join(lines, "\n"); got != strings.TrimSuffix(output, "\n") {
			t.Errorf("logged %q, want %q", got, output)
		}
	}
}

func TestTestLogKeepsTheLastReason(t *testing.T) {
	log := testLog{log: func(...any) {}}
	for _, line := range []string{"    x_test.go:1: " + ReasonMark + "first", "    x_test.go:2: " + ReasonMark + "why", "--- FAIL: TestLinuxX"} {
		log.line(line)
	}
	if log.reason != "why" {
		t.Errorf("the reason is %q, want the last that was given", log.reason)
	}
}
