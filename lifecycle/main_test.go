//go:build linux && amd64

package lifecycle_test

import (
	"os"
	"strings"
	"testing"

	"go.uber.org/goleak"

	"github.com/cryovisor/cryovisor/confine/confinetest"
)

func TestMain(m *testing.M) {
	confinetest.Main()
	// The runtime's own files, which come with the first pipe and stay, are no leak.
	if r, w, err := os.Pipe(); err == nil {
		r.Close()
		w.Close()
	}
	goleak.VerifyTestMain(m)
}

// checkLeaks fails the test if, when it and its other cleanups are done, the
// process has more file descriptors or mappings of guests than now.
func checkLeaks(t *testing.T) {
	t.Helper()
	fds, maps := openFiles(t), guestMappings(t)
	t.Cleanup(func() {
		if n := openFiles(t); n > fds {
			t.Errorf("%d file descriptors are open, %d were", n, fds)
		}
		if n := guestMappings(t); n > maps {
			t.Errorf("%d mappings of KVM, memfd or userfaultfd are left, %d were", n, maps)
		}
	})
}

func openFiles(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

func guestMappings(t *testing.T) int {
	t.Helper()
	b, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for line := range strings.Lines(string(b)) {
		if strings.Contains(line, "memfd:") || strings.Contains(line, "kvm-vcpu") {
			n++
		}
	}
	return n
}
