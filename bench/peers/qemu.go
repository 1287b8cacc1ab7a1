//go:build linux && amd64

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

const (
	qemuProgram  = "qemu-system-x86_64"
	imageProgram = "qemu-img"
)

// machine is what QEMU is to make. It stands still for ever.
type machine struct {
	ram      uint64
	memory   string // the file that is its memory
	mapped   bool   // all of the memory, from the start
	incoming bool   // it waits for its state
	drive    string // a qcow2 image, or none
}

// qemu is a running process of QEMU.
type qemu struct {
	*qmpClient
	version string
}

// args is the command line; QMP is spoken on descriptor 3.
func (m machine) args() []string {
	prealloc := map[bool]string{true: "on", false: "off"}[m.mapped]
	args := []string{
		"-nodefaults", "-display", "none", "-S", "-m", fmt.Sprintf("%dM", m.ram>>20),
		"-machine", "pc,accel=kvm,memory-backend=pc.ram",
		"-object", fmt.Sprintf("memory-backend-file,id=pc.ram,size=%d,mem-path=%s,share=on,prealloc=%s", m.ram, comma(m.memory), prealloc),
		"-chardev", "socket,id=qmp,fd=3", "-mon", "chardev=qmp,mode=control",
	}
	if m.incoming {
		args = append(args, "-incoming", "defer")
	}
	if m.drive != "" {
		args = append(args, "-drive", "if=none,format=qcow2,file="+comma(m.drive))
	}
	return args
}

// comma quotes a path as QEMU's options want it.
func comma(path string) string { return strings.ReplaceAll(path, ",", ",,") }

// run starts a QEMU, and ends it after do, with all processes that it has started.
func (m machine) run(ctx context.Context, do func(*qemu) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	ours, theirs, err := socketPair()
	if err != nil {
		return err
	}
	defer ours.Close()
	cmd := exec.CommandContext(ctx, qemuProgram, m.args()...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	cmd.ExtraFiles = []*os.File{theirs}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return unix.Kill(-cmd.Process.Pid, unix.SIGKILL) }
	err = cmd.Start()
	theirs.Close()
	if err != nil {
		return err
	}
	if err = converse(ours, do); err != nil {
		cancel()
	}
	if exit := cmd.Wait(); err == nil {
		err = exit
	}
	if err != nil {
		return fmt.Errorf("%w\n%s", err, bytes.TrimSpace(stderr.Bytes()))
	}
	return nil
}

// converse does what is to be done, and tells QEMU to end.
func converse(conn net.Conn, do func(*qemu) error) error {
	client, version, err := newQMPClient(conn)
	if err != nil {
		return err
	}
	if err := do(&qemu{client, version}); err != nil {
		return err
	}
	_, err = client.execute("quit", nil)
	return err
}

// socketPair makes two connected sockets, of which the second is for a child.
func socketPair() (net.Conn, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, os.NewSyscallError("socketpair", err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "qmp"), os.NewFile(uintptr(fds[1]), "qmp")
	defer ours.Close()
	conn, err := net.FileConn(ours)
	if err != nil {
		return nil, nil, errors.Join(err, theirs.Close())
	}
	return conn, theirs, nil
}
