//go:build linux && amd64

package kvmlab

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"go.uber.org/goleak"
)

// labConfig returns a Config that runs one of the programs, or skips if there is no lab.
func labConfig(t *testing.T, program string) Config {
	t.Helper()
	if err := Available(); err != nil {
		t.Skip(err)
	}
	binary, err := staticTestBinary(t.Context(), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	// What a run makes, it removes.
	temp := t.TempDir()
	t.Setenv("TMPDIR", temp)
	t.Cleanup(func() {
		if left, err := os.ReadDir(temp); err != nil || len(left) > 0 {
			t.Errorf("files left behind: %v (%v)", left, err)
		}
		goleak.VerifyNone(t)
	})
	return Config{Binary: binary, Env: []string{envProgram + "=" + program}}
}

func TestExitCode(t *testing.T) {
	for program, want := range map[string]int{"three": 3, "killed": 128 + 9, "orphan": 5} {
		t.Run(program, func(t *testing.T) {
			if code, err := Run(t.Context(), labConfig(t, program)); err != nil || code != want {
				t.Errorf("Run = %d, %v, want %d", code, err, want)
			}
		})
	}
}

func TestOutput(t *testing.T) {
	var stdout bytes.Buffer
	cfg := labConfig(t, "long")
	cfg.Stdout = &stdout
	if code, err := Run(t.Context(), cfg); err != nil || code != 0 {
		t.Fatalf("Run = %d, %v, want 0", code, err)
	}
	if stdout.String() != longOutput {
		t.Errorf("got %d bytes of output, not the %d that were written", stdout.Len(), len(longOutput))
	}
}

func TestArgumentsFilesAndStreams(t *testing.T) {
	source := t.TempDir()
	if err := os.MkdirAll(filepath.Join(source, "sub"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(source, "sub", "file"), []byte("content"), 0o600); err != nil {
		t.Fatal(err)
	}
	var stdout, stderr bytes.Buffer
	cfg := labConfig(t, "args")
	cfg.Stdout, cfg.Stderr = &stdout, &stderr
	cfg.Args = []string{"one", "two words"}
	cfg.Files = []File{{Path: "tree", Source: source}}
	if code, err := Run(t.Context(), cfg); err != nil || code != 0 {
		t.Fatalf("Run = %d, %v, want 0", code, err)
	}
	want := "[one two words] /lab/work <nil> content <nil> 2 true true\n"
	if stdout.String() != want {
		t.Errorf("standard output is %q, want %q", stdout.String(), want)
	}
	if want := "to stderr\n"; stderr.String() != want {
		t.Errorf("standard error is %q, want %q", stderr.String(), want)
	}
}

func TestTimeLimit(t *testing.T) {
	cfg := labConfig(t, "forever")
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var stdout bytes.Buffer
	cfg.Stdout = writerFunc(func(p []byte) (int, error) {
		cancel()
		return stdout.Write(p)
	})
	_, err := Run(ctx, cfg)
	if _, ok := errors.AsType[*TimeLimitError](err); !ok || !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled while the program ran: %v, want a *TimeLimitError of context.Canceled", err)
	}
	if !strings.Contains(stdout.String(), "kvmlab.TestMain(") {
		t.Errorf("the program did not print its goroutines: %q", stdout.String())
	}
	cfg.TimeLimit = 1
	_, err = Run(t.Context(), cfg)
	if _, ok := errors.AsType[*TimeLimitError](err); !ok || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("with a limit of 1 ns: %v, want a *TimeLimitError of context.DeadlineExceeded", err)
	}
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

func TestHostDies(t *testing.T) {
	for name, tc := range map[string]struct {
		program string
		change  func(*Config)
		want    string // in the error
	}{
		"kernel panic": {"panic", func(*Config) {}, "Kernel panic"},
		"no memory":    {"ok", func(c *Config) { c.MemoryMiB = 32 }, "stopped before the binary ended"},
		"QEMU fails":   {"ok", func(c *Config) { c.MemoryMiB = -1 }, "QEMU ended: exit status 1"},
		"init fails":   {"ok", func(c *Config) { c.Dir = "/absent" }, "/absent"},
		"writer fails": {"long", func(c *Config) { c.Stdout = writerFunc(failWrite) }, "pass on output"},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := labConfig(t, tc.program)
			tc.change(&cfg)
			_, err := Run(t.Context(), cfg)
			if _, ok := errors.AsType[*HostError](err); !ok || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("Run: %v, want a *HostError with %q", err, tc.want)
			}
		})
	}
}

var errWrite = errors.New("no")

func failWrite([]byte) (int, error) { return 0, errWrite }

func TestUnavailable(t *testing.T) {
	for name, set := range map[string]func(*testing.T){
		"no QEMU":   func(t *testing.T) { t.Setenv("PATH", t.TempDir()) },
		"no kernel": func(t *testing.T) { t.Setenv(EnvCache, t.TempDir()) },
	} {
		t.Run(name, func(t *testing.T) {
			set(t)
			_, err := Run(t.Context(), Config{})
			unavailable, ok := errors.AsType[*UnavailableError](err)
			if !ok || !strings.Contains(unavailable.Fix, "scripts/setup") {
				t.Errorf("Run: %v, want an *UnavailableError that names scripts/setup", err)
			}
		})
	}
}

func TestNotStatic(t *testing.T) {
	if err := Available(); err != nil {
		t.Skip(err)
	}
	for _, file := range []string{"/bin/sh", "run.go", "absent"} {
		_, err := Run(t.Context(), Config{Binary: file})
		if err == nil || !strings.Contains(err.Error(), file) {
			t.Errorf("Run of %s: %v, want an error that names it", file, err)
		}
	}
}
