//go:build !(linux && amd64)

package kvmlab

import (
	"context"
	"errors"
	"testing"
)

// errPlatform is what everything returns here.
var errPlatform = &UnavailableError{
	Missing: "Linux on x86-64", Fix: "run the tests there", Err: errors.ErrUnsupported,
}

// Available returns an *UnavailableError: the lab runs on Linux on x86-64.
func Available() error { return errPlatform }

// Direct returns false: there is no KVM for x86-64 guests.
func Direct() bool { return false }

// Inside returns false.
func Inside() bool { return false }

// Run returns an *UnavailableError: the lab runs on Linux on x86-64.
func Run(context.Context, Config) (int, error) { return -1, errPlatform }

// RunTest skips the test: the lab runs on Linux on x86-64.
func RunTest(t *testing.T, _ Config, _ func(t *testing.T)) {
	t.Helper()
	t.Skip(errPlatform)
}
