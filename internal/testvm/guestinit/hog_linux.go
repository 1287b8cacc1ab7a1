package main

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
)

// hogWord begins the argument of a process that holds memory.
const hogWord = "hog:"

// hog is a process that holds memory until its standard input ends.
type hog struct {
	cmd *exec.Cmd
	in  io.Closer
}

// startHog starts a process that fills some MiB of memory, and waits until it has.
func (g *guest) startHog(mib string) (string, error) {
	if g.hog != nil {
		return "", errors.New("memory is held already")
	}
	theirIn, in, err := os.Pipe()
	if err != nil {
		return "", err
	}
	out, theirOut, err := os.Pipe()
	if err != nil {
		return "", err
	}
	defer out.Close()
	cmd, err := startHelper(hogWord+mib, theirIn, theirOut)
	if err := errors.Join(err, theirIn.Close(), theirOut.Close()); err != nil {
		return "", err
	}
	g.hog = &hog{cmd: cmd, in: in}
	_, err = bufio.NewReader(out).ReadString('\n')
	return mib, err
}

// endHog ends it, which frees the memory.
func (g *guest) endHog() (string, error) {
	if g.hog == nil {
		return "", errors.New("no memory is held")
	}
	h := g.hog
	g.hog = nil
	return "", errors.Join(h.in.Close(), h.cmd.Wait())
}

// holdMemory fills memory with what can't be compressed, says so, and waits for the end of its input.
func holdMemory(mib string) error {
	n, err := strconv.Atoi(strings.TrimSpace(mib))
	if err != nil {
		return err
	}
	b := make([]byte, n<<20)
	x := uint64(0x9e3779b97f4a7c15)
	for i := 0; i < len(b); i += 8 {
		// Marsaglia's xorshift generator.
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		binary.NativeEndian.PutUint64(b[i:], x)
	}
	fmt.Println("full")
	_, err = io.Copy(io.Discard, os.Stdin)
	if n > 0 && binary.NativeEndian.Uint64(b[len(b)-8:]) != x {
		return errors.New("the memory has changed")
	}
	return err
}
