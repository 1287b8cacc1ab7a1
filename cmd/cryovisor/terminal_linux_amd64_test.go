package main

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/cryovisor/cryovisor/internal/testplugin"
)

// pty is a terminal, and a user who sits at it.
type pty struct {
	t            *testing.T
	user, device *os.File

	mu    sync.Mutex
	more  *sync.Cond
	shown []byte
	end   error
}

func newPTY(t *testing.T) *pty {
	t.Helper()
	user, err := os.OpenFile("/dev/ptmx", os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		t.Skip(err)
	}
	if err := unix.IoctlSetPointerInt(int(user.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(int(user.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	device, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	p := &pty{t: t, user: user, device: device}
	p.more = sync.NewCond(&p.mu)
	var reading sync.WaitGroup
	reading.Go(p.read)
	t.Cleanup(func() {
		device.Close() // the last one: the reader gets EIO
		reading.Wait()
		user.Close()
	})
	return p
}

func (p *pty) read() {
	for b := make([]byte, 1024); ; {
		n, err := p.user.Read(b)
		p.mu.Lock()
		p.shown, p.end = append(p.shown, b[:n]...), err
		p.more.Broadcast()
		p.mu.Unlock()
		if err != nil {
			return
		}
	}
}

// await waits until the terminal has shown a text.
func (p *pty) await(text string) {
	p.t.Helper()
	p.mu.Lock()
	defer p.mu.Unlock()
	for !strings.Contains(string(p.shown), text) {
		if p.end != nil {
			p.t.Fatalf("%q is not there, but %q, and then %v", text, p.shown, p.end)
		}
		p.more.Wait()
	}
}

func (p *pty) sees() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return string(p.shown)
}

func (p *pty) types(text string) {
	p.t.Helper()
	if _, err := io.WriteString(p.user, text); err != nil {
		p.t.Fatal(err)
	}
}

// start starts the command at the terminal. Whatever it says to standard error is shown there, too.
func (p *pty) start(args ...string) *exec.Cmd {
	p.t.Helper()
	cmd := process(args...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = p.device, p.device, p.device
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		p.t.Fatal(err)
	}
	return cmd
}

// cooked says whether the terminal shows what is typed, and takes it line by line.
func (p *pty) cooked() bool {
	p.t.Helper()
	state, err := unix.IoctlGetTermios(int(p.device.Fd()), unix.TCGETS)
	if err != nil {
		p.t.Fatal(err)
	}
	const all = unix.ECHO | unix.ICANON | unix.ISIG
	return state.Lflag&all == all
}

// TestQuestions answers questions on a terminal, and gives them up: by Ctrl-C, or by a signal from elsewhere. The terminal
// is then as it was.
func TestQuestions(t *testing.T) {
	v := newVault(t)
	testplugin.Install(t)
	recipient, key := testplugin.Generate(t, testplugin.Asking)
	ofPlugin, ofPassphrase := v.snapshot(), v.snapshot()
	succeed(t, "rekey", ofPlugin, "-i", v.owner, "-r", recipient)
	succeed(t, "rekey", ofPassphrase, "-i", v.owner, "--new-passphrase-file", v.file("passphrase", "a secret of ours"))
	plugin := []string{"verify", ofPlugin, "-i", v.file("plugin", key+"\n")}
	passphrase := []string{"verify", ofPassphrase}
	send := func(s syscall.Signal) func(*pty, *exec.Cmd) error {
		return func(_ *pty, cmd *exec.Cmd) error { return cmd.Process.Signal(s) }
	}
	typed := func(text string) func(*pty, *exec.Cmd) error {
		return func(p *pty, _ *exec.Cmd) error { p.types(text); return nil }
	}
	for _, c := range []struct {
		name, question string
		args           []string
		do             func(*pty, *exec.Cmd) error
		works          bool
	}{
		{"PIN", "PIN of the test", plugin, typed(testplugin.PIN + "\r"), true},
		{"PIN, Ctrl-C", "PIN of the test", plugin, typed("12\x03"), false},
		{"PIN, SIGINT", "PIN of the test", plugin, send(syscall.SIGINT), false},
		{"PIN, SIGTERM", "PIN of the test", plugin, send(syscall.SIGTERM), false},
		{"passphrase", "Passphrase of the snapshot", passphrase, typed("a secret of ours\r"), true},
		{"passphrase, Ctrl-C", "Passphrase of the snapshot", passphrase, typed("12\x03"), false},
		{"passphrase, SIGINT", "Passphrase of the snapshot", passphrase, send(syscall.SIGINT), false},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := newPTY(t)
			cmd := p.start(c.args...)
			p.await(c.question)
			if p.cooked() {
				t.Error("what is typed is shown")
			}
			if err := c.do(p, cmd); err != nil {
				t.Error(err)
			}
			if err := cmd.Wait(); (err == nil) != c.works {
				t.Errorf("the command ended with %v", err)
			}
			if !p.cooked() {
				t.Error("the terminal is not as it was")
			}
			fmt.Fprintln(p.device, "that was all")
			p.await("that was all")
			if said := strings.Contains(p.sees(), errNotAnswered.Error()); said == c.works {
				t.Errorf("it shows %q", p.sees())
			}
			for _, secret := range []string{testplugin.PIN, "a secret of ours"} {
				if strings.Contains(p.sees(), secret) {
					t.Errorf("it shows %q", p.sees())
				}
			}
		})
	}
}
