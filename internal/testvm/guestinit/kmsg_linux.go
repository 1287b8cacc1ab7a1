package main

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// warningLevel is KERN_WARNING; lower numbers are worse.
const warningLevel = 4

// warnings reports every line of the kernel's log that is a warning or worse, and returns how many there are.
func (g *guest) warnings() (string, error) {
	fd, err := unix.Open("/dev/kmsg", unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", os.NewSyscallError("open /dev/kmsg", err)
	}
	defer func() { _ = unix.Close(fd) }()
	count := 0
	buf := make([]byte, 8192)
	for {
		n, err := unix.Read(fd, buf)
		switch {
		case errors.Is(err, unix.EAGAIN):
			return strconv.Itoa(count), nil
		case errors.Is(err, unix.EPIPE), errors.Is(err, unix.EINTR): // EPIPE: older lines were overwritten
			continue
		case err != nil:
			return "", os.NewSyscallError("read /dev/kmsg", err)
		}
		// "priority,sequence,time,flags;text", then lines with details.
		head, text, _ := strings.Cut(string(buf[:n]), ";")
		fields := strings.SplitN(head, ",", 4)
		priority, err := strconv.Atoi(fields[0])
		if err != nil || len(fields) < 3 {
			return "", fmt.Errorf("record %q", buf[:n])
		}
		if priority&7 <= warningLevel {
			text, _, _ = strings.Cut(text, "\n")
			g.con.say("kmsg %s %s", fields[2], text)
			count++
		}
	}
}
