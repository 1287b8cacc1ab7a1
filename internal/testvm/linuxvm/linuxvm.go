//go:build linux && amd64

package linuxvm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cryovisor/cryovisor/internal/testvm/kvmlab"
	"github.com/cryovisor/cryovisor/vmm"
)

// initFile is the guest program in the lab's working directory.
const initFile = "guestinit"

// DatabaseProgram is the program for RunWith and Options that has the guest program put load on databases on the
// machine's disk, and check them.
const DatabaseProgram = "guestdb"

// Run runs the body of a top-level test where Linux guests can run, as kvmlab.RunTest does, with the guest program at
// hand. It needs nothing in cfg but the kernels.
func Run(t *testing.T, cfg kvmlab.Config, body func(t *testing.T, lab *Lab)) {
	t.Helper()
	RunWith(t, cfg, nil, body)
}

// RunWith is Run with more programs at hand, for Options.
func RunWith(t *testing.T, cfg kvmlab.Config, programs []string, body func(t *testing.T, lab *Lab)) {
	t.Helper()
	dir, cfg := withPrograms(t, cfg, programs)
	kvmlab.RunTest(t, cfg, func(t *testing.T) { body(t, mustOpenLab(t, dir)) })
}

// RunBenchmark is RunWith for a benchmark.
func RunBenchmark(b *testing.B, cfg kvmlab.Config, programs []string, body func(b *testing.B, lab *Lab)) {
	b.Helper()
	dir, cfg := withPrograms(b, cfg, programs)
	kvmlab.RunBenchmark(b, cfg, func(b *testing.B) { body(b, mustOpenLab(b, dir)) })
}

// withPrograms makes the guest program and others, where guests can run, and returns the directory in which the body finds
// them.
func withPrograms(t testing.TB, cfg kvmlab.Config, programs []string) (string, kvmlab.Config) {
	t.Helper()
	if kvmlab.Inside() || !kvmlab.Direct() && kvmlab.Available() != nil {
		return ".", cfg
	}
	dir := t.TempDir()
	for _, name := range append([]string{initFile}, programs...) {
		if err := buildProgram(t.Context(), dir, name); err != nil {
			t.Fatal(err)
		}
		cfg.Files = append(cfg.Files, kvmlab.File{Path: name, Source: filepath.Join(dir, name)})
	}
	return dir, cfg
}

func mustOpenLab(t testing.TB, dir string) *Lab {
	t.Helper()
	lab, err := openLab(dir)
	if err != nil {
		t.Fatal(err)
	}
	return lab
}

// rounds is how often a test repeats something: as often as it takes to have had each case that it distinguishes, or, in a
// long run, more.
func rounds(n, long int) int {
	if kvmlab.Long() {
		return long
	}
	return n
}

// Lab is where Linux guests run, with what they are made of.
type Lab struct {
	dir  string // with the programs
	init []byte
}

// openLab is the lab with the programs of a directory.
func openLab(dir string) (*Lab, error) {
	init, err := os.ReadFile(filepath.Join(dir, initFile))
	return &Lab{dir: dir, init: init}, err
}

// cmdline makes a panic a reset at once.
const cmdline = "console=ttyS0 quiet panic=-1"

// labCmdline is for guests in the lab. Calibrating clocks against an emulated processor takes long, and fails when the
// machine is busy. QEMU 7.2 runs a guest's XSETBV without an exit, so that KVM does not know its XCR0.
const labCmdline = "lpj=5200000 tsc=reliable noxsave"

// Options say what to boot.
type Options struct {
	Kernel    string      // kvmlab.Cloud or kvmlab.Generic
	Image     io.ReaderAt // nil: the kernel's bzImage
	ImageSize int64
	Modules   []string // of the kernel, loaded by the guest program
	Programs  []string // of RunWith, besides the guest program
	MemoryMiB int      // 0: 256
	VCPUs     int      // 0: 1
	Cmdline   string   // added to the common one
}

