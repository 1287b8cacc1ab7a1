//go:build linux && amd64

package kvmlab

import (
	"cmp"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"
)

// signalBase is added to the number of a signal that killed the binary, as shells do.
const signalBase = 128

// Run boots the lab, runs cfg.Binary in it and returns its exit code, 128 plus the number of the
// signal if one killed it. With an error, the code is -1: *UnavailableError (the lab cannot run on
// this machine), *HostError (the lab failed, not the binary) or *TimeLimitError (the time limit or
// ctx ended the run), or an error about cfg. A binary whose time is up gets a SIGQUIT, so that a Go
// program prints its goroutines, and has 5 s to end.
//
// Output is passed on as it comes, from the calling goroutine. Calls are independent of each
// other and may run at once. Nothing is left when Run returns; QEMU dies with the process.
func Run(ctx context.Context, cfg Config) (code int, err error) {
	begin := time.Now()
	if err := Available(); err != nil {
		return -1, err
	}
	if err := checkStatic(cfg.Binary); err != nil {
		return -1, err
	}
	cfg = withDefaults(cfg)
	if cfg.TimeLimit > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, cfg.TimeLimit)
		defer cancel()
	}
	dir, err := os.MkdirTemp("", "cryovisor-lab-")
	if err != nil {
		return -1, fmt.Errorf("KVM lab: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	code, err = runIn(ctx, dir, cfg)
	if ctx.Err() != nil {
		return -1, limitError(ctx, time.Since(begin), err)
	}
	return code, err
}

// runIn runs the lab with its files in dir.
func runIn(ctx context.Context, dir string, cfg Config) (int, error) {
	tsc := sampleTSC()
	init, err := buildInit(ctx)
	if err != nil {
		return -1, err
	}
	initramfs := filepath.Join(dir, "initramfs.cpio")
	if err := writeInitramfs(initramfs, init, cfg); err != nil {
		return -1, err
	}
	kernel, err := OpenKernel(Cloud)
	if err != nil {
		return -1, err
	}
	host := labHost{
		kernel:    kernel.Image,
		initramfs: initramfs,
		console:   filepath.Join(dir, "console"),
		memoryMiB: cfg.MemoryMiB,
		tscKHz:    tscKHz(tsc),
	}
	status, err := host.run(ctx, cfg.Stdout, cfg.Stderr)
	if err != nil {
		return -1, err
	}
	if status.Signal != "" {
		return signalBase + status.Number, nil
	}
	return status.Code, nil
}

// limitError is the error of a run that its context ended, whatever broke because of that; err may be nil.
func limitError(ctx context.Context, after time.Duration, err error) error {
	limit := &TimeLimitError{After: after, Err: ctx.Err()}
	if host, ok := errors.AsType[*HostError](err); ok {
		limit.Console = host.Console
	}
	return limit
}

func withDefaults(cfg Config) Config {
	cfg.MemoryMiB = cmp.Or(cfg.MemoryMiB, DefaultMemoryMiB)
	if cfg.Stdout == nil {
		cfg.Stdout = io.Discard
	}
	return cfg
}

// checkStatic returns an error unless file is an executable that the lab, which has no dynamic
// linker and no libraries, can run.
func checkStatic(file string) error {
	static, err := isStatic(file)
	if err != nil {
		return fmt.Errorf("KVM lab: %s is not an executable for the lab: %w", file, err)
	}
	if !static {
		return fmt.Errorf("KVM lab: %s is dynamically linked: build it with CGO_ENABLED=0 and without -race", file)
	}
	return nil
}

// isStatic reports whether an executable needs no dynamic linker. The error wraps
// errors.ErrUnsupported for one of another processor.
func isStatic(file string) (bool, error) {
	f, err := elf.Open(file)
	if err != nil {
		return false, err
	}
	defer func() { _ = f.Close() }()
	if f.Machine != elf.EM_X86_64 {
		return false, fmt.Errorf("it is for %v: %w", f.Machine, errors.ErrUnsupported)
	}
	for _, prog := range f.Progs {
		if prog.Type == elf.PT_INTERP {
			return false, nil
		}
	}
	return true, nil
}
