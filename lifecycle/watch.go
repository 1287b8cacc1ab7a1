package lifecycle

import (
	"time"

	"github.com/cryovisor/cryovisor/vmm"
)

// A guest is active, in the time between two looks, if its vCPUs were busy for more than one part in busyPart of it, or if it exchanged
// anything with its network or vsock. An idle Linux with its timer ticks stays below.
const busyPart = 100

// watched is what a look at a guest has found.
type watched struct {
	at       time.Time
	activity vmm.Activity
}

// watchEvery is the time between two looks.
func watchEvery(idle time.Duration) time.Duration { return max(idle/10, 100*time.Millisecond) }

// watches says whether what the guest does counts. The caller has the turn, or holds e.mu.
func (m *Manager) watches(e *entry) bool {
	return m.opts.WatchGuest && e.row.IdleTimeout > 0 && e.live != nil
}

// look notes whether the guest has been active since the last look.
func (m *Manager) look(e *entry, now time.Time) {
	activity := e.live.machine.VM.Activity()
	e.mu.Lock()
	defer e.mu.Unlock()
	last := e.live.watched
	if now.Before(last.at.Add(watchEvery(e.row.IdleTimeout))) {
		return
	}
	e.live.watched = watched{at: now, activity: activity}
	if activity.Frames != last.activity.Frames || activity.VCPU-last.activity.VCPU > now.Sub(last.at)/busyPart {
		e.active = now
		e.stopPreparing(now, m.ahead(e.row.MemoryBytes))
	}
}
