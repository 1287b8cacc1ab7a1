//go:build linux && amd64

package kvmlab

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"
)

// qemuProgram is the emulator; Debian's package is qemu-system-x86.
const qemuProgram = "qemu-system-x86_64"

// initPackage is the lab's init program.
const initPackage = "github.com/cryovisor/cryovisor/internal/testvm/kvmlab/labinit"

// Available returns nil if the lab can run on this machine, otherwise an *UnavailableError that
// says what is missing and what to do.
func Available() error {
	for _, need := range []struct{ program, fix string }{
		{qemuProgram, "run scripts/setup, or install qemu-system-x86"},
		{"go", "install Go and have it in PATH"},
	} {
		if _, err := exec.LookPath(need.program); err != nil {
			return &UnavailableError{Missing: need.program + " is not installed", Fix: need.fix, Err: err}
		}
	}
	_, err := OpenKernel(Cloud)
	return err
}

// Direct reports whether this machine's /dev/kvm is backed by VT-x or SVM and may be opened: real
// guests run on it as they are, without the lab. In the lab, it is true.
func Direct() bool {
	kvm, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		return false
	}
	kvm.Close()
	cpuinfo, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return false
	}
	for line := range bytes.Lines(cpuinfo) {
		name, flags, _ := bytes.Cut(line, []byte(":"))
		if string(bytes.TrimSpace(name)) == "flags" {
			return slices.ContainsFunc(bytes.Fields(flags), func(flag []byte) bool {
				return string(flag) == "vmx" || string(flag) == "svm"
			})
		}
	}
	return false
}

// Inside reports whether the caller runs in the lab.
func Inside() bool { return os.Getenv(EnvInside) == "1" }

// buildInit returns the lab's init program, compiled from this module's source. It is kept in the
// cache, where the go command finds it up to date in a fraction of the time that linking takes; a
// lock keeps other processes from reading it half written.
func buildInit(ctx context.Context) ([]byte, error) {
	cache, err := CacheDir()
	if err != nil {
		return nil, err
	}
	lock, err := os.OpenFile(filepath.Join(cache, "labinit.lock"), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, fmt.Errorf("KVM lab: init program: %w", err)
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return nil, fmt.Errorf("KVM lab: lock %s: %w", lock.Name(), err)
	}
	binary := filepath.Join(cache, "labinit")
	if err := goBuild(ctx, "build", "-trimpath", "-ldflags=-s -w", "-o", binary, initPackage); err != nil {
		return nil, err
	}
	init, err := os.ReadFile(binary)
	if err != nil {
		return nil, fmt.Errorf("KVM lab: init program: %w", err)
	}
	return init, nil
}

// goBuild runs the go command for a static binary of the lab, with no flags of the environment.
func goBuild(ctx context.Context, args ...string) error {
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64", "GOFLAGS=")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("KVM lab: %v: %w\n%s", cmd, err, bytes.TrimSpace(out))
	}
	return nil
}
