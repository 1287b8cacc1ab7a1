// Command lab runs a static test binary on a small Linux host with real KVM, emulated by QEMU:
//
//	go test -c -o /tmp/vmm.test ./vmm
//	go run ./internal/testvm/lab -- /tmp/vmm.test -test.v
//
// See package kvmlab. It exits with the binary's exit code, with 124 if the time limit ended it,
// and with 125 if the lab itself failed.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"time"

	"github.com/cryovisor/cryovisor/internal/testvm/kvmlab"
)

// Exit codes of the command itself, as timeout(1) and env(1) use them.
const (
	exitTimeLimit = 124
	exitLab       = 125
)

func main() {
	cfg, err := parse(os.Args[1:])
	if errors.Is(err, flag.ErrHelp) {
		os.Exit(0)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "lab:", err)
		os.Exit(exitLab)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	code, err := kvmlab.Run(ctx, cfg)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = exitLab
		if _, ok := errors.AsType[*kvmlab.TimeLimitError](err); ok {
			code = exitTimeLimit
		}
	}
	os.Exit(code)
}

// parse makes a Config of the command line.
func parse(args []string) (kvmlab.Config, error) {
	cfg := kvmlab.Config{Stdout: os.Stdout, Stderr: os.Stderr}
	fs := flag.NewFlagSet("lab", flag.ContinueOnError)
	fs.Usage = func() {
		fmt.Fprintln(fs.Output(), "usage: lab [flags] -- BINARY [ARGS]")
		fs.PrintDefaults()
	}
	fs.DurationVar(&cfg.TimeLimit, "timeout", 10*time.Minute, "end the run after this time")
	fs.IntVar(&cfg.MemoryMiB, "memory", kvmlab.DefaultMemoryMiB, "memory of the lab, in `MiB`")
	fs.StringVar(&cfg.Dir, "dir", "", "working `directory` in the lab")
	fs.Func("env", "add `NAME=value` to the environment (repeatable)", func(s string) error {
		cfg.Env = append(cfg.Env, s)
		return nil
	})
	fs.Func("file", "copy a file or directory into the lab: `PATH=SOURCE`, PATH absolute or relative to the working directory (repeatable)", func(s string) error {
		dest, source, ok := strings.Cut(s, "=")
		if !ok {
			return errors.New("want PATH=SOURCE")
		}
		cfg.Files = append(cfg.Files, kvmlab.File{Path: dest, Source: source})
		return nil
	})
	fs.Func("kernel", "put a kernel for guests into the lab: cloud or generic (repeatable)", func(s string) error {
		cfg.Kernels = append(cfg.Kernels, s)
		return nil
	})
	fs.Func("module", "load a `module` into the lab's kernel (repeatable)", func(s string) error {
		cfg.Modules = append(cfg.Modules, s)
		return nil
	})
	if err := fs.Parse(args); err != nil {
		return cfg, err
	}
	if fs.NArg() == 0 {
		fs.Usage()
		return cfg, errors.New("no binary given")
	}
	cfg.Binary, cfg.Args = fs.Arg(0), fs.Args()[1:]
	return cfg, nil
}
