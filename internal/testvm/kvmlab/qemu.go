//go:build linux && amd64

package kvmlab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/cryovisor/cryovisor/internal/testvm/kvmlab/internal/wire"
)

// processor is the emulated CPU. Without vgif, interrupts to guests of the lab get lost.
const processor = "max,+svm,-vgif"

// commandLine is that of the lab's kernel. A tickless kernel loses interrupts to its guests, and
// an emulated processor has no use for mitigations, nor for checks of clocks that a busy machine
// fails. Every oops is a panic, and every panic ends the lab at once.
const commandLine = "console=ttyS0 quiet loglevel=3 panic=-1 oops=panic mitigations=off nokaslr " +
	"tsc=reliable no_timer_check nohz=off highres=off"

// tailLen is how much of the console and of QEMU's messages goes into an error, in bytes.
const tailLen = 4096

// quitGrace is the time that the binary has to print its goroutines and end, once its time is up.
const quitGrace = 5 * time.Second

// errNotUp ends a lab that does not start its binary.
var errNotUp = fmt.Errorf("the binary was not started within %v", bootLimit)

// labHost is one boot of the lab.
type labHost struct {
	kernel, initramfs string
	console           string // file that gets the kernel's console
	memoryMiB         int
	tscKHz            uint64      // frequency of the time stamp counter
	up                atomic.Bool // the binary was started
}

// command is QEMU with the lab's console in a file, and the frames of the init program on its
// standard output.
func (h *labHost) command(ctx context.Context) *exec.Cmd {
	cmd := exec.CommandContext(ctx, qemuProgram,
		"-no-user-config", "-nodefaults", "-display", "none", "-no-reboot",
		// Two emulated processors hang now and then.
		"-machine", "q35", "-accel", "tcg,thread=multi", "-cpu", processor, "-smp", "1",
		"-m", strconv.Itoa(h.memoryMiB),
		"-serial", "file:"+h.console,
		"-chardev", "stdio,id=frames,signal=off", "-serial", "chardev:frames",
		"-kernel", h.kernel, "-initrd", h.initramfs,
		"-append", commandLine+" tsc_early_khz="+strconv.FormatUint(h.tscKHz, 10))
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return cmd
}

// run boots the lab, passes the binary's output on and returns how it ended. Any error about the
// lab itself is a *HostError.
func (h *labHost) run(ctx context.Context, stdout, stderr io.Writer) (wire.Status, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	notUp := time.AfterFunc(bootLimit, func() { cancel(errNotUp) })
	defer notUp.Stop()

	// The signal that kills QEMU with this process comes when the thread that started it ends.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var messages tail
	cmd := h.command(ctx)
	cmd.Stderr = &messages
	frames, err := h.start(cmd)
	if err != nil {
		return wire.Status{}, h.died("start QEMU", err, &messages)
	}
	p := pump{stdout: stdout, stderr: stderr, ready: func() {
		notUp.Stop()
		h.up.Store(true)
	}}
	status, err := p.run(wire.NewReader(frames))
	if err == nil || !errors.Is(err, io.EOF) {
		// Nothing in the lab is worth an orderly end, which could hang.
		err = errors.Join(err, ignoreDone(cmd.Process.Kill()))
	}
	waitErr := cmd.Wait()
	switch {
	case err == nil:
		return status, nil
	case errors.Is(context.Cause(ctx), errNotUp):
		return wire.Status{}, h.died("boot", errNotUp, &messages)
	case errors.Is(err, io.EOF) && waitErr != nil:
		return wire.Status{}, h.died("QEMU ended", waitErr, &messages)
	case errors.Is(err, io.EOF):
		return wire.Status{}, h.died("it stopped before the binary ended", nil, &messages)
	default:
		return wire.Status{}, h.died("results", err, &messages)
	}
}

// start starts QEMU and returns the stream of frames. When its context ends, the binary is told to
// quit, if it was started, and QEMU is killed a little later.
func (h *labHost) start(cmd *exec.Cmd) (io.Reader, error) {
	orders, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	frames, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	cmd.WaitDelay = quitGrace
	cmd.Cancel = func() error {
		if !h.up.Load() {
			return cmd.Process.Kill()
		}
		_, err := orders.Write([]byte{wire.Quit})
		return err
	}
	return frames, cmd.Start()
}

// ignoreDone drops the error of killing a process that has ended.
func ignoreDone(err error) error {
	if errors.Is(err, os.ErrProcessDone) {
		return nil
	}
	return err
}

// died makes a *HostError with the end of the console and of QEMU's messages.
func (h *labHost) died(reason string, err error, messages *tail) error {
	// Without a console there is that much less to say.
	said, _ := os.ReadFile(h.console)
	said = append(said[max(0, len(said)-tailLen):], messages.buf...)
	if err != nil {
		reason += ": " + err.Error()
	}
	// The firmware clears its screen, and the kernel ends lines with a carriage return.
	console := string(bytes.ReplaceAll(said, []byte("\r"), nil))
	return &HostError{Reason: reason, Console: console, Err: err}
}

// pump passes on what comes out of the lab.
type pump struct {
	stdout, stderr io.Writer
	ready          func() // called when the binary is about to start
}

// run reads frames up to the last. The error is io.EOF if they stop before.
func (p *pump) run(frames *wire.Reader) (wire.Status, error) {
	for {
		kind, payload, err := frames.Next()
		if errors.Is(err, io.ErrUnexpectedEOF) {
			err = io.EOF
		}
		if err != nil {
			return wire.Status{}, err
		}
		switch kind {
		case wire.Ready:
			p.ready()
		case wire.Stdout:
			_, err = p.stdout.Write(payload)
		case wire.Stderr:
			_, err = p.stderr.Write(payload)
		case wire.Exit:
			return wire.ParseExit(payload)
		case wire.Failed:
			return wire.Status{}, fmt.Errorf("init program: %s", payload)
		}
		if err != nil {
			return wire.Status{}, fmt.Errorf("pass on output: %w", err)
		}
	}
}

// tail is a writer that keeps the end of what is written to it.
type tail struct{ buf []byte }

func (t *tail) Write(p []byte) (int, error) {
	t.buf = append(t.buf, p...)
	if drop := len(t.buf) - tailLen; drop > 0 {
		t.buf = append(t.buf[:0], t.buf[drop:]...)
	}
	return len(p), nil
}
