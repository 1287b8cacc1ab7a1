//go:build unix

package main

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// coreLimit is a size that no core dump has. Linux takes 0 for no limit where a program gets the dump (core(5), "Piping core dumps to a
// program"), and 1 for no dump (fs/coredump.c, do_coredump, says why); for a file, either is too small.
const coreLimit = 1

// forbidCoreDumps keeps the kernel from writing the process to a file when it crashes: keys and decrypted chunks are in memory of Go's,
// of which no part can be left out, as guest memory is. It is not made undumpable (prctl(2), PR_SET_DUMPABLE) besides: files in /proc/self
// would then be root's, and who is not root could not ask which pages of guests are dirty. The limit can be raised again by who may.
func forbidCoreDumps() error {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_CORE, &limit); err != nil {
		return fmt.Errorf("forbid core dumps: %w", err)
	}
	limit.Cur = min(limit.Max, coreLimit)
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &limit); err != nil {
		return fmt.Errorf("forbid core dumps: %w", err)
	}
	return nil
}
