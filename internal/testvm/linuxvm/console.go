package linuxvm

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"

	"github.com/cryovisor/cryovisor/internal/testvm/guestinit/wire"
)

// Console takes what a guest writes to its serial port, for the lines of the guest program to be waited for. It is the
// Out of a vmm.Console, or is fed with what came from another process; its methods are safe for concurrent use.
type Console struct {
	tee func(line string) // told every line as it comes; may be nil

	mu      sync.Mutex
	partial []byte
	lines   []string      // of the guest program, as they came, checked
	other   []string      // of the kernel
	next    int           // the first of lines that Next has not returned
	changed chan struct{} // closed and replaced when a line has come

	moment   int    // how many lines had come at the last momentMark
	atMoment []byte // and what of another
}

// momentMark in the output says that the guest stands still there, for a checkpoint. It is not the guest's.
const momentMark = "\x1e"

// NewConsole returns a Console that tells tee every line, its own and the kernel's.
func NewConsole(tee func(line string)) *Console {
	return &Console{tee: tee, changed: make(chan struct{})}
}

// Write takes output of the guest. It never fails.
func (c *Console) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for rest, marked := p, true; marked; {
		var part []byte
		part, rest, marked = bytes.Cut(rest, []byte(momentMark))
		c.take(part)
		if marked {
			c.moment, c.atMoment = len(c.lines), bytes.Clone(c.partial)
		}
	}
	return len(p), nil
}

func (c *Console) take(p []byte) {
	c.partial = append(c.partial, p...)
	for {
		line, rest, ok := bytes.Cut(c.partial, []byte("\n"))
		if !ok {
			return
		}
		c.line(strings.TrimSuffix(string(line), "\r"))
		c.partial = rest
	}
}

func (c *Console) line(line string) {
	if c.tee != nil {
		c.tee(line)
	}
	if text, ok := wire.Parse(line); ok {
		c.lines = append(c.lines, text)
	} else {
		c.other = append(c.other, line)
	}
	close(c.changed)
	c.changed = make(chan struct{})
}

// Next returns the next line of the guest program, and waits for it.
func (c *Console) Next(ctx context.Context) (string, error) {
	for {
		c.mu.Lock()
		changed := c.changed
		if c.next < len(c.lines) {
			c.next++
			line := c.lines[c.next-1]
			c.mu.Unlock()
			return line, nil
		}
		c.mu.Unlock()
		select {
		case <-changed:
		case <-ctx.Done():
			return "", fmt.Errorf("waiting for a line of the guest: %w; the last were:\n%s", context.Cause(ctx), c.tail())
		}
	}
}

// Until returns the lines of the guest program from the first that Next has not returned to the first that begins with
// prefix, and waits for it.
func (c *Console) Until(ctx context.Context, prefix string) ([]string, error) {
	var lines []string
	for {
		line, err := c.Next(ctx)
		if err != nil {
			return lines, fmt.Errorf("%q: %w", prefix, err)
		}
		lines = append(lines, line)
		switch {
		case strings.HasPrefix(line, prefix):
			return lines, nil
		case strings.HasPrefix(line, "error "), strings.HasPrefix(line, "failed "):
			return lines, fmt.Errorf("waiting for %q, the guest says: %s", prefix, line)
		}
	}
}

// Last returns the last line of the guest program that begins with prefix, or none.
func (c *Console) Last(prefix string) string {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, line := range slices.Backward(c.lines) {
		if strings.HasPrefix(line, prefix) {
			return line
		}
	}
	return ""
}

// Take returns the lines of the guest program that have come and that Next has not returned, without waiting.
func (c *Console) Take() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	lines := append([]string(nil), c.lines[c.next:]...)
	c.next = len(c.lines)
	return lines
}

// TakeMoment returns those of the lines that Take would return which came before the last checkpoint, and what had come of
// another.
func (c *Console) TakeMoment() (lines []string, partial []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	lines = append([]string(nil), c.lines[c.next:c.moment]...)
	c.next = c.moment
	return lines, c.atMoment
}

// Partial is what has come of a line that has not come to its end.
func (c *Console) Partial() []byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	return append([]byte(nil), c.partial...)
}

// Rewind forgets the lines that Next has not returned, and goes on with partial as what has come of a line: the guest
// goes back to where that was so.
func (c *Console) Rewind(partial []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.partial = append([]byte(nil), partial...)
	c.next = len(c.lines)
}

// Other returns the lines that are not the guest program's: the kernel's, and what was damaged.
func (c *Console) Other() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return append([]string(nil), c.other...)
}

// kernelTail is the end of what the kernel said.
func (c *Console) kernelTail() string {
	const n = 10
	other := c.Other()
	return strings.Join(other[max(0, len(other)-n):], "\n")
}

// tail is the end of what the guest said.
func (c *Console) tail() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	const n = 20
	said := append(append([]string{}, c.other[max(0, len(c.other)-n):]...), c.lines[max(0, len(c.lines)-n):]...)
	return strings.Join(append(said, string(c.partial)), "\n")
}
