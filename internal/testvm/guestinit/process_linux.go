package main

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// messageSize is what a helper process hashes at a time.
const messageSize = 48 << 10

// helper is a process of its own that answers every message with its number and its hash. It counts the messages, and
// so would notice one that is lost or comes twice.
type helper struct {
	cmd  *exec.Cmd
	conn io.ReadWriteCloser
}

// startHelper starts this program anew as a helper.
func startHelper(arg string, in io.Reader, out io.Writer) (*exec.Cmd, error) {
	cmd := exec.Command("/proc/self/exe", arg)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = in, out, os.Stderr
	return cmd, cmd.Start()
}

// runHelper is the helper process: over its standard streams, or over a connection to an address; or one that
// holds memory.
func runHelper(arg string) error {
	if arg == "-" {
		return answer(os.Stdin, os.Stdout)
	}
	if mib, ok := strings.CutPrefix(arg, hogWord); ok {
		return holdMemory(mib)
	}
	conn, err := net.Dial("tcp", arg)
	if err != nil {
		return err
	}
	return answer(conn, conn)
}

// answer answers messages until there are no more.
func answer(in io.Reader, out io.Writer) error {
	message := make([]byte, messageSize)
	for n := uint64(0); ; n++ {
		if _, err := io.ReadFull(in, message); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		if _, err := fmt.Fprintf(out, "%08x %x\n", n, sha256.Sum256(message)); err != nil {
			return err
		}
	}
}

func (h *helper) step(n uint64) (string, error) {
	message := content(5, n, messageSize)
	want := fmt.Sprintf("%08x %x\n", n, sha256.Sum256(message))
	sent := make(chan error, 1)
	go func() {
		_, err := h.conn.Write(message)
		sent <- err
	}()
	got := make([]byte, len(want))
	if _, err := io.ReadFull(h.conn, got); err != nil {
		return "", err
	}
	if string(got) != want {
		return "", fmt.Errorf("the helper answers %q, want %q", got, want)
	}
	return fmt.Sprintf("sha256=%s", got[9:25]), <-sent
}

func (h *helper) finish() error { return errors.Join(h.conn.Close(), h.cmd.Wait()) }

// pipes are the ends of two pipes to a process.
type pipes struct {
	io.Reader
	io.WriteCloser
}

func newPipe() (job, error) {
	theirIn, in, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	out, theirOut, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	cmd, err := startHelper("-", theirIn, theirOut)
	return &helper{cmd: cmd, conn: pipes{out, in}}, errors.Join(err, theirIn.Close(), theirOut.Close())
}

func newTCP() (job, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	defer l.Close()
	cmd, err := startHelper(l.Addr().String(), nil, nil)
	if err != nil {
		return nil, err
	}
	conn, err := l.Accept()
	return &helper{cmd: cmd, conn: conn}, err
}

// timerPeriod is that of the kernel timer of the timer job.
const timerPeriod = 50 * time.Millisecond

// timer waits for a periodic timer of the kernel, and holds the clocks against each other.
type timer struct {
	fd    int
	last  int64
	begin int64
	fired uint64
}

func newTimer() (job, error) {
	fd, err := unix.TimerfdCreate(unix.CLOCK_MONOTONIC, unix.TFD_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("timerfd_create", err)
	}
	period := unix.NsecToTimespec(int64(timerPeriod))
	t := &timer{fd: fd, begin: monotonic()}
	return t, os.NewSyscallError("timerfd_settime", unix.TimerfdSettime(fd, 0, &unix.ItimerSpec{Interval: period, Value: period}, nil))
}

// step waits for the timer, which must have fired as often as its period has passed.
func (t *timer) step(uint64) (string, error) {
	var b [8]byte
	if _, err := unix.Read(t.fd, b[:]); err != nil && !errors.Is(err, unix.EINTR) {
		return "", os.NewSyscallError("read timerfd", err)
	}
	now := monotonic()
	if now <= t.last {
		return "", fmt.Errorf("the monotonic clock went from %d to %d", t.last, now)
	}
	t.last = now
	t.fired += binary.NativeEndian.Uint64(b[:])
	if most := uint64(now-t.begin) / uint64(timerPeriod); t.fired > most {
		return "", fmt.Errorf("the timer fired %d times in a time for %d", t.fired, most)
	}
	return fmt.Sprintf("fired=%d wall=%d", t.fired, time.Now().UnixNano()), nil
}

func (t *timer) finish() error { return os.NewSyscallError("close", unix.Close(t.fd)) }
