package testvm

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// TestGuestsMatchSources builds the guests from their sources and compares them
// with the binaries that are checked in.
func TestGuestsMatchSources(t *testing.T) {
	for _, tool := range []string{"sh", "as", "ld", "objcopy"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skip("the guests can't be built here: ", err)
		}
	}
	dir := t.TempDir()
	if out, err := exec.Command("sh", "testdata/guests/build.sh", dir).CombinedOutput(); err != nil {
		t.Fatalf("build.sh: %v\n%s", err, out)
	}
	sources, err := filepath.Glob("testdata/guests/*.S")
	must(t, err)
	if len(sources) == 0 {
		t.Fatal("no sources")
	}
	for _, src := range sources {
		name := filepath.Base(src[:len(src)-len(".S")]) + ".bin"
		built, err := os.ReadFile(filepath.Join(dir, name))
		must(t, err)
		stored, err := os.ReadFile(filepath.Join("testdata/guests", name))
		must(t, err)
		if !bytes.Equal(built, stored) {
			t.Errorf("%s is not what its source makes: run go generate", name)
		}
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func difference(gpa uint64, got, want []byte) error {
	for i := range got {
		if got[i] != want[i] {
			q := i &^ 7
			return fmt.Errorf("guest memory at %#x is %x, the model has %x", gpa+uint64(q), got[q:q+8], want[q:q+8])
		}
	}
	return nil
}
