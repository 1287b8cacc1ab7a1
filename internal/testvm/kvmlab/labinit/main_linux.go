// Command labinit is the first process of the KVM lab's host. It mounts file systems, loads the
// kernel's modules, runs one binary and reports its output and how it ended on the second serial
// port.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/cryovisor/cryovisor/internal/testvm/kvmlab/internal/wire"
)

// results is the serial port that the frames go to; the kernel's console is the first.
const results = "/dev/ttyS1"

func main() {
	if err := mountAll(); err != nil {
		die(err)
	}
	port, err := openPort(results)
	if err != nil {
		die(err)
	}
	frames, err := wire.NewWriter(port)
	if err != nil {
		die(err)
	}
	if failure := serve(port, frames); failure != nil {
		err = frames.Write(wire.Failed, []byte(failure.Error()))
	}
	// The outside ends the lab at the last frame; this is for when it does not.
	drain(port)
	die(errors.Join(err, unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)))
}

// die ends the first process, at which the kernel panics and, told to, resets the machine.
func die(err error) {
	fmt.Fprintln(os.Stderr, "labinit:", err)
	os.Exit(1)
}

// serve does the work: everything that can fail once there is someone to tell. Orders come from
// where the frames go.
func serve(orders io.Reader, frames *wire.Writer) error {
	text, err := os.ReadFile(wire.SpecPath)
	if err != nil {
		return err
	}
	var spec wire.Spec
	if err := json.Unmarshal(text, &spec); err != nil {
		return fmt.Errorf("%s: %w", wire.SpecPath, err)
	}
	if err := loopbackUp(); err != nil {
		return err
	}
	for _, name := range spec.Modules {
		if err := loadModule(path.Join(wire.ModulesDir, name)); err != nil {
			return err
		}
	}
	if err := frames.Write(wire.Ready, nil); err != nil {
		return err
	}
	status, err := runBinary(spec, orders, frames)
	if err != nil {
		return err
	}
	return frames.WriteExit(status)
}

// mountAll mounts what programs expect. The root is in memory already.
func mountAll() error {
	for _, m := range []struct{ fstype, dir string }{
		{"devtmpfs", "/dev"},
		{"proc", "/proc"},
		{"sysfs", "/sys"},
		{"tmpfs", "/tmp"},
		{"cgroup2", "/sys/fs/cgroup"},
		{"devpts", "/dev/pts"},
		{"tmpfs", "/dev/shm"},
	} {
		if err := os.MkdirAll(m.dir, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m.fstype, m.dir, m.fstype, 0, ""); err != nil {
			return fmt.Errorf("mount %s on %s: %w", m.fstype, m.dir, err)
		}
	}
	return os.Chmod("/tmp", 0o777|os.ModeSticky)
}

// openPort opens a serial port that passes all bytes as they are.
func openPort(name string) (*os.File, error) {
	port, err := os.OpenFile(name, os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, err
	}
	raw := unix.Termios{Cflag: unix.CS8 | unix.CLOCAL | unix.CREAD | unix.B115200}
	raw.Cc[unix.VMIN] = 1
	if err := unix.IoctlSetTermios(int(port.Fd()), unix.TCSETS, &raw); err != nil {
		return nil, fmt.Errorf("%s: set raw mode: %w", name, err)
	}
	return port, nil
}

// drain waits until all that was written to a serial port has left it, as tcdrain does. It is
// best effort: nothing can be done, or told, if it fails.
func drain(port *os.File) {
	_ = unix.IoctlSetInt(int(port.Fd()), unix.TCSBRK, 1)
}

// loopbackUp brings the loopback interface up, for tests that use local sockets.
func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("socket: %w", err)
	}
	defer func() { _ = unix.Close(fd) }()
	req, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	req.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, req); err != nil {
		return fmt.Errorf("bring lo up: %w", err)
	}
	return nil
}

// loadModule loads a kernel module from a file.
func loadModule(file string) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.FinitModule(int(f.Fd()), "", 0); err != nil && !errors.Is(err, syscall.EEXIST) {
		return fmt.Errorf("load module %s: %w", file, err)
	}
	return nil
}
