//go:build linux && amd64

package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"

	"filippo.io/age"
	"golang.org/x/sys/unix"

	"github.com/cryovisor/cryovisor/confine"
	"github.com/cryovisor/cryovisor/internal/testplugin"
	"github.com/cryovisor/cryovisor/vmm"
)

// process is the command, in a process of its own.
func process(args ...string) *exec.Cmd {
	cmd := exec.Command(os.Args[0], args...)
	cmd.Env = append(os.Environ(), commandEnv+"=1")
	return cmd
}

// checkConfined checks that no thread of a process is left out.
func checkConfined(t *testing.T, pid int) {
	t.Helper()
	threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
	if err != nil || len(threads) == 0 {
		t.Fatalf("%d threads, %v", len(threads), err)
	}
	for _, file := range threads {
		b, err := os.ReadFile(file)
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ESRCH) {
			continue // it has ended
		}
		if s := string(b); err != nil || !strings.Contains(s, "\nSeccomp:\t2\n") || !strings.Contains(s, "\nNoNewPrivs:\t1\n") {
			t.Errorf("%s: not confined: %v", file, err)
		}
	}
}

// chatter is a flat image: mov dx, 0x3f8; mov al, 'R'; then for ever: out dx, al; jmp -3.
var chatter = []byte{0x66, 0xba, 0xf8, 0x03, 0xb0, 'R', 0xee, 0xeb, 0xfd}

// guestProcess runs a verb with such a guest until that is heard of, checks the process, and pauses the guest then. It returns the id of the snapshot.
func guestProcess(t *testing.T, check func(t *testing.T, pid int), args ...string) string {
	t.Helper()
	cmd := process(args...)
	in, inErr := cmd.StdinPipe() // stays open, as a terminal does
	out, outErr := cmd.StdoutPipe()
	var failed strings.Builder
	cmd.Stderr = &failed
	if err := errors.Join(inErr, outErr, cmd.Start()); err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	r := bufio.NewReader(out)
	if _, err := r.ReadString('R'); err != nil {
		_ = cmd.Process.Kill()
		t.Fatalf("%v: %v, %v; %s", args, err, cmd.Wait(), failed.String())
	}
	check(t, cmd.Process.Pid)
	if err := cmd.Process.Signal(syscall.SIGUSR1); err != nil {
		t.Fatal(err)
	}
	rest, _ := io.ReadAll(r)
	if err := cmd.Wait(); err != nil {
		t.Fatalf("%v: %v; %s", args, err, failed.String())
	}
	return strings.TrimSpace(strings.TrimLeft(string(rest), "R"))
}

// TestConfined takes a guest with disks and a vsock through a boot, pauses, a lazy and an eager resume, each in a process that
// confines itself. The identity is not to be had any more when the guest runs.
func TestConfined(t *testing.T) {
	in := needConfined(t)
	err := errors.Join(os.WriteFile(in("disk"), make([]byte, 1<<20), 0o600), os.WriteFile(in("raw"), make([]byte, 1<<20), 0o600), os.Mkdir(in("run"), 0o700))
	if err != nil {
		t.Fatal(err)
	}
	succeed(t, "disk", "create", in("kept.disk"), "--size", "1MiB")
	succeed(t, "disk", "export", "--format", "qcow2", in("kept.disk"), in("base.qcow2"))
	common := []string{"--identity", in("key"), "--store", in("store"), "--disk-dir", in("disks"), "--disk-rw", "raw=" + in("raw"), "--vsock", in("run/vsock")}
	check := func(t *testing.T, pid int) {
		checkConfined(t, pid)
		conn, err := net.Dial("unix", in("run/vsock")) // nobody in the guest answers
		if err == nil {
			_, err = fmt.Fprintln(conn, "CONNECT 1")
			err = errors.Join(err, conn.Close())
		}
		if err != nil {
			t.Error(err)
		}
	}
	said := guestProcess(t, check, slices.Concat([]string{"run"}, common, []string{
		"--flat", in("image"), "--memory", "8MiB", "--disk", "root=" + in("disk"), "--disk", "base=" + in("base.qcow2"), "--disk-blank", "blank=1MiB",
		"--disk-overlay", "kept=" + in("kept.disk"),
	})...)
	for _, more := range [][]string{nil, {"--eager"}, {"--prefetch", "all"}} {
		said = guestProcess(t, check, slices.Concat([]string{"resume", said}, common, more)...)
	}
	if left, err := filepath.Glob(in("run/*")); err != nil || len(left) > 0 {
		t.Errorf("sockets are left: %v, %v", left, err)
	}
	if left, err := filepath.Glob(in("disks/*.overlay")); err != nil || len(left) > 0 {
		t.Errorf("what is in a snapshot is left: %v, %v", left, err)
	}
	if _, err := os.Stat(in("kept.disk")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("what is in a snapshot is left: %v", err)
	}
	succeed(t, "verify", "--identity", in("key"), "--store", in("store"), said)
}

