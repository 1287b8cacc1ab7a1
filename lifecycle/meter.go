package lifecycle

import (
	"errors"
	"slices"
	"sync"
	"time"
)

// Metrics are counts since the Manager was opened, and what there is.
type Metrics struct {
	States      map[State]int
	Templates   int
	StoredBytes uint64 // by all snapshots, on disk
	Creates     Operation
	Pauses      Operation
	Resumes     Operation
	Kills       Operation
	Expired     uint64
	AutoPauses  uint64 // of Pauses
	TakenBack   uint64 // pauses that were given up because somebody connected; they count as failed
	Pool        PoolMetrics
}

// Operation counts what was done and how long it took.
type Operation struct {
	Count, Failed uint64
	Total         time.Duration // of those that did not fail
	Buckets       []uint64      // of those, by OperationBuckets; the last is of those that took longer
}

// OperationBuckets are upper bounds of times.
var OperationBuckets = []time.Duration{
	time.Millisecond, 2 * time.Millisecond, 5 * time.Millisecond, 10 * time.Millisecond, 20 * time.Millisecond, 50 * time.Millisecond,
	100 * time.Millisecond, 200 * time.Millisecond, 500 * time.Millisecond, time.Second, 2 * time.Second, 5 * time.Second, 10 * time.Second,
}

// Metrics returns them.
func (m *Manager) Metrics() Metrics {
	metrics := m.meter.read()
	metrics.StoredBytes = m.stored.total()
	metrics.Pool = m.shelf.stats()
	metrics.States = make(map[State]int)
	m.mu.Lock()
	defer m.mu.Unlock()
	metrics.Templates = len(m.templates)
	for _, e := range m.sandboxes.order {
		e.mu.Lock()
		metrics.States[e.state]++
		e.mu.Unlock()
	}
	return metrics
}

// meter counts. Its methods may be called from several goroutines.
type meter struct {
	mu sync.Mutex
	m  Metrics
}

func (m *meter) create(took time.Duration, err error) { m.count(&m.m.Creates, took, err) }
func (m *meter) resume(took time.Duration, err error) { m.count(&m.m.Resumes, took, err) }
func (m *meter) kill(took time.Duration, err error)   { m.count(&m.m.Kills, took, err) }

func (m *meter) pause(took time.Duration, reason Reason, err error) {
	m.count(&m.m.Pauses, took, err)
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case err == nil && (reason == ReasonTimeout || reason == ReasonIdle):
		m.m.AutoPauses++
	case errors.Is(err, ErrResumed):
		m.m.TakenBack++
	}
}

func (m *meter) expire() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.m.Expired++
}

func (m *meter) count(o *Operation, took time.Duration, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	o.Count++
	if err != nil {
		o.Failed++
		return
	}
	if o.Buckets == nil {
		o.Buckets = make([]uint64, len(OperationBuckets)+1)
	}
	o.Total += took
	i, _ := slices.BinarySearch(OperationBuckets, took)
	o.Buckets[i]++
}

func (m *meter) read() Metrics {
	m.mu.Lock()
	defer m.mu.Unlock()
	metrics := m.m
	for _, o := range []*Operation{&metrics.Creates, &metrics.Pauses, &metrics.Resumes, &metrics.Kills} {
		o.Buckets = slices.Clone(o.Buckets)
	}
	return metrics
}
