package serial

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"
)

// Enqueue offers input to the guest and returns how many bytes of p the UART took: the first ones, as
// many as it has room for (its FIFO and InputBacklog bytes). What it took is part of State until
// the guest reads it; the guest loses it only by clearing its FIFO. A guest that has set the modem control register gets
// input only while RTS is on, as from a peer with a hardware handshake.
func (u *UART) Enqueue(p []byte) int {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.enqueue(p)
}

func (u *UART) enqueue(p []byte) int {
	u.fill()
	taken := 0
	for taken < len(p) && len(u.backlog) < InputBacklog {
		n := min(len(p)-taken, InputBacklog-len(u.backlog))
		u.backlog = append(u.backlog, p[taken:taken+n]...)
		taken += n
		u.fill()
	}
	u.update()
	return taken
}

// fill moves input into the receive FIFO, if the line is open.
func (u *UART) fill() {
	n := min(len(u.backlog), u.depth()-len(u.fifo))
	if n <= 0 || !u.lineOpen() {
		return
	}
	u.fifo = append(u.fifo, u.backlog[:n]...)
	u.backlog = append(u.backlog[:0], u.backlog[n:]...)
	u.space.Broadcast()
}

// lineOpen reports whether the peer may send. It heeds RTS, so that what is typed before a driver has opened the port
// is not lost to the driver's probing, which clears the FIFO time and again. A guest that never sets MCR at all knows of
// no handshake and gets its input at once. In loopback the receiver is cut off from the line.
func (u *UART) lineOpen() bool {
	r := &u.regs
	return r.mcr&mcrLoop == 0 && (!r.handshake || r.mcr&mcrRTS != 0)
}

// Pump copies r to the guest until r ends (nil), r fails (its error), ctx ends (its cause) or the UART
// is closed (nil). It runs on the caller's goroutine and reads only what the UART has room for, so that
// apart from a Read in progress no input is outside the UART. When ctx ends, bytes that a Read
// then returns still reach the UART if there is room.
//
// A Read can't be abandoned: when ctx ends or the UART closes, Pump returns at once only if r is
// Interruptible, and otherwise when r's Read returns. So wait for Pump only if r is
// Interruptible; for others (a terminal in blocking mode) leave it behind, and know that it eats one
// more Read. Pump clears r's read deadline, and leaves it in the past when it is ended.
func (u *UART) Pump(ctx context.Context, r io.Reader) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(u.life, func() { cancel(errClosed) })()
	defer interruptOn(ctx, r)()
	err := u.pump(ctx, r)
	if errors.Is(err, errClosed) {
		return nil
	}
	return err
}

func (u *UART) pump(ctx context.Context, r io.Reader) error {
	buf := make([]byte, 512)
	for {
		room, err := u.waitRoom(ctx)
		if err != nil {
			return err
		}
		n, rerr := r.Read(buf[:min(room, len(buf))])
		if err := u.enqueueAll(ctx, buf[:n]); err != nil {
			return err
		}
		switch {
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case errors.Is(rerr, io.EOF):
			return nil
		case rerr != nil:
			return fmt.Errorf("serial: read of guest input: %w", rerr)
		}
	}
}

// Interruptible reports whether a Read of r in progress can be made to return: r has a
// SetReadDeadline method that works, as network connections and pipes have. It clears r's read deadline.
func Interruptible(r io.Reader) bool {
	d, ok := r.(readDeadliner)
	return ok && d.SetReadDeadline(time.Time{}) == nil
}

// errClosed ends the pumps of a UART that was closed.
var errClosed = errors.New("serial: the UART was closed")

type readDeadliner interface{ SetReadDeadline(time.Time) error }

// interruptOn arranges for a Read of r to return when ctx ends, until the function that it returns is called. That one
// waits for an interruption under way, which would otherwise hit the Read of a later Pump.
func interruptOn(ctx context.Context, r io.Reader) (stop func()) {
	if !Interruptible(r) {
		return func() {}
	}
	done := make(chan struct{})
	cancel := context.AfterFunc(ctx, func() {
		defer close(done)
		_ = r.(readDeadliner).SetReadDeadline(time.Unix(1, 0)) // it worked just now
	})
	return func() {
		if !cancel() {
			<-done
		}
	}
}

// waitRoom waits for room for input and returns how much there is, in bytes.
func (u *UART) waitRoom(ctx context.Context) (int, error) {
	stop := context.AfterFunc(ctx, func() {
		u.mu.Lock()
		defer u.mu.Unlock()
		u.space.Broadcast()
	})
	defer stop()
	u.mu.Lock()
	defer u.mu.Unlock()
	for {
		switch {
		case ctx.Err() != nil:
			return 0, context.Cause(ctx)
		case len(u.backlog) < InputBacklog:
			return InputBacklog - len(u.backlog), nil
		}
		u.space.Wait()
	}
}

// enqueueAll enqueues p; it has to wait only when someone else enqueues too.
func (u *UART) enqueueAll(ctx context.Context, p []byte) error {
	for {
		p = p[u.Enqueue(p):]
		if len(p) == 0 {
			return nil
		}
		if _, err := u.waitRoom(ctx); err != nil {
			return fmt.Errorf("serial: %d bytes of guest input lost: %w", len(p), err)
		}
	}
}
