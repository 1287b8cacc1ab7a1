//go:build linux && amd64

package kvmlab

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"

	"github.com/u-root/u-root/pkg/cpio"

	"github.com/cryovisor/cryovisor/internal/testvm/kvmlab/internal/wire"
)

// archive writes an initramfs.
type archive struct {
	w cpio.RecordWriter // drops the second record of a name
}

// writeInitramfs writes the lab's initramfs to a new file.
func writeInitramfs(file string, init []byte, cfg Config) (err error) {
	f, err := os.Create(file)
	if err != nil {
		return fmt.Errorf("KVM lab: initramfs: %w", err)
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	buf := bufio.NewWriterSize(f, 1<<20)
	out := cpio.Newc.Writer(buf)
	a := archive{w: cpio.NewDedupWriter(out)}
	if err := a.fill(init, cfg); err != nil {
		return fmt.Errorf("KVM lab: initramfs: %w", err)
	}
	if err := errors.Join(cpio.WriteTrailer(out), buf.Flush()); err != nil {
		return fmt.Errorf("KVM lab: initramfs: %w", err)
	}
	return nil
}

// fill writes everything: files of the caller first, so that what else has the same path loses.
func (a archive) fill(init []byte, cfg Config) error {
	if err := a.bytes("/init", init, 0o755); err != nil {
		return err
	}
	for _, file := range cfg.Files {
		dest := file.Path
		if !path.IsAbs(dest) {
			dest = path.Join(wire.WorkDir, dest)
		}
		if err := a.tree(dest, file.Source); err != nil {
			return err
		}
	}
	modules, err := a.modules(cfg.Modules)
	if err != nil {
		return err
	}
	for _, name := range cfg.Kernels {
		if err := a.kernel(name); err != nil {
			return err
		}
	}
	spec := wire.Spec{
		Modules:     modules,
		Binary:      path.Join(wire.BinDir, filepath.Base(cfg.Binary)),
		Args:        cfg.Args,
		Env:         cfg.Env,
		Dir:         cfg.Dir,
		MergeStderr: cfg.Stderr == nil,
	}
	if err := a.tree(spec.Binary, cfg.Binary); err != nil {
		return err
	}
	text, err := json.Marshal(spec)
	if err != nil {
		return err
	}
	for _, dir := range []string{"/dev", "/proc", "/sys", "/tmp", "/root", wire.WorkDir} {
		if err := a.dir(dir); err != nil {
			return err
		}
	}
	return a.bytes(wire.SpecPath, text, 0o644)
}

// modules writes the lab's own modules, KVM's first, and returns their names in load order.
func (a archive) modules(extra []string) ([]string, error) {
	kernel, err := OpenKernel(Cloud)
	if err != nil {
		return nil, err
	}
	files, err := kernel.Modules(append([]string{"kvm_amd"}, extra...)...)
	if err != nil {
		return nil, err
	}
	names := make([]string, len(files))
	for i, file := range files {
		names[i] = filepath.Base(file)
		if err := a.tree(path.Join(wire.ModulesDir, names[i]), file); err != nil {
			return nil, err
		}
	}
	return names, nil
}

// kernel writes a kernel of the cache, as it is laid out there.
func (a archive) kernel(name string) error {
	kernel, err := OpenKernel(name)
	if err != nil {
		return err
	}
	return a.tree(path.Join(wire.CacheDir, name), filepath.Dir(kernel.Image))
}

// tree writes a file, or a directory with all in it, of this machine. Symbolic links are followed
// at its root only; within it they are copied.
func (a archive) tree(dest, source string) error {
	source, err := filepath.EvalSymlinks(source)
	if err != nil {
		return err
	}
	return filepath.WalkDir(source, func(p string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(source, p)
		if err != nil {
			return err
		}
		info, err := entry.Info()
		if err != nil {
			return err
		}
		return a.entry(path.Join(dest, filepath.ToSlash(rel)), p, info)
	})
}

// entry writes one file, directory or symbolic link of this machine.
func (a archive) entry(dest, source string, info fs.FileInfo) error {
	switch info.Mode().Type() {
	case fs.ModeDir:
		return a.dir(dest)
	case fs.ModeSymlink:
		target, err := os.Readlink(source)
		if err != nil {
			return err
		}
		return a.record(cpio.Symlink(dest, target))
	case 0:
		f, err := os.Open(source)
		if err != nil {
			return err
		}
		defer f.Close()
		return a.record(cpio.Record{ReaderAt: f, Info: cpio.Info{
			Name:     dest,
			Mode:     cpio.S_IFREG | uint64(info.Mode().Perm()),
			FileSize: uint64(info.Size()),
		}})
	default:
		return fmt.Errorf("%s is neither a file, nor a directory, nor a symbolic link", source)
	}
}

func (a archive) bytes(dest string, content []byte, mode uint64) error {
	return a.record(cpio.Record{ReaderAt: bytes.NewReader(content), Info: cpio.Info{
		Name: dest, Mode: cpio.S_IFREG | mode, FileSize: uint64(len(content)),
	}})
}

func (a archive) dir(dest string) error {
	return a.record(cpio.Directory(dest, 0o777))
}

// record writes a record after those of the directories that lead to it: the kernel makes none by
// itself, and drops a file that has none.
func (a archive) record(rec cpio.Record) error {
	if parent := path.Dir(rec.Name); parent != "/" {
		if err := a.dir(parent); err != nil {
			return err
		}
	}
	return a.w.WriteRecord(rec)
}
