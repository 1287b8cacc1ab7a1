//go:build linux && amd64

package linuxvm

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/u-root/u-root/pkg/cpio"

	"github.com/cryovisor/cryovisor/internal/testvm/kvmlab"
)

// programPackages is where the programs for guests are.
const programPackages = "github.com/cryovisor/cryovisor/internal/testvm/"

// buildProgram compiles a program for guests to a file of its name in dir.
func buildProgram(ctx context.Context, dir, name string) error {
	file := filepath.Join(dir, name)
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags=-s -w", "-o", file, programPackages+name)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64", "GOFLAGS=")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("guest program: %v: %w\n%s", cmd, err, bytes.TrimSpace(out))
	}
	return nil
}

// initrd is an initramfs with the guest program as /init, with other programs in the root directory, and with modules, and
// all that they depend on, in /modules; their names sort in the order in which they can be loaded.
func initrd(init []byte, programs []string, kernel *kvmlab.Kernel, modules ...string) ([]byte, error) {
	var buf bytes.Buffer
	out := cpio.Newc.Writer(&buf)
	records := []cpio.Record{
		cpio.StaticRecord(init, cpio.Info{Name: "init", Mode: cpio.S_IFREG | 0o755}),
		cpio.Directory("dev", 0o755),
		cpio.Directory("modules", 0o755),
	}
	for _, file := range programs {
		content, err := os.ReadFile(file)
		if err != nil {
			return nil, err
		}
		records = append(records, cpio.StaticRecord(content, cpio.Info{Name: filepath.Base(file), Mode: cpio.S_IFREG | 0o755}))
	}
	files, err := kernel.Modules(modules...)
	if err != nil {
		return nil, err
	}
	for i, file := range files {
		content, err := os.ReadFile(file)
		if err != nil {
			return nil, err
		}
		name := fmt.Sprintf("modules/%02d-%s", i, filepath.Base(file))
		records = append(records, cpio.StaticRecord(content, cpio.Info{Name: name, Mode: cpio.S_IFREG | 0o644}))
	}
	for i, rec := range records {
		rec.Ino = uint64(i + 1)
		if err := out.WriteRecord(rec); err != nil {
			return nil, fmt.Errorf("initramfs: %w", err)
		}
	}
	return buf.Bytes(), cpio.WriteTrailer(out)
}
