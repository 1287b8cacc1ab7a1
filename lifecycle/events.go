package lifecycle

import (
	"sync"
	"time"
)

// Event is a change of a sandbox's state, or that one has failed.
type Event struct {
	Time    time.Time   `json:"time"`
	Sandbox SandboxInfo `json:"sandbox"` // after it
	From    State       `json:"from"`    // empty: it was created
	Reason  Reason      `json:"reason"`
	// Disconnected says that connections to the guest were cut, as a pause, and what ends a machine, does.
	Disconnected bool          `json:"disconnected,omitempty"`
	Took         time.Duration `json:"took,omitempty"` // a create's, a pause's or a resume's
	// Error says why a pause or resume has failed, if Sandbox.State is From; otherwise, what could not be cleared away, and will be when the
	// directory is opened again.
	Error string `json:"error,omitempty"`
	Lost  uint64 `json:"lost,omitempty"` // events before this one that the subscriber did not read in time
}

// Reason is why a state has changed.
type Reason string

// The reasons.
const (
	ReasonRequest Reason = "request" // somebody called
	ReasonTimeout Reason = "timeout"
	ReasonIdle    Reason = "idle"
	ReasonExpired Reason = "expired" // its retention has ended
	ReasonEnded   Reason = "ended"   // its guest has, by itself
	ReasonClose   Reason = "close"   // the Manager is closed
)

// eventBuffer is how many events wait for a subscriber.
const eventBuffer = 1024

// broker hands events to subscribers.
type broker struct {
	mu     sync.Mutex
	subs   map[*subscription]struct{}
	closed bool
}

type subscription struct {
	events chan Event
	lost   uint64
}

// Subscribe returns a channel of events from now on, in the order in which they happened for each sandbox. Who does not read it in time loses
// events; Event.Lost counts them. cancel ends it, as Close does; then the channel is closed.
func (m *Manager) Subscribe() (events <-chan Event, cancel func()) {
	b := &m.events
	s := &subscription{events: make(chan Event, eventBuffer)}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		close(s.events)
		return s.events, func() {}
	}
	if b.subs == nil {
		b.subs = make(map[*subscription]struct{})
	}
	b.subs[s] = struct{}{}
	return s.events, func() { b.end(s) }
}

func (b *broker) end(s *subscription) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if _, ok := b.subs[s]; ok {
		delete(b.subs, s)
		close(s.events)
	}
}

func (b *broker) close() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.closed = true
	for s := range b.subs {
		delete(b.subs, s)
		close(s.events)
	}
}

func (b *broker) send(event Event) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for s := range b.subs {
		event.Lost = s.lost
		select {
		case s.events <- event:
			s.lost = 0
		default:
			s.lost++
		}
	}
}

// tell tells subscribers what has happened to a sandbox whose turn the caller has.
func (m *Manager) tell(e *entry, from State, reason Reason, took time.Duration, err error) {
	event := Event{Time: m.clock.Now(), Sandbox: e.info(), From: from, Reason: reason, Took: took}
	event.Disconnected = from == StateRunning && event.Sandbox.State != StateRunning
	if err != nil {
		event.Error = err.Error()
	}
	m.events.send(event)
}
