//go:build linux && amd64

// Command peers compares pauses and resumes of a whole machine with QEMU's, on the same memory, in one run:
//
//	go run ./bench/peers -ram 4GiB -n 10 >tables.md
//
// It boots the guest of the benchmarks, lets QEMU have a copy of its memory, and then stores and loads both in
// turn, n times. Every byte of what was loaded is compared with what was stored, outside of the measured time. It needs
// qemu-system-x86_64 and qemu-img, and room for four times the memory, three of them in the directory.
//
// A part of the memory is the text of this program, which "go run" links without debugging information, as
// "go test" does for the benchmarks; that of "go build" compresses less.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"syscall"

	"github.com/dustin/go-humanize"
)

// errNoQEMU says that there is nothing to compare with.
var errNoQEMU = errors.New("no QEMU to compare with (run scripts/setup, or install qemu-system-x86 and qemu-utils)")

// options are the flags.
type options struct {
	ram uint64
	n   int
	dir string
}

func main() {
	o, err := parse(os.Args[1:])
	if errors.Is(err, flag.ErrHelp) {
		os.Exit(0)
	}
	if err == nil {
		ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
		err = run(ctx, o, os.Stdout)
		stop()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "peers:", err)
		os.Exit(1)
	}
}

func parse(args []string) (options, error) {
	var o options
	fs := flag.NewFlagSet("peers", flag.ContinueOnError)
	ram := fs.String("ram", "1GiB", "the guest's memory, a multiple of 1 MiB")
	fs.IntVar(&o.n, "n", 10, "how often each is measured")
	fs.StringVar(&o.dir, "dir", "/dev/shm", "the `directory` to work in")
	if err := fs.Parse(args); err != nil {
		return o, err
	}
	var err error
	if o.ram, err = humanize.ParseBytes(*ram); err != nil {
		return o, fmt.Errorf("-ram %s: %w", *ram, err)
	}
	if o.ram == 0 || o.ram%pieceBytes != 0 {
		return o, fmt.Errorf("-ram %s: not a multiple of 1 MiB", *ram)
	}
	if o.n < 1 {
		return o, fmt.Errorf("-n %d: measure at least once", o.n)
	}
	return o, nil
}

// run measures and prints. It leaves nothing behind.
func run(ctx context.Context, o options, out io.Writer) (err error) {
	for _, program := range []string{qemuProgram, imageProgram} {
		if _, err := exec.LookPath(program); err != nil {
			return fmt.Errorf("%w: %w", errNoQEMU, err)
		}
	}
	dir, err := os.MkdirTemp(o.dir, "cryovisor-peers-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	s, err := newSession(ctx, o.ram, dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.close()) }()
	for range o.n {
		if err := s.round(ctx); err != nil {
			if ctx.Err() != nil {
				return context.Cause(ctx) // what failed did so because of it
			}
			return err
		}
	}
	return s.print(out, o)
}
