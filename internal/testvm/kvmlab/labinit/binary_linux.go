package main

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cryovisor/cryovisor/internal/testvm/kvmlab/internal/wire"
)

// environment is what the binary gets before what the Spec adds.
var environment = []string{
	"PATH=/bin:/sbin:/usr/bin:/usr/sbin",
	"HOME=/root",
	"TMPDIR=/tmp",
	// The lab has one processor, and a Go program that serves page faults of its own threads
	// must not run on one.
	"GOMAXPROCS=2",
	"CRYOVISOR_IN_LAB=1",
	"CRYOVISOR_LAB_CACHE=" + wire.CacheDir,
}

// outputGrace is how long output is still passed on after the binary has ended, if a process that
// it left behind holds its standard output.
const outputGrace = 5 * time.Second

// outputs passes on what a process writes. Both streams share one Writer.
type outputs struct {
	mu     sync.Mutex
	frames *wire.Writer
	err    error // the first error of a write
	wg     sync.WaitGroup
	pipes  []*os.File // ends that are read here
}

// pipe returns the end of a new pipe that a process writes to; what comes is passed on as kind.
func (o *outputs) pipe(kind wire.Kind) (*os.File, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("pipe: %w", err)
	}
	o.pipes = append(o.pipes, r)
	o.wg.Go(func() { o.copy(kind, r) })
	return w, nil
}

func (o *outputs) copy(kind wire.Kind, r *os.File) {
	defer r.Close()
	buf := make([]byte, 16<<10)
	for {
		n, err := r.Read(buf)
		if n > 0 {
			o.mu.Lock()
			o.err = cmp.Or(o.err, o.frames.Write(kind, buf[:n]))
			o.mu.Unlock()
		}
		if err != nil { // io.EOF, or the deadline that wait sets
			return
		}
	}
}

// wait returns when everything was passed on, the binary having ended.
func (o *outputs) wait() error {
	for _, r := range o.pipes {
		// An error means that the pipe is closed: all of it was read.
		_ = r.SetReadDeadline(time.Now().Add(outputGrace))
	}
	o.wg.Wait()
	return o.err
}

// runBinary runs the binary of the Spec, obeys orders meanwhile, and returns how it ended.
func runBinary(spec wire.Spec, orders io.Reader, frames *wire.Writer) (wire.Status, error) {
	out := &outputs{frames: frames}
	stdout, err := out.pipe(wire.Stdout)
	if err != nil {
		return wire.Status{}, err
	}
	stderr := stdout
	if !spec.MergeStderr {
		if stderr, err = out.pipe(wire.Stderr); err != nil {
			return wire.Status{}, err
		}
	}
	stdin, err := os.Open(os.DevNull)
	if err != nil {
		return wire.Status{}, err
	}
	process, err := os.StartProcess(spec.Binary, append([]string{spec.Binary}, spec.Args...), &os.ProcAttr{
		Dir:   cmp.Or(spec.Dir, wire.WorkDir),
		Env:   append(environment, spec.Env...),
		Files: []*os.File{stdin, stdout, stderr},
	})
	if err != nil {
		return wire.Status{}, err
	}
	// Only the process holds the writing ends now; closing one twice is harmless.
	for _, f := range []*os.File{stdin, stdout, stderr} {
		f.Close()
	}
	go obey(orders, process)
	status, err := reapUntil(process.Pid)
	return status, errors.Join(err, out.wait())
}

// obey signals the process when it is told to.
func obey(orders io.Reader, process *os.Process) {
	var order [1]byte
	for {
		if _, err := orders.Read(order[:]); err != nil {
			return
		}
		if order[0] == wire.Quit {
			// An error means that the process has ended, which is as well.
			_ = process.Signal(unix.SIGQUIT)
		}
	}
}

// reapUntil waits for every child, as the first process must, until pid has ended.
func reapUntil(pid int) (wire.Status, error) {
	for {
		var ws unix.WaitStatus
		got, err := unix.Wait4(-1, &ws, 0, nil)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return wire.Status{}, fmt.Errorf("wait: %w", err)
		case got != pid:
		case ws.Signaled():
			return wire.Status{Signal: ws.Signal().String(), Number: int(ws.Signal())}, nil
		default:
			return wire.Status{Code: ws.ExitStatus()}, nil
		}
	}
}
