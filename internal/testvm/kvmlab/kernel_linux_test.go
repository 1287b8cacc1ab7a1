//go:build linux && amd64

package kvmlab

import (
	"errors"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/u-root/u-root/pkg/cpio"

	"github.com/cryovisor/cryovisor/internal/testvm/kvmlab/internal/wire"
)

func openCloud(t *testing.T) *Kernel {
	t.Helper()
	kernel, err := OpenKernel(Cloud)
	if _, missing := errors.AsType[*UnavailableError](err); missing {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	return kernel
}

func TestModulesComeAfterTheirDependencies(t *testing.T) {
	kernel := openCloud(t)
	files, err := kernel.Modules("virtio-net", "kvm_amd", "virtio_net")
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, file := range files {
		names = append(names, moduleName(filepath.Base(file)))
	}
	for _, pair := range [][2]string{
		{"failover", "net_failover"}, {"net_failover", "virtio_net"}, {"irqbypass", "kvm"}, {"kvm", "kvm_amd"},
	} {
		first, second := slices.Index(names, pair[0]), slices.Index(names, pair[1])
		if first < 0 || second < first {
			t.Errorf("order %q: want %s before %s", names, pair[0], pair[1])
		}
	}
	if sorted := slices.Sorted(slices.Values(names)); len(slices.Compact(sorted)) != len(names) {
		t.Errorf("a module is there twice: %q", names)
	}
	if _, err := kernel.Modules("no_such_module"); err == nil || !strings.Contains(err.Error(), "no_such_module") {
		t.Errorf("Modules of an unknown name: %v, want an error that names it", err)
	}
}

func TestInitramfs(t *testing.T) {
	openCloud(t)
	file := filepath.Join(t.TempDir(), "cpio")
	cfg := Config{
		Binary: "kernel.go",
		Files:  []File{{Path: "/deep/er/run.go", Source: "run.go"}, {Path: "wire", Source: "internal/wire"}},
	}
	if err := writeInitramfs(file, []byte("init"), cfg); err != nil {
		t.Fatal(err)
	}
	records := readArchive(t, file)
	for _, want := range []string{
		"init", "deep/er/run.go", wire.WorkDir[1:] + "/wire/wire.go", "lab/bin/kernel.go", "lab/modules/kvm-amd.ko", wire.SpecPath[1:], "tmp",
	} {
		if !slices.Contains(records, want) {
			t.Errorf("no record of %s", want)
		}
	}
	for i, name := range records {
		if parent := path.Dir(name); parent != "." && !slices.Contains(records[:i], parent) {
			t.Errorf("%s comes before its directory", name)
		}
		if slices.Contains(records[:i], name) {
			t.Errorf("%s is there twice", name)
		}
	}
}

// readArchive returns the names in an archive, in order.
func readArchive(t *testing.T, file string) []string {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var names []string
	err = cpio.ForEachRecord(cpio.Newc.Reader(f), func(r cpio.Record) error {
		names = append(names, r.Name)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return names
}
