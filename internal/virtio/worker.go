package virtio

import (
	"context"
	"sync"
)

// worker is the goroutine that serves a device, from work to end.
type worker struct {
	done chan struct{} // closed when it has ended

	mu    sync.Mutex
	stop  bool // it is to end
	ended bool // it will not call Serve again
}

// work makes sure that a worker runs and looks at every queue. t.mu is held.
func (t *Transport) work() {
	if t.worker == nil || !t.worker.keep() {
		t.worker = &worker{done: make(chan struct{})}
		go t.serve(t.worker)
	}
	t.ring()
}

func (t *Transport) serve(w *worker) {
	defer close(w.done)
	for {
		err := t.bell.Wait()
		if w.leave(err != nil) {
			if err != nil {
				t.line.fail(err)
			}
			return
		}
		if t.line.failed() {
			continue
		}
		if err := t.dev.Serve(); err != nil {
			t.line.fail(err)
		}
	}
}

// leave reports whether the worker is to end, or must.
func (w *worker) leave(must bool) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.ended = w.stop || must
	return w.ended
}

// keep takes back the wish that the worker end, and reports whether that came in time.
func (w *worker) keep() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.stop = false
	return !w.ended
}

// end ends the worker and waits for it. If ctx ends first the worker may or may not end: see keep.
func (w *worker) end(ctx context.Context, bell Doorbell) error {
	w.mu.Lock()
	w.stop = true
	w.mu.Unlock()
	if err := bell.Ring(); err != nil {
		return err
	}
	select {
	case <-w.done:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
