package main

import (
	"fmt"
	"os"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/cryovisor/cryovisor/internal/testvm/guestinit/wire"
)

// console is the serial port, for lines of several goroutines.
type console struct {
	f  *os.File
	mu sync.Mutex
}

// openConsole opens a serial port that passes all bytes as they are, without echo.
func openConsole(name string) (*console, error) {
	f, err := os.OpenFile(name, os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, err
	}
	raw := unix.Termios{Cflag: unix.CS8 | unix.CLOCAL | unix.CREAD | unix.B115200}
	raw.Cc[unix.VMIN] = 1
	if err := unix.IoctlSetTermios(int(f.Fd()), unix.TCSETS, &raw); err != nil {
		return nil, fmt.Errorf("%s: set raw mode: %w", name, err)
	}
	return &console{f: f}, nil
}

// say writes a line, whose text may be an error of several lines. Nobody could be told if it failed.
func (c *console) say(format string, args ...any) {
	line := wire.Line(strings.ReplaceAll(fmt.Sprintf(format, args...), "\n", " | "))
	c.mu.Lock()
	defer c.mu.Unlock()
	_, _ = c.f.WriteString(line)
}
