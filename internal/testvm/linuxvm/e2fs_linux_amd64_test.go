package linuxvm

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"testing"

	"github.com/cryovisor/cryovisor/internal/testvm/kvmlab"
)

// e2fsPrograms make file systems and check them; Debian's package is e2fsprogs.
var e2fsPrograms = []string{"mke2fs", "e2fsck"}

// mke2fsConf says what "ext4" means to mke2fs.
const mke2fsConf = "/etc/mke2fs.conf"

// library finds the files that a program needs in what ldd says.
var library = regexp.MustCompile(`(?m)(/\S+) \(0x`)

// withE2fs adds the programs for disks, and all that they need, to what is in the lab.
func withE2fs(t testing.TB, cfg kvmlab.Config) kvmlab.Config {
	t.Helper()
	if kvmlab.Inside() || kvmlab.Direct() {
		return cfg
	}
	files := []kvmlab.File{{Path: mke2fsConf, Source: mke2fsConf}}
	seen := map[string]bool{}
	for _, name := range e2fsPrograms {
		source, err := findSystem(name)
		if err != nil {
			t.Skipf("%v: run scripts/setup, or install e2fsprogs", err)
		}
		files = append(files, kvmlab.File{Path: "/sbin/" + name, Source: source})
		out, err := exec.CommandContext(t.Context(), "ldd", source).Output()
		if err != nil {
			t.Skipf("what %s needs: %v", source, err)
		}
		for _, m := range library.FindAllSubmatch(out, -1) {
			if file := string(m[1]); !seen[file] {
				seen[file] = true
				files = append(files, kvmlab.File{Path: file, Source: file})
			}
		}
	}
	cfg.Files = append(files, cfg.Files...)
	return cfg
}

// findSystem finds a program for administrators, which need not be in PATH.
func findSystem(name string) (string, error) {
	file, err := exec.LookPath(name)
	for _, dir := range []string{"/usr/sbin", "/sbin"} {
		if err != nil {
			file, err = exec.LookPath(filepath.Join(dir, name))
		}
	}
	return file, err
}

// newDisk makes a sparse file with an empty ext4 file system.
func newDisk(t testing.TB, mib int64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Truncate(mib<<20), f.Close()); err != nil {
		t.Fatal(err)
	}
	if err := runE2fs(t, "mke2fs", "-q", "-F", "-t", "ext4", path); err != nil {
		t.Fatal(err)
	}
	return path
}

// checkDisk checks the file system of a disk that was unmounted, every structure of it, and changes nothing.
func checkDisk(t testing.TB, path string) error {
	t.Helper()
	return runE2fs(t, "e2fsck", "-f", "-n", path)
}

func runE2fs(t testing.TB, name string, args ...string) error {
	t.Helper()
	file, err := findSystem(name)
	if err != nil {
		t.Skipf("%v: run scripts/setup, or install e2fsprogs", err)
	}
	if out, err := exec.CommandContext(t.Context(), file, args...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s %q: %w\n%s", name, args, err, out)
	}
	return nil
}

// TestLinuxDiskCheck makes a file system, and sees that damage to it is found.
func TestLinuxDiskCheck(t *testing.T) {
	Run(t, withE2fs(t, kvmlab.Config{}), func(t *testing.T, _ *Lab) {
		disk := newDisk(t, 32)
		if err := checkDisk(t, disk); err != nil {
			t.Fatal(err)
		}
		f, err := os.OpenFile(disk, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		// The first group's descriptors follow the superblock, which has a block of 1 KiB on a disk of this size.
		if _, err := f.WriteAt(make([]byte, 1024), 2048); err != nil {
			t.Fatal(err)
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
		if err := checkDisk(t, disk); err == nil {
			t.Error("e2fsck finds no fault in a file system without group descriptors")
		}
	})
}
