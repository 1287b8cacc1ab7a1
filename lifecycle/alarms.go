package lifecycle

import (
	"container/heap"
	"sync"
	"time"
)

// alarms calls a function for each sandbox when its time has come. Its methods may be called from several goroutines.
type alarms struct {
	clock Clock
	quit  chan struct{}
	wake  chan struct{} // of capacity 1: the first alarm has changed
	ended sync.WaitGroup

	mu    sync.Mutex
	queue alarmQueue
	of    map[*entry]*alarm
}

type alarm struct {
	at    time.Time
	entry *entry
	index int
}

func newAlarms(clock Clock) *alarms {
	return &alarms{clock: clock, quit: make(chan struct{}), wake: make(chan struct{}, 1), of: make(map[*entry]*alarm)}
}

// start begins to call fire, which must not wait.
func (a *alarms) start(fire func(*entry)) { a.ended.Go(func() { a.run(fire) }) }

// stop ends that, and waits until it has.
func (a *alarms) stop() {
	close(a.quit)
	a.ended.Wait()
}

// set sets the one alarm of an entry; zero: it has none.
func (a *alarms) set(e *entry, at time.Time) {
	a.mu.Lock()
	defer a.mu.Unlock()
	known := a.of[e]
	switch {
	case at.IsZero() && known == nil:
		return
	case at.IsZero():
		heap.Remove(&a.queue, known.index)
		delete(a.of, e)
	case known == nil:
		a.of[e] = &alarm{at: at, entry: e}
		heap.Push(&a.queue, a.of[e])
	default:
		known.at = at
		heap.Fix(&a.queue, known.index)
	}
	select {
	case a.wake <- struct{}{}:
	default:
	}
}

func (a *alarms) run(fire func(*entry)) {
	for {
		next := a.due(fire)
		var rings <-chan time.Time
		stop := func() {}
		if !next.IsZero() {
			rings, stop = a.clock.NewTimer(next)
		}
		select {
		case <-a.quit:
			stop()
			return
		case <-rings:
		case <-a.wake:
		}
		stop()
	}
}

// due fires what is due, and returns when the next is: zero if there is none.
func (a *alarms) due(fire func(*entry)) time.Time {
	a.mu.Lock()
	defer a.mu.Unlock()
	now := a.clock.Now()
	for len(a.queue) > 0 {
		first := a.queue[0]
		if first.at.After(now) {
			return first.at
		}
		heap.Pop(&a.queue)
		delete(a.of, first.entry)
		fire(first.entry)
	}
	return time.Time{}
}

// alarmQueue is a heap: the first alarm is the next.
type alarmQueue []*alarm

func (q alarmQueue) Len() int           { return len(q) }
func (q alarmQueue) Less(i, j int) bool { return q[i].at.Before(q[j].at) }
func (q alarmQueue) Swap(i, j int) {
	q[i], q[j] = q[j], q[i]
	q[i].index, q[j].index = i, j
}

// Push implements heap.Interface.
func (q *alarmQueue) Push(x any) {
	a := x.(*alarm)
	a.index = len(*q)
	*q = append(*q, a)
}

// Pop implements heap.Interface.
func (q *alarmQueue) Pop() any {
	last := len(*q) - 1
	a := (*q)[last]
	(*q)[last] = nil
	*q = (*q)[:last]
	return a
}
