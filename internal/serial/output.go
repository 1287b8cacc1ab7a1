package serial

import (
	"context"
	"fmt"
	"io"
	"sync"
	"time"
)

// txQueue holds what the guest has sent and the writer has not taken. The UART's lock guards it.
type txQueue struct {
	wait    *sync.Cond // signalled on every change
	buf     []byte     // waiting for the writer
	busy    bool       // the writer has bytes in hand
	blocked bool       // the guest is told to wait
	closing bool       // end when empty
	abandon bool       // end now
	done    bool       // the goroutine has ended
	dropped uint64
	err     error
}

func (q *txQueue) init(mu *sync.Mutex) { q.wait = sync.NewCond(mu) }

// ready reports whether the guest may send: its transmitter is empty.
func (q *txQueue) ready() bool { return !q.blocked }

// put queues b. A closed queue and a failed writer swallow it, so that the guest runs on.
func (q *txQueue) put(b byte) {
	if q.err != nil || q.closing || q.abandon || len(q.buf) >= txHardLimit {
		q.dropped++
		return
	}
	q.buf = append(q.buf, b)
	q.blocked = len(q.buf) >= txSoftLimit
	q.wait.Broadcast()
}

// fail drops what is queued and lets the guest run on without its console.
func (q *txQueue) fail(err error, lost int) {
	if q.err == nil {
		q.err = err
	}
	q.dropped += uint64(lost) + uint64(len(q.buf))
	q.buf = nil
}

// transmit feeds the writer until Close.
func (u *UART) transmit() {
	u.mu.Lock()
	defer u.mu.Unlock()
	q := &u.tx
	defer func() {
		q.done = true
		q.wait.Broadcast()
	}()
	var chunk []byte
	for {
		for len(q.buf) == 0 && !q.closing && !q.abandon {
			q.wait.Wait()
		}
		if len(q.buf) == 0 || q.abandon {
			q.dropped += uint64(len(q.buf))
			q.buf = nil
			return
		}
		chunk, q.buf = q.buf, chunk[:0]
		u.unblock()
		q.busy = true
		u.mu.Unlock()
		n, err := u.out.Write(chunk)
		u.mu.Lock()
		q.busy = false
		if err == nil && n < len(chunk) {
			err = io.ErrShortWrite
		}
		if err != nil {
			q.fail(fmt.Errorf("serial: write of guest output: %w", err), len(chunk)-min(max(n, 0), len(chunk)))
			u.unblock()
		}
		q.wait.Broadcast()
	}
}

// unblock tells a waiting guest that it may send again.
func (u *UART) unblock() {
	if !u.tx.blocked {
		return
	}
	u.tx.blocked = false
	u.regs.threPending = true
	u.update()
}

// Flush waits until the writer has taken everything that the guest had sent before the call, or
// ctx ends. It returns the writer's error if that failed. A guest that goes on sending may prolong it: pause
// it first. Output is no part of State: flush before a snapshot, or the process that
// takes the snapshot still owes the output to its writer.
func (u *UART) Flush(ctx context.Context) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	q := &u.tx
	if !u.await(ctx, func() bool { return len(q.buf) == 0 && !q.busy }) {
		return fmt.Errorf("serial: flush of guest output, %d bytes and a write are left: %w", len(q.buf), context.Cause(ctx))
	}
	return q.err
}

// Err returns the first failure of the writer, or of the interrupt line, or nil. After the writer failed,
// output is dropped, and the guest runs on.
func (u *UART) Err() error {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.tx.err != nil {
		return u.tx.err
	}
	return u.fault
}

// Dropped returns how many bytes of output never reached the writer: because it failed, because the UART
// was closed, or because the guest sent 192 KiB after it was told to wait. A guest that heeds
// the transmitter-empty bit loses nothing to a slow writer.
func (u *UART) Dropped() uint64 {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.tx.dropped
}

// Close writes out what is queued, and ends the UART's goroutine and every Pump. When ctx ends first, the
// rest is dropped, a writer with a SetWriteDeadline method is interrupted (and its deadline
// stays in the past), and Close returns the cause. A writer that can't be interrupted keeps the
// goroutine until its Write returns; Close does not wait for it. Registers still answer after Close, output is
// dropped, and the interrupt line is left alone: a Pump whose Read could not be interrupted may still bring input, when
// what the line leads to has gone. Closing again waits again.
func (u *UART) Close(ctx context.Context) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	q := &u.tx
	q.closing = true
	q.wait.Broadcast()
	u.irq = nil
	u.end()
	ended := func() bool { return q.done }
	if u.await(ctx, ended) {
		return q.err
	}
	q.abandon = true
	q.wait.Broadcast()
	left := len(q.buf)
	if !q.busy || interruptWrite(u.out) {
		for !q.done {
			q.wait.Wait()
		}
	}
	return fmt.Errorf("serial: close with up to %d bytes of guest output unwritten: %w", left, context.Cause(ctx))
}

// interruptWrite makes a Write in progress return, if w can do that.
func interruptWrite(w io.Writer) bool {
	d, ok := w.(interface{ SetWriteDeadline(time.Time) error })
	return ok && d.SetWriteDeadline(time.Unix(1, 0)) == nil
}

// await waits for cond, with u.mu held, and reports whether it came true before ctx ended.
func (u *UART) await(ctx context.Context, cond func() bool) bool {
	stop := context.AfterFunc(ctx, func() {
		u.mu.Lock()
		defer u.mu.Unlock()
		u.tx.wait.Broadcast()
	})
	defer stop()
	for !cond() {
		if ctx.Err() != nil {
			return false
		}
		u.tx.wait.Wait()
	}
	return true
}