// TestConfinedTap has a guest with a network device, in a network namespace of its own, in which the command makes the tap.
func TestConfinedTap(t *testing.T) {
	in := needConfined(t)
	started := make(chan error)
	cmd := process("run", "--identity", in("key"), "--store", in("store"), "--flat", in("image"), "--memory", "8MiB", "--tap", "cryo0")
	stdin, inErr := cmd.StdinPipe()
	stdout, outErr := cmd.StdoutPipe()
	var failed strings.Builder
	cmd.Stderr = &failed
	go func() {
		runtime.LockOSThread() // for ever: the thread ends, and the namespace is not used for anything else
		err := unix.Unshare(unix.CLONE_NEWNET)
		if err == nil {
			err = unix.Access("/dev/net/tun", unix.R_OK|unix.W_OK)
		}
		if err != nil {
			err = fmt.Errorf("%w: %w", errors.ErrUnsupported, err)
		} else {
			err = cmd.Start()
		}
		started <- err
	}()
	err := errors.Join(inErr, outErr, <-started)
	if errors.Is(err, errors.ErrUnsupported) {
		t.Skipf("a tap in a network namespace of its own needs /dev/net/tun and CAP_SYS_ADMIN: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	defer stdin.Close()
	if _, err := bufio.NewReader(stdout).ReadString('R'); err != nil {
		t.Fatalf("%v, %v; %s", err, cmd.Wait(), failed.String())
	}
	checkConfined(t, cmd.Process.Pid)
	if err := cmd.Process.Signal(syscall.SIGUSR1); err != nil {
		t.Fatal(err)
	}
	_, _ = io.Copy(io.Discard, stdout)
	if err := cmd.Wait(); err != nil {
		t.Errorf("%v; %s", err, failed.String())
	}
}

// TestConfinedTerminal stores a guest that runs on, and pauses it, by keys typed at a terminal.
func TestConfinedTerminal(t *testing.T) {
	in := needConfined(t)
	p := newPTY(t)
	common := []string{"--identity", in("key"), "--store", in("store")}
	cmd := p.start(slices.Concat([]string{"run", "--flat", in("image"), "--memory", "8MiB"}, common)...)
	p.await("RRR")
	checkConfined(t, cmd.Process.Pid)
	p.types("\x1dc")
	p.await("stood still for")
	p.types("\x1dp")
	p.await("paused in")
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
	if !p.cooked() {
		t.Error("the terminal is not as it was")
	}
	all, err := filepath.Glob(in("store/*/*.cryo"))
	if err != nil || len(all) != 2 {
		t.Errorf("snapshots: %v, %v", all, err)
	}
	for _, path := range all {
		succeed(t, "verify", "--identity", in("key"), path)
	}
}

// needConfined makes a directory with a key and an image, where a guest can run in a process that is confined.
func needConfined(t *testing.T) (in func(name string) string) {
	t.Helper()
	if _, err := vmm.Probe(); errors.Is(err, vmm.ErrNoKVM) || errors.Is(err, vmm.ErrPermission) {
		t.Skip(err)
	}
	if !confine.Supported().Seccomp {
		t.Skip(confine.ErrUnsupported)
	}
	dir := t.TempDir()
	in = func(name string) string { return filepath.Join(dir, name) }
	id, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(writeIdentity(in("key"), id, id.Recipient()), os.WriteFile(in("image"), chatter, 0o600)); err != nil {
		t.Fatal(err)
	}
	return in
}

// TestPluginUnconfined: a plugin is another program, which a process that is confined could not start when it pauses.
func TestPluginUnconfined(t *testing.T) {
	if _, err := vmm.Probe(); errors.Is(err, vmm.ErrNoKVM) || errors.Is(err, vmm.ErrPermission) {
		t.Skip(err)
	}
	testplugin.Install(t)
	dir := t.TempDir()
	in := func(name string) string { return filepath.Join(dir, name) }
	_, key := testplugin.Generate(t, testplugin.Plain)
	err := errors.Join(os.WriteFile(in("key"), []byte(key+"\n"), 0o600), os.WriteFile(in("image"), chatter, 0o600))
	if err != nil {
		t.Fatal(err)
	}
	common := []string{"--identity", in("key"), "--store", in("store")}
	said := guestProcess(t, func(*testing.T, int) {}, slices.Concat([]string{"run"}, common, []string{"--flat", in("image"), "--memory", "8MiB"})...)
	said = guestProcess(t, func(*testing.T, int) {}, slices.Concat([]string{"resume", said}, common)...)
	succeed(t, "verify", "--identity", in("key"), "--store", in("store"), said)
}
