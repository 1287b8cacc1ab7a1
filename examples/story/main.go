// Story is the life of sandboxes as a platform that embeds Cryovisor sees it: start, pause, find the paused ones, connect by id, auto-pause, kill, and
// what happens to one that nobody comes back to for 30 days.
//
//	go run ./examples/story
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"sync"
	"time"

	"github.com/cryovisor/cryovisor/internal/testvm"
	"github.com/cryovisor/cryovisor/lifecycle"
	"github.com/cryovisor/cryovisor/vmm"
)

func main() {
	dir, err := os.MkdirTemp("", "cryovisor-story-")
	if err != nil {
		log.Fatal(err)
	}
	err = story(context.Background(), dir, os.Stdout)
	if err = errors.Join(err, os.RemoveAll(dir)); err != nil {
		log.Fatal(err)
	}
}

func story(ctx context.Context, dir string, out io.Writer) (err error) {
	clock := &hourglass{now: time.Date(2026, 1, 1, 12, 0, 0, 0, time.UTC), turned: make(chan struct{})}
	m, err := lifecycle.OpenManager(ctx, dir, lifecycle.ManagerOptions{Clock: clock}) // leave the clock out for the system's
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, m.Close(ctx)) }() // pauses what runs

	// A template is booted once. This guest counts the ticks of its timer, and needs no operating system; yours is a vmm.Linux with disks, and Ready waits
	// until it says that it is up.
	guest, err := testvm.Timer(testvm.TimerConfig{Memory: 4 << 20, Every: 1 << 40})
	if err != nil {
		return err
	}
	_, err = m.CreateTemplate(ctx, lifecycle.TemplateConfig{Name: "base", VM: vmm.Config{MemoryBytes: 4 << 20, Boot: guest.Program()}})
	if err != nil {
		return err
	}

	// Start one, and pause it.
	s, err := m.Create(ctx, lifecycle.CreateOptions{
		Template: "base", Timeout: 10 * time.Minute, OnTimeout: lifecycle.ActionPause, Metadata: map[string]string{"user": "ada"},
	})
	if err != nil {
		return err
	}
	if _, err := s.Pause(ctx); err != nil {
		return err
	}

	// Find it among the paused ones, and connect to it by its id: here, or after a restart in another process.
	paused, err := m.List(lifecycle.ListOptions{States: []lifecycle.State{lifecycle.StatePaused}, Metadata: map[string]string{"user": "ada"}})
	if err != nil {
		return err
	}
	info, resumed, err := m.Connect(ctx, paused.Sandboxes[0].ID, lifecycle.ConnectOptions{})
	if err != nil {
		return err
	}
	fmt.Fprintf(out, "%d was paused; it is %s again: %v\n", len(paused.Sandboxes), info.State, resumed)

	// Nobody cares for it: ten minutes later it pauses by itself, and 30 days after that it is gone.
	events, cancel := m.Subscribe()
	defer cancel()
	clock.turn(10 * time.Minute)
	e := <-events
	fmt.Fprintf(out, "it is %s, because of its %s\n", e.Sandbox.State, e.Reason)
	clock.turn(lifecycle.DefaultRetention)
	_, _, err = s.Connect(ctx, lifecycle.ConnectOptions{})
	fmt.Fprintf(out, "30 days later it is not found: %v\n", errors.Is(err, lifecycle.ErrNotFound))

	// What is no longer wanted is killed, by its handle or by its id.
	if s, err = m.Create(ctx, lifecycle.CreateOptions{Template: "base"}); err != nil {
		return err
	}
	if err := m.Kill(ctx, s.ID()); err != nil {
		return err
	}
	_, err = s.Info()
	fmt.Fprintf(out, "a killed one is not found: %v\n", errors.Is(err, lifecycle.ErrNotFound))
	return nil
}

// hourglass is a clock that is turned by hand.
type hourglass struct {
	mu     sync.Mutex
	now    time.Time
	turned chan struct{} // closed and renewed by turn
}

func (h *hourglass) Now() time.Time {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.now
}

func (h *hourglass) turn(d time.Duration) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.now = h.now.Add(d)
	close(h.turned)
	h.turned = make(chan struct{})
}

// NewTimer implements lifecycle.Clock.
func (h *hourglass) NewTimer(t time.Time) (<-chan time.Time, func()) {
	rings, stop := make(chan time.Time, 1), make(chan struct{})
	go func() {
		for {
			h.mu.Lock()
			now, turned := h.now, h.turned
			h.mu.Unlock()
			if !now.Before(t) {
				rings <- now
				return
			}
			select {
			case <-turned:
			case <-stop:
				return
			}
		}
	}()
	return rings, sync.OnceFunc(func() { close(stop) })
}
