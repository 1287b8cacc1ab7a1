package vmm_test

import (
	"bytes"
	"embed"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

//go:generate sh testdata/guests/build.sh

//go:embed testdata
var testdata embed.FS

// readTestdata reads a file of testdata, also where the tests run without it.
func readTestdata(t testing.TB, name string) []byte {
	t.Helper()
	b, err := testdata.ReadFile("testdata/" + name)
	must(t, err)
	return b
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// TestGuestsMatchSources builds the flat guests from their sources and compares them with the binaries
// that are checked in.
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
	for _, name := range []string{"count.bin", "echo.bin"} {
		built, err := os.ReadFile(filepath.Join(dir, name))
		must(t, err)
		if !bytes.Equal(built, readTestdata(t, "guests/"+name)) {
			t.Errorf("%s is not what its source makes: run go generate", name)
		}
	}
}