// Config is the machine that boots a kernel with the guest program.
func (l *Lab) Config(opts Options) (vmm.Config, error) {
	kernel, err := kvmlab.OpenKernel(opts.Kernel)
	if err != nil {
		return vmm.Config{}, err
	}
	if opts.Image == nil {
		image, err := os.ReadFile(kernel.Image)
		if err != nil {
			return vmm.Config{}, err
		}
		opts.Image, opts.ImageSize = bytes.NewReader(image), int64(len(image))
	}
	var programs []string
	for _, name := range opts.Programs {
		programs = append(programs, filepath.Join(l.dir, name))
	}
	archive, err := initrd(l.init, programs, kernel, opts.Modules...)
	if err != nil {
		return vmm.Config{}, err
	}
	if opts.MemoryMiB == 0 {
		opts.MemoryMiB = 256
	}
	line := cmdline
	if kvmlab.Inside() {
		line += " " + labCmdline
	}
	return vmm.Config{
		Hardware:    vmm.Hardware{AllowOvercommit: true},
		MemoryBytes: uint64(opts.MemoryMiB) << 20,
		VCPUs:       opts.VCPUs,
		Boot: vmm.Linux{
			Kernel:  vmm.File{ReaderAt: opts.Image, Size: opts.ImageSize},
			Initrd:  vmm.File{ReaderAt: bytes.NewReader(archive), Size: int64(len(archive))},
			Cmdline: line + " " + opts.Cmdline,
		},
	}, nil
}

// bootLimit is the time that a guest has to reach user land: 12 to 18 s in the lab on an idle machine.
const bootLimit = 2 * time.Minute

// Guest is a running machine and its console.
type Guest struct {
	VM      *vmm.VM
	Console *Console
	in      *io.PipeWriter
}

// Boot boots a machine to user land and returns it with what the guest program says of itself. The machine is closed
// when the test ends.
func (l *Lab) Boot(t *testing.T, opts Options) (*Guest, string) {
	t.Helper()
	cfg, err := l.Config(opts)
	if err != nil {
		t.Fatal(err)
	}
	in, w := io.Pipe()
	begin := time.Now()
	g := &Guest{Console: NewConsole(func(line string) { t.Logf("%6.2fs %s", time.Since(begin).Seconds(), line) }), in: w}
	cfg.Console = vmm.Console{In: in, Out: g.Console}
	if g.VM, err = vmm.New(cfg); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(g.VM.Close(), w.Close()); err != nil {
			t.Error(err)
		}
	})
	if err := g.VM.Start(); err != nil {
		t.Fatal(err)
	}
	up, err := g.until(t.Context(), bootLimit, "up ")
	if err != nil {
		t.Fatal(err)
	}
	return g, up[len(up)-1]
}

// until waits for a line of the guest program, for the end of the machine, or for the limit.
func (g *Guest) until(ctx context.Context, limit time.Duration, prefix string) ([]string, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	timer := time.AfterFunc(limit, func() { cancel(fmt.Errorf("nothing within %v", limit)) })
	defer timer.Stop()
	done := make(chan struct{})
	defer close(done)
	go func() {
		select {
		case <-g.VM.Ended():
			cancel(g.VM.Wait(ctx))
		case <-done:
		}
	}()
	return g.Console.Until(ctx, prefix)
}

// orderLimit is the time that the guest has to obey an order.
const orderLimit = time.Minute

// Order gives the guest program an order and returns the lines that it says until it is done, the last of them being
// the answer.
func (g *Guest) Order(ctx context.Context, order string) ([]string, error) {
	if _, err := io.WriteString(g.in, order+"\n"); err != nil {
		return nil, err
	}
	return g.until(ctx, orderLimit, "done ")
}

// bootWarnings end the lines by which a kernel without PCI complains at every boot.
var bootWarnings = []string{
	" PCI: System does not support PCI",
	" PCI: Fatal: No config space access function found",
}

// slowWarnings are said of an interrupt handler that took longer than the time to the next interrupt, and of real-time threads that had the
// processor for 0.95 of a second. In the lab, an emulated processor decrypts and unpacks the pages that they touch first after a resume: tens of ms
// for each chunk, and more where the lab's own host is busy.
var slowWarnings = []string{" hrtimer: interrupt took ", " sched: RT throttling activated"}

// Warnings are the lines in the guest program's answer to the order "warnings" that report a warning of the kernel, or
// worse, but for those that are no fault of the machine.
func Warnings(answer []string) []string {
	return slices.DeleteFunc(slices.Clone(answer), func(line string) bool {
		return !strings.HasPrefix(line, "kmsg ") ||
			kvmlab.Inside() && slices.ContainsFunc(slowWarnings, func(w string) bool { return strings.Contains(line, w) }) ||
			slices.ContainsFunc(bootWarnings, func(w string) bool { return strings.HasSuffix(line, w) })
	})
}

// Tell gives an order that has no answer.
func (g *Guest) Tell(order string) error {
	_, err := io.WriteString(g.in, order+"\n")
	return err
}
