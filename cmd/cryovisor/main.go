// Command cryovisor freezes running microVMs into encrypted, compressed
// snapshots and thaws them where they stopped.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"
)

func main() {
	if err := forbidCoreDumps(); err != nil {
		fmt.Fprintln(os.Stderr, "cryovisor:", err) // and go on: it takes a crash to do harm
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGHUP)
	err := newRootCommand().ExecuteContext(ctx)
	stop()
	if err == nil {
		return
	}
	fmt.Fprintln(os.Stderr, "cryovisor:", err)
	var status exitStatus
	if errors.As(err, &status) {
		os.Exit(int(status))
	}
	os.Exit(1)
}

// exitStatus is an error that asks for an exit status of its own.
type exitStatus int

func (s exitStatus) Error() string { return fmt.Sprintf("status %d", int(s)) }
