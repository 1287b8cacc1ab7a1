// Package kvmlab runs static Linux binaries, tests above all, on a small Linux host that has real
// hardware virtualization, on machines that have none: QEMU emulates a processor with SVM, a
// Debian kernel runs on it with kvm-amd, and an init program of this package runs the binary.
//
// [Run] is one such run, the command in ../lab calls it. [RunTest] is for tests: it runs the body
// of a test on /dev/kvm where that is backed by VT-x or SVM, and in the lab elsewhere.
//
// What the lab needs is installed by scripts/setup; [Available] says what is missing. The lab is
// for correctness, not for timing: code runs at a third of the speed, copies at a tenth.
package kvmlab

import (
	"fmt"
	"io"
	"strings"
	"time"
)

// Environment variables that the package reads and sets.
const (
	// EnvInside is set to 1 for the binary that runs in the lab.
	EnvInside = "CRYOVISOR_IN_LAB"
	// EnvCache overrides the directory of the lab's cache. In the lab it is set to where the
	// kernels of Config.Kernels are.
	EnvCache = "CRYOVISOR_LAB_CACHE"
	// EnvLong, set to anything, has tests of guests go on for longer: see Long.
	EnvLong = "CRYOVISOR_LONG"
)

// Defaults of Config.
const (
	DefaultMemoryMiB     = 1024
	DefaultTestTimeLimit = 5 * time.Minute
)

// bootLimit is the time that the lab's host has until it starts the binary. It takes 2 to 3 s on
// an idle machine; the limit is for busy ones.
const bootLimit = 90 * time.Second

// Config describes one run in the lab.
type Config struct {
	// Binary is the path of the static linux/amd64 executable to run. RunTest sets it.
	Binary string
	// Args are its arguments, without its own name. RunTest sets them.
	Args []string
	// Env adds to its environment (NAME=value), which is not that of the caller. GOMAXPROCS is 2
	// unless given: with one, Go code that waits for a page fault served by Go code never wakes.
	Env []string
	// Dir is its working directory, by default an empty one. It, and /tmp, are in memory.
	Dir string
	// Files are put into the lab's file system before it starts.
	Files []File
	// Kernels are put into the lab so that OpenKernel finds them there as it does outside.
	Kernels []string
	// Modules are loaded into the lab's own kernel after those of KVM, with what they depend on:
	// names of modules in the cache's cloud kernel, such as tun.
	Modules []string
	// MemoryMiB is the lab's memory, in MiB: what the binary, its guests and all files use. 0
	// means DefaultMemoryMiB.
	MemoryMiB int
	// TimeLimit ends the run; 0 leaves that to the context. RunTest takes DefaultTestTimeLimit
	// for 0.
	TimeLimit time.Duration
	// Stdout and Stderr get the binary's output as it comes. A nil Stdout discards it; a nil
	// Stderr sends standard error the way of standard output.
	Stdout, Stderr io.Writer
}

// File is a file, or a directory with all in it, that is copied into the lab.
type File struct {
	// Path is where it goes: absolute, or relative to the default working directory. /tmp, /dev,
	// /proc and /sys are hidden by mounts.
	Path string
	// Source is what is copied: a file or a directory of this machine. Modes are kept.
	Source string
}

// UnavailableError says that the lab cannot run on this machine. Tests that need it skip on this
// error only.
type UnavailableError struct {
	Missing string // what is missing
	Fix     string // what to do about it
	Err     error  // the cause, if there is one
}

func (e *UnavailableError) Error() string {
	return fmt.Sprintf("KVM lab unavailable: %s: %s", e.Missing, e.Fix)
}

func (e *UnavailableError) Unwrap() error { return e.Err }

// HostError says that the lab's host ended before the binary did, or never ran it: a kernel panic,
// a QEMU that failed, a module that did not load. It says nothing about the binary.
type HostError struct {
	Reason  string // what happened
	Console string // the end of the lab kernel's console, and of QEMU's messages
	Err     error  // the cause, if there is one
}

func (e *HostError) Error() string {
	return withConsole("KVM lab: the lab's host died: "+e.Reason, e.Console)
}

func (e *HostError) Unwrap() error { return e.Err }

// TimeLimitError says that the run was ended by its time limit or by its context, and wraps the
// context's error (context.DeadlineExceeded, context.Canceled).
type TimeLimitError struct {
	After   time.Duration // since the call of Run
	Console string        // as in HostError
	Err     error
}

func (e *TimeLimitError) Error() string {
	return withConsole(fmt.Sprintf("KVM lab: ended after %v: %v", e.After.Round(time.Millisecond), e.Err), e.Console)
}

func (e *TimeLimitError) Unwrap() error { return e.Err }

// ReasonMark begins what a test in the lab says, in one line, of why it fails. RunTest repeats the last such line at the
// end of what it logs.
const ReasonMark = "reason: "

// withConsole adds what the console said, if anything, to a message.
func withConsole(message, console string) string {
	if console = strings.TrimSpace(console); console != "" {
		// The reason is said again at the end, which is what is left of a log that was cut.
		message += "\nconsole:\n\t" + strings.ReplaceAll(console, "\n", "\n\t") + "\n" + message
	}
	return message
}
