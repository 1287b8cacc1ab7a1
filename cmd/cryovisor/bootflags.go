package main

import (
	"errors"
	"fmt"
	"os"
	"strconv"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"github.com/cryovisor/cryovisor/vmm"
)

// bootFlags are the flags that describe a machine and what it boots.
type bootFlags struct {
	memory               string
	vcpus                int
	kernel, initrd, flat string
	cmdline, base, entry string
	files                []*os.File
}

func (b *bootFlags) add(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVarP(&b.memory, "memory", "m", "256MiB", "the guest's memory")
	f.IntVarP(&b.vcpus, "vcpus", "c", 1, "the guest's processors")
	f.StringVar(&b.kernel, "kernel", "", "Linux kernel: a bzImage or an ELF vmlinux")
	f.StringVar(&b.initrd, "initrd", "", "initial RAM disk for the kernel")
	f.StringVar(&b.cmdline, "cmdline", "console=ttyS0 reboot=t panic=-1", "the kernel's command line")
	f.StringVar(&b.flat, "flat", "", "image without headers, started in 64-bit mode with memory mapped one to one")
	f.StringVar(&b.base, "base", "0x100000", "address to load the flat image at")
	f.StringVar(&b.entry, "entry", "", "address of its first instruction (default: its base)")
	cmd.MarkFlagsMutuallyExclusive("kernel", "flat")
	cmd.MarkFlagsOneRequired("kernel", "flat")
}

// config opens the files; the caller closes them with close.
func (b *bootFlags) config() (vmm.Config, error) {
	memory, err := humanize.ParseBytes(b.memory)
	if err != nil {
		return vmm.Config{}, fmt.Errorf("--memory %q: want a size such as 512MiB", b.memory)
	}
	cfg := vmm.Config{MemoryBytes: memory, VCPUs: b.vcpus}
	if b.flat != "" {
		cfg.Boot, err = b.flatImage()
	} else {
		cfg.Boot, err = b.linux()
	}
	if err != nil {
		return vmm.Config{}, errors.Join(err, b.close())
	}
	return cfg, nil
}

func (b *bootFlags) linux() (vmm.Boot, error) {
	kernel, err := b.open(b.kernel)
	if err != nil {
		return nil, err
	}
	l := vmm.Linux{Kernel: kernel, Cmdline: b.cmdline}
	if b.initrd != "" {
		l.Initrd, err = b.open(b.initrd)
	}
	return l, err
}

func (b *bootFlags) flatImage() (vmm.Boot, error) {
	base, err := strconv.ParseUint(b.base, 0, 64)
	if err != nil {
		return nil, fmt.Errorf("--base %q: want an address such as 0x100000", b.base)
	}
	entry := base
	if b.entry != "" {
		if entry, err = strconv.ParseUint(b.entry, 0, 64); err != nil {
			return nil, fmt.Errorf("--entry %q: want an address such as 0x100000", b.entry)
		}
	}
	image, err := b.open(b.flat)
	return vmm.Flat{Image: image, Base: base, Entry: entry}, err
}

func (b *bootFlags) open(path string) (vmm.File, error) {
	f, err := os.Open(path)
	if err != nil {
		return vmm.File{}, err
	}
	b.files = append(b.files, f)
	fi, err := f.Stat()
	if err != nil {
		return vmm.File{}, err
	}
	return vmm.File{ReaderAt: f, Size: fi.Size()}, nil
}

func (b *bootFlags) close() error {
	var errs []error
	for _, f := range b.files {
		errs = append(errs, f.Close())
	}
	b.files = nil
	return errors.Join(errs...)
}
