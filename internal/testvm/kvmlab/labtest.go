//go:build linux && amd64

package kvmlab

import (
	"bytes"
	"cmp"
	"context"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// spareTime is left of a time limit for the test in the lab to print its goroutines, and for the
// test outside to report.
const spareTime = 10 * time.Second

// RunTest runs the body of a test where guests can be real: right here if /dev/kvm is backed by
// VT-x or SVM (the lab included), otherwise in the lab, by running the same test of the same test
// binary there; output goes to the log of the test, and a test that fails or skips there fails or
// skips here. If the lab is not available either, the test skips and says what is missing.
//
// RunTest is the first thing that a top-level test does, and by convention such tests are named
// TestLinux...: it is the call that starts the test anew in the lab. A subtest chosen by -run is
// chosen there too. Labs run in parallel. Files that the body needs, testdata included, must be in cfg.Files; the
// package's own directory is not in the lab.
func RunTest(t *testing.T, cfg Config, body func(t *testing.T)) {
	t.Helper()
	if Inside() || Direct() {
		body(t)
		return
	}
	if err := Available(); err != nil {
		t.Skip(err)
	}
	if strings.Contains(t.Name(), "/") {
		t.Fatalf("kvmlab.RunTest is for top-level tests, not for %s", t.Name())
	}
	// An emulated host has one processor; the real one has more.
	t.Parallel()
	binary, err := staticTestBinary(t.Context(), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	if cfg.TimeLimit == 0 {
		cfg.TimeLimit = DefaultTestTimeLimit
	}
	if deadline, ok := t.Deadline(); ok {
		cfg.TimeLimit = min(cfg.TimeLimit, time.Until(deadline)-spareTime)
	}
	cfg.Env = withLong(cfg.Env)
	log := &testLog{name: t.Name(), log: t.Log}
	cfg.Binary, cfg.Args, cfg.Stdout, cfg.Stderr = binary, testArgs(t.Name(), flagValue("test.run"), cfg.TimeLimit), log, nil
	code, err := Run(t.Context(), cfg)
	log.flush()
	switch {
	case err != nil:
		t.Fatal(err)
	case code != 0:
		t.Fatalf("%s failed in the KVM lab with exit code %d: %s", t.Name(), code, cmp.Or(log.reason, "see above"))
	case log.skipped:
		t.Skip("skipped in the KVM lab")
	case !log.passed:
		t.Fatalf("%s did not run in the KVM lab", t.Name())
	}
}

// Long reports whether tests are to go on for longer than what they prove needs: more of the same, for what shows once in
// a while. It is the same in the lab.
func Long() bool { return os.Getenv(EnvLong) != "" }

// withLong adds EnvLong to an environment if it is set here.
func withLong(env []string) []string {
	if !Long() {
		return env
	}
	return append(slices.Clone(env), EnvLong+"="+os.Getenv(EnvLong))
}

// RunBenchmark is RunTest for a top-level benchmark. What it prints in the lab goes to standard output.
func RunBenchmark(b *testing.B, cfg Config, body func(b *testing.B)) {
	b.Helper()
	if Inside() || Direct() {
		body(b)
		return
	}
	if err := Available(); err != nil {
		b.Skip(err)
	}
	binary, err := staticTestBinary(b.Context(), b.TempDir())
	if err != nil {
		b.Fatal(err)
	}
	cfg.Binary, cfg.Stdout = binary, os.Stdout
	cfg.Args = []string{"-test.run=^$", "-test.bench=" + pattern(b.Name(), flagValue("test.bench"))}
	code, err := Run(b.Context(), cfg)
	if err != nil {
		b.Fatal(err)
	}
	if code != 0 {
		b.Fatalf("%s failed in the KVM lab with exit code %d: see above", b.Name(), code)
	}
}

// staticTestBinary returns the path of this test binary, or of one compiled in dir if this one is
// linked dynamically, as with -race. The working directory of a test is that of its package.
func staticTestBinary(ctx context.Context, dir string) (string, error) {
	binary, err := os.Executable()
	if err != nil {
		return "", fmt.Errorf("KVM lab: test binary: %w", err)
	}
	static, err := isStatic(binary)
	if err != nil {
		return "", fmt.Errorf("KVM lab: test binary: %w", err)
	}
	if static {
		return binary, nil
	}
	binary = filepath.Join(dir, filepath.Base(binary))
	return binary, goBuild(ctx, "test", "-c", "-o", binary, ".")
}

// flagValue is the value of a flag of this test binary.
func flagValue(name string) string {
	if f := flag.Lookup(name); f != nil {
		return f.Value.String()
	}
	return ""
}

// pattern chooses one test, or benchmark, and of what is below it what the pattern here chooses.
func pattern(name, here string) string {
	p := "^" + regexp.QuoteMeta(name) + "$"
	if _, sub, ok := strings.Cut(here, "/"); ok {
		p += "/" + sub
	}
	return p
}

// testArgs are the flags of a test binary that run one test in the lab, and of its subtests those
// that the -run flag here chooses. Its time limit leaves it time to print its goroutines.
func testArgs(name, runHere string, limit time.Duration) []string {
	args := []string{"-test.v", "-test.run=" + pattern(name, runHere), "-test.timeout=" + max(limit-spareTime, limit/2).String()}
	if testing.Short() {
		args = append(args, "-test.short")
	}
	return args
}

// testLog passes the output of a test binary to the log of a test, line by line, and notes how
// the test in it ended.
type testLog struct {
	name            string
	log             func(...any)
	partial         []byte
	passed, skipped bool
	reason          string // the last that was given
}

func (l *testLog) Write(p []byte) (int, error) {
	l.partial = append(l.partial, p...)
	for {
		line, rest, ok := bytes.Cut(l.partial, []byte("\n"))
		if !ok {
			return len(p), nil
		}
		l.line(string(line))
		l.partial = rest
	}
}

// flush logs a last line that has no end.
func (l *testLog) flush() {
	if len(l.partial) > 0 {
		l.line(string(l.partial))
		l.partial = nil
	}
}

func (l *testLog) line(line string) {
	l.log(line)
	if _, reason, ok := strings.Cut(line, ReasonMark); ok {
		l.reason = reason
	}
	l.passed = l.passed || strings.HasPrefix(line, "--- PASS: "+l.name+" ")
	l.skipped = l.skipped || strings.HasPrefix(line, "--- SKIP: "+l.name+" ")
}
