package server

import (
	"net/http"
	"sync"
	"time"

	"github.com/cryovisor/cryovisor/lifecycle"
)

// What the page shows of the past.
const (
	recentFor = time.Hour
	maxRecent = 10_000 // of all owners
)

// activity remembers what happened in the last hour.
type activity struct {
	cancel func()
	ended  sync.WaitGroup

	mu     sync.Mutex
	recent []activityBody
}

type activityBody struct {
	Time        time.Time `json:"time"`
	SandboxID   string    `json:"sandboxID"`
	From        string    `json:"from"`
	State       string    `json:"state"`
	Reason      string    `json:"reason"`
	TookMS      float64   `json:"tookMS"`
	StoredBytes uint64    `json:"storedBytes"`
	Failed      bool      `json:"failed"`
	owner       string
}

func newActivity(m *lifecycle.Manager) *activity {
	events, cancel := m.Subscribe()
	a := &activity{cancel: cancel}
	a.ended.Go(func() {
		for e := range events {
			a.note(e)
		}
	})
	return a
}

func (a *activity) close() {
	a.cancel()
	a.ended.Wait()
}

func (a *activity) note(e lifecycle.Event) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.recent) == maxRecent {
		a.recent = a.recent[1:]
	}
	a.recent = append(a.recent, activityBody{
		Time: e.Time.UTC(), SandboxID: e.Sandbox.ID, From: string(e.From), State: string(e.Sandbox.State), Reason: string(e.Reason),
		TookMS: float64(e.Took.Microseconds()) / 1000, StoredBytes: e.Sandbox.StoredBytes, Failed: e.Error != "" && e.From == e.Sandbox.State,
		owner: e.Sandbox.Owner,
	})
}

// recent answers with what happened to the caller's sandboxes in the last hour, the oldest first.
func (s *Server) recent(w http.ResponseWriter, r *request) error {
	since := time.Now().Add(-recentFor)
	bodies := []activityBody{}
	s.activity.mu.Lock()
	for _, b := range s.activity.recent {
		if b.owner == r.owner && b.Time.After(since) {
			bodies = append(bodies, b)
		}
	}
	s.activity.mu.Unlock()
	writeJSON(w, http.StatusOK, bodies)
	return nil
}
