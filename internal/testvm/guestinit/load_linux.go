package main

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cryovisor/cryovisor/internal/testvm/guestinit/wire"
)

// pace is the time between two steps of a job, so that a slow console keeps up with the log. Every job waits for it with
// a timer of its own, so that timers are due whenever the machine is paused.
const pace = 200 * time.Millisecond

// job is one kind of load. Its step does some work, checks that all that it holds is as it left it, and says what it
// did in one line. Its finish checks everything once more and lets go.
type job interface {
	step(n uint64) (string, error)
	finish() error
}

// load is the running jobs.
type load struct {
	stop   chan struct{}
	done   sync.WaitGroup
	mu     sync.Mutex
	steps  []string // how many each job took, when it ended
	failed []error
}

// kind is a kind of job; begin makes one ready.
type kind struct {
	name  string
	begin func() (job, error)
}

// jobs are what the load consists of; a machine with a disk has that of the disk besides, and of a database if the
// program for it is there.
var jobs = []kind{
	{"files", newFiles},
	{"unlinked", newUnlinked},
	{"mapped", newMapped},
	{"heap", newHeap},
	{"pipe", newPipe},
	{"tcp", newTCP},
	{"timer", newTimer},
}

// kinds are the jobs for this machine.
func kinds() []kind {
	if !hasDisk() {
		return jobs
	}
	v := &volume{}
	all := append(slices.Clone(jobs), kind{"disk", v.newDisk})
	if hasDatabase() {
		all = append(all, kind{"db", v.newDatabase})
	}
	return all
}

// start sets the named jobs going, or all if none is named.
func (g *guest) start(names string) (string, error) {
	if g.load != nil {
		return "", errors.New("the load runs already")
	}
	l := &load{stop: make(chan struct{})}
	all := kinds()
	chosen := strings.Fields(names)
	for _, name := range chosen {
		if !slices.ContainsFunc(all, func(k kind) bool { return k.name == name }) {
			return "", fmt.Errorf("%s: no such job", name)
		}
	}
	for _, j := range all {
		if len(chosen) > 0 && !slices.Contains(chosen, j.name) {
			continue
		}
		job, err := j.begin()
		if err != nil {
			return "", fmt.Errorf("%s: %w", j.name, err)
		}
		l.done.Go(func() { l.run(g.con, j.name, job) })
	}
	g.load = l
	return names, nil
}

// stop ends all jobs and says how many steps each has taken.
func (g *guest) stop() (string, error) {
	if g.load == nil {
		return "", errors.New("no load runs")
	}
	l := g.load
	g.load = nil
	close(l.stop)
	l.done.Wait()
	return strings.Join(l.steps, " "), errors.Join(l.failed...)
}

// run takes steps and logs them until it is told to stop.
func (l *load) run(con *console, name string, j job) {
	var n uint64
	var err error
	log := wire.Log{Name: name}
	timer := time.NewTicker(pace)
	defer timer.Stop()
	for err == nil && !l.stopped(timer.C) {
		var detail string
		if detail, err = j.step(n); err == nil {
			con.say("%s", log.Next(monotonic(), detail))
			n++
		}
	}
	if err = errors.Join(err, j.finish()); err != nil {
		con.say("error %s, step %d: %v", name, n, err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.steps = append(l.steps, fmt.Sprintf("%s=%d", name, n))
	if err != nil {
		l.failed = append(l.failed, fmt.Errorf("%s: %w", name, err))
	}
}

// stopped waits for the time of the next step, or to be told to stop.
func (l *load) stopped(due <-chan time.Time) bool {
	select {
	case <-l.stop:
		return true
	case <-due:
		return false
	}
}

// monotonic is CLOCK_MONOTONIC in nanoseconds. It can't fail.
func monotonic() int64 {
	var ts unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts)
	return ts.Nano()
}
