package linuxvm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cryovisor/cryovisor/internal/testvm/kvmlab"
	"github.com/cryovisor/cryovisor/vmm"
)

func TestLinuxBootCloud(t *testing.T) {
	Run(t, kvmlab.Config{Kernels: []string{kvmlab.Cloud}}, func(t *testing.T, lab *Lab) {
		t.Run("bzImage", func(t *testing.T) { testBoot(t, lab, Options{Kernel: kvmlab.Cloud}, powerOff) })
		t.Run("vmlinux", func(t *testing.T) { testBoot(t, lab, vmlinux(t, kvmlab.Cloud), reset) })
		t.Run("two vCPUs", func(t *testing.T) { testBoot(t, lab, Options{Kernel: kvmlab.Cloud, VCPUs: 2}, powerOff, reset) })
		t.Run("above the hole", func(t *testing.T) { testBoot(t, lab, Options{Kernel: kvmlab.Cloud, MemoryMiB: 4096}, powerOff) })
	})
}

func TestLinuxBootGeneric(t *testing.T) {
	Run(t, kvmlab.Config{Kernels: []string{kvmlab.Generic}}, func(t *testing.T, lab *Lab) {
		testBoot(t, lab, Options{Kernel: kvmlab.Generic}, reset)
	})
}

// vmlinux are options to boot the ELF file of a kernel.
func vmlinux(t *testing.T, name string) Options {
	t.Helper()
	kernel, err := kvmlab.OpenKernel(name)
	if err != nil {
		t.Fatal(err)
	}
	image, err := os.ReadFile(kernel.Image)
	if err != nil {
		t.Fatal(err)
	}
	elf, err := VMLinux(image)
	if err != nil {
		t.Fatal(err)
	}
	return Options{Kernel: name, Image: bytes.NewReader(elf), ImageSize: int64(len(elf))}
}

// bootEnd is how a guest ends: an order, and what becomes of the machine.
type bootEnd struct {
	order string
	want  error
}

var (
	powerOff = bootEnd{"poweroff", vmm.ErrPowerOff}
	reset    = bootEnd{"reboot", vmm.ErrReset}
)

// testBoot boots a machine for each of some ends, talks to it, and ends it; in a long run, for every end.
func testBoot(t *testing.T, lab *Lab, opts Options, ends ...bootEnd) {
	if kvmlab.Long() {
		ends = []bootEnd{powerOff, reset}
	}
	for _, end := range ends {
		t.Run(end.order, func(t *testing.T) {
			g, up := lab.Boot(t, opts)
			checkFacts(t, up, max(opts.VCPUs, 1))
			g.want(t, "echo back and forth", "done echo back and forth")
			if answer, err := g.Order(t.Context(), "warnings"); err != nil || len(Warnings(answer)) > 0 {
				t.Errorf("the kernel warns: %q, %v", Warnings(answer), err)
			}
			if err := g.Tell(end.order); err != nil {
				t.Fatal(err)
			}
			waitEnd(t, g, end.want)
		})
	}
}

// checkFacts checks what the guest found: its processors, and the clock that survives a pause.
func checkFacts(t *testing.T, up string, vcpus int) {
	t.Helper()
	for _, want := range []string{"clocksource=kvm-clock", fmt.Sprintf("cpus=%d", vcpus)} {
		if !slices.Contains(strings.Fields(up), want) {
			t.Errorf("the guest says %q, want %s", up, want)
		}
	}
}

// want gives an order and checks the last line of the answer.
func (g *Guest) want(t *testing.T, order, answer string) {
	t.Helper()
	lines, err := g.Order(t.Context(), order)
	if err != nil {
		t.Fatalf("%s: %v", order, err)
	}
	if last := lines[len(lines)-1]; last != answer {
		t.Errorf("%s: %q, want %q, after\n%s", order, last, answer, strings.Join(lines, "\n"))
	}
}

// waitEnd waits for the machine's end and checks its reason.
func waitEnd(t *testing.T, g *Guest, want error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := g.VM.Wait(ctx); !errors.Is(err, want) {
		t.Errorf("the machine ended with %v, want %v", err, want)
	}
}
