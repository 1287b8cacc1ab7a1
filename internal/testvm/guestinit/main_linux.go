// Command guestinit is the first and only program of the Linux guests in the project's tests. It takes orders over the
// console, puts load on everything that a pause could harm, and reports an unbroken, checksummed log.
package main

import (
	"bufio"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

func main() {
	if os.Getpid() != 1 {
		if err := runHelper(os.Args[1]); err != nil {
			fmt.Fprintln(os.Stderr, "guestinit:", err)
			os.Exit(1)
		}
		return
	}
	if err := serve(); err != nil {
		fmt.Fprintln(os.Stderr, "guestinit:", err)
	}
	// The end of the first process is a panic of the kernel, which the host sees as a reset.
}

// serve sets the machine up, says so, and obeys.
func serve() error {
	if err := mountAll(); err != nil {
		return err
	}
	con, err := openConsole("/dev/ttyS0")
	if err != nil {
		return err
	}
	if err := prepare(); err != nil {
		con.say("failed %v", err)
		return err
	}
	con.say("up %s", facts())
	g := &guest{con: con}
	orders := bufio.NewScanner(con.f)
	for orders.Scan() {
		name, arg, _ := strings.Cut(strings.TrimSpace(orders.Text()), " ")
		if name == "" {
			continue
		}
		answer, err := g.obey(name, arg)
		if err != nil {
			con.say("error %s: %v", name, err)
			continue
		}
		con.say("done %s %s", name, answer)
	}
	return orders.Err()
}

// noteFile is a file in memory by which the host tells clones apart.
const noteFile = "/tmp/note"

// guest is what orders act on.
type guest struct {
	con  *console
	load *load // nil when none runs
	hog  *hog  // nil when there is none
}

func (g *guest) obey(name, arg string) (string, error) {
	switch name {
	case "echo":
		return arg, nil
	case "facts":
		return facts(), nil
	case "clock":
		return clocks()
	case "warnings":
		return g.warnings()
	case "start":
		return g.start(arg)
	case "stop":
		return g.stop()
	case "db-check":
		return g.checkVolume(false)
	case "db-check-crashed":
		return g.checkVolume(true)
	case "entropy":
		return entropy()
	case "note":
		return arg, os.WriteFile(noteFile, []byte(arg), 0o600)
	case "noted":
		return read(noteFile), nil
	case "hog":
		return g.startHog(arg)
	case "unhog":
		return g.endHog()
	case "net":
		return netUp(arg)
	case "vsock-listen":
		return vsockListen(arg)
	case "vsock-connect":
		return vsockConnect(arg, false)
	case "vsock-hold":
		return vsockConnect(arg, true)
	case "vsock-end":
		return vsockEnd(arg)
	case "tcp-echo":
		return tcpEcho(arg)
	case "poweroff":
		return "", unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	case "reboot":
		return "", unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
	default:
		return "", fmt.Errorf("unknown order")
	}
}

// mountAll mounts what programs expect. The root is in memory already.
func mountAll() error {
	for _, m := range []struct{ fstype, dir string }{
		{"devtmpfs", "/dev"}, {"proc", "/proc"}, {"sysfs", "/sys"}, {"tmpfs", "/tmp"},
	} {
		if err := os.MkdirAll(m.dir, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m.fstype, m.dir, m.fstype, 0, ""); err != nil {
			return fmt.Errorf("mount %s on %s: %w", m.fstype, m.dir, err)
		}
	}
	return nil
}

// prepare loads the modules of the initramfs, in the order of their names, and brings the loopback interface up.
func prepare() error {
	modules, err := filepath.Glob("/modules/*.ko")
	if err != nil {
		return err
	}
	for _, file := range modules {
		if err := loadModule(file); err != nil {
			return err
		}
	}
	return interfaceUp("lo")
}

func loadModule(file string) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.FinitModule(int(f.Fd()), "", 0); err != nil {
		return fmt.Errorf("load module %s: %w", file, err)
	}
	return nil
}

// interfaceUp brings a network interface up.
func interfaceUp(name string) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("socket: %w", err)
	}
	defer func() { _ = unix.Close(fd) }()
	req, err := unix.NewIfreq(name)
	if err != nil {
		return err
	}
	req.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, req); err != nil {
		return fmt.Errorf("bring %s up: %w", name, err)
	}
	return nil
}

// facts describe the machine: name=value, separated by blanks.
func facts() string {
	return fmt.Sprintf("kernel=%s clocksource=%s cpus=%d",
		read("/proc/sys/kernel/osrelease"),
		read("/sys/devices/system/clocksource/clocksource0/current_clocksource"),
		runtime.NumCPU())
}

// read is a small file of the kernel, or what went wrong.
func read(file string) string {
	b, err := os.ReadFile(file)
	if err != nil {
		return err.Error()
	}
	return strings.TrimSpace(string(b))
}

// clocks are the monotonic and the wall clock, in nanoseconds.
func clocks() (string, error) {
	var mono, wall unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &mono); err != nil {
		return "", err
	}
	if err := unix.ClockGettime(unix.CLOCK_REALTIME, &wall); err != nil {
		return "", err
	}
	return fmt.Sprintf("mono=%d wall=%d", mono.Nano(), wall.Nano()), nil
}
