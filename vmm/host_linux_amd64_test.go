package vmm

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// skipWithoutKVM skips a test on a host that Probe says has no KVM for us.
func skipWithoutKVM(t testing.TB) Host {
	t.Helper()
	h, err := Probe()
	if errors.Is(err, ErrNoKVM) || errors.Is(err, ErrPermission) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	return h
}

func TestProbe(t *testing.T) {
	h := skipWithoutKVM(t)
	if h.MaxVCPUs < 1 || h.MaxVCPUs > MaxVCPUs {
		t.Errorf("%d vCPUs", h.MaxVCPUs)
	}
	var si unix.Sysinfo_t
	if err := unix.Sysinfo(&si); err != nil {
		t.Fatal(err)
	}
	if want := si.Totalram * uint64(si.Unit); h.MemoryBytes != want {
		t.Errorf("%d bytes of memory, want %d", h.MemoryBytes, want)
	}
	for _, tc := range []struct {
		err, kind error
	}{{h.Interpreted, ErrInterpreted}, {h.Lazy, ErrNoUserfaultfd}} {
		if tc.err != nil {
			checkHostError(t, tc.err, tc.kind)
		}
	}
	if _, err := os.Stat("/sys/module/kvm_pvm"); err == nil && h.Interpreted == nil {
		t.Error("KVM under PVM, and the probe says that it does not interpret")
	}
}

// checkHostError wants a HostError of a kind that says what to do.
func checkHostError(t *testing.T, err, kind error) {
	t.Helper()
	var host *HostError
	if !errors.As(err, &host) || !errors.Is(err, kind) {
		t.Fatalf("%v is no HostError of kind %v", err, kind)
	}
	if host.Do == "" || !strings.Contains(err.Error(), host.Do) {
		t.Errorf("%q does not say what to do", err)
	}
}

func TestOpenKVMErrors(t *testing.T) {
	dir := t.TempDir()
	plain := filepath.Join(dir, "plain")
	if err := os.WriteFile(plain, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name, path  string
		kind, cause error
	}{
		{"absent", filepath.Join(dir, "absent"), ErrNoKVM, fs.ErrNotExist},
		{"no directory", filepath.Join(plain, "kvm"), ErrNoKVM, unix.ENOTDIR},
		{"another device", "/dev/null", ErrNoKVM, unix.ENOTTY},
		{"a file", plain, ErrNoKVM, unix.ENOTTY},
	} {
		t.Run(tc.name, func(t *testing.T) {
			sys, err := openKVM(tc.path)
			if err == nil {
				t.Fatal(errors.Join(errors.New("opened"), sys.Close()))
			}
			checkHostError(t, err, tc.kind)
			if !errors.Is(err, tc.cause) || !strings.Contains(err.Error(), tc.path) {
				t.Errorf("%q: want the path and %v", err, tc.cause)
			}
		})
	}
}

// TestOpenKVMWithoutPermission opens what nobody may open for writing: root, who
// may open any file, is refused for a file of the kernel's.
func TestOpenKVMWithoutPermission(t *testing.T) {
	path := filepath.Join(t.TempDir(), "kvm")
	if err := os.WriteFile(path, nil, 0); err != nil {
		t.Fatal(err)
	}
	if os.Geteuid() == 0 {
		path = "/proc/sys/kernel/osrelease" // a sysctl that is read-only for root too
	}
	sys, err := openKVM(path)
	if err == nil {
		t.Fatal(errors.Join(errors.New("opened"), sys.Close()))
	}
	checkHostError(t, err, ErrPermission)
	if !errors.Is(err, fs.ErrPermission) {
		t.Errorf("%v does not unwrap to its cause", err)
	}
}
