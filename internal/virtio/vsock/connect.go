package vsock

import (
	"fmt"
	"io"
	"strconv"
	"strings"
)

const (
	connectVerb = "CONNECT "
	// maxConnectLine is the length of the longest line that makes sense, without its newline.
	maxConnectLine = len(connectVerb) + len("4294967295")
	// anyPort is no port, but the wildcard of the guest's socket interface.
	anyPort = 0xffffffff
)

// readConnect reads a line "CONNECT <port>\n" and returns the port. It takes one byte at a time, since what
// follows the line is the guest's.
func readConnect(r io.Reader) (uint32, error) {
	line := make([]byte, 0, maxConnectLine+1)
	for len(line) < cap(line) {
		next := line[len(line) : len(line)+1]
		if _, err := io.ReadFull(r, next); err != nil {
			return 0, fmt.Errorf("%w: %q: %w", ErrConnectLine, line, err)
		}
		if next[0] == '\n' {
			return parseConnect(string(line))
		}
		line = line[:len(line)+1]
	}
	return 0, fmt.Errorf("%w: %q is too long", ErrConnectLine, line)
}

func parseConnect(line string) (uint32, error) {
	digits, ok := strings.CutPrefix(line, connectVerb)
	if !ok {
		return 0, fmt.Errorf("%w: %q", ErrConnectLine, line)
	}
	port, err := strconv.ParseUint(digits, 10, 32)
	if err != nil || port == anyPort {
		return 0, fmt.Errorf("%w: %q has no valid port", ErrConnectLine, line)
	}
	return uint32(port), nil
}
