package linuxvm

import (
	"math/rand/v2"
	"os"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cryovisor/cryovisor/internal/testvm/kvmlab"
	"github.com/cryovisor/cryovisor/snapshot"
)

// Moments at which a process is killed. What was done by then is told by the process, so that the test is the same on
// machines of any speed.
const (
	killSoon      = iota // some time after the order, whatever has been done by then
	killRunning          // when a part of the memory is written, while the pause goes on
	killHeld             // when a part of the memory is written, and the pause is held there
	killCommitted        // when the snapshot is durable, while the process closes the machine
	killMoments
)

// TestLinuxKill kills the process with SIGKILL at random moments of a pause, and demands that the last completed pause
// can be resumed, every time.
func TestLinuxKill(t *testing.T) {
	cfg := labConfig
	cfg.TimeLimit = 20 * time.Minute
	Run(t, withE2fs(t, cfg), func(t *testing.T, lab *Lab) {
		s := newSaga(t, lab, Options{Kernel: kvmlab.Cloud, Modules: deviceModules(kvmlab.Cloud)})
		s.useDisk(64)
		s.start()
		s.until("up ")
		s.order("start")
		s.steps(2)
		s.pause()
		for i := range rounds(4*killMoments, 50) {
			s.start()
			// The guest runs: some lines of some logs. None is missing or there twice, or they would not fit.
			for range 3 {
				s.next()
			}
			moment := i % killMoments
			completed := s.killPausing(moment)
			t.Logf("kill %d at moment %d: completed %t, %d KiB in the store", i, moment, completed, s.storeKiB())
			if moment == killHeld && completed || moment == killCommitted && !completed {
				s.errorf("kill %d at moment %d: completed %t", i, moment, completed)
			}
		}
		s.start()
		s.steps(1)
		s.finish()
		if err := checkDisk(t, s.leftDisk()); err != nil {
			t.Error(err)
		}
	})
}

// killPausing kills the process in the midst of a pause, and says whether the store has its snapshot. If it has not, the
// guest goes back to its last one.
func (s *saga) killPausing(moment int) bool {
	s.t.Helper()
	order := pauseOrder{Watch: true, HoldAt: -1}
	at := rand.Float64()
	if moment == killHeld {
		order.HoldAt = at
	}
	s.orderPause(order)
	if moment == killSoon {
		<-time.After(time.Duration(at * float64(200*time.Millisecond))) // what is tested is that any moment will do
	} else {
		s.awaitPause(moment, at)
	}
	if err := s.proc.cmd.Process.Kill(); err != nil {
		s.fatalf("%v", err)
	}
	_ = s.proc.end() // the kill
	s.proc = nil
	id, completed := s.lastSnapshot()
	if completed {
		s.paused(id)
	} else {
		s.rewind()
	}
	s.tidy()
	return completed
}

// awaitPause reads what the process says of its pause until the moment has come.
func (s *saga) awaitPause(moment int, at float64) {
	s.t.Helper()
	for {
		r, err := s.report()
		switch {
		case err != nil || r.Ended != "":
			s.fatalf("in a pause: %+v, %v", r, err)
		case r.Paused != nil, moment == killRunning && r.Done >= at, r.Held:
			return
		}
	}
}

// lastSnapshot is the snapshot that a pause has completed since the last one that the saga knows of, if there is one.
func (s *saga) lastSnapshot() (snapshot.ID, bool) {
	s.t.Helper()
	entries, err := s.store().List()
	if err != nil {
		s.fatalf("%v", err)
	}
	for _, e := range entries {
		if e.Parent == s.job.ID {
			return e.ID, true
		}
	}
	return snapshot.ID{}, false
}

// tidy deletes all snapshots but the last, and what killed processes have left.
func (s *saga) tidy() {
	s.t.Helper()
	store := s.store()
	entries, err := store.List()
	if err != nil {
		s.fatalf("%v", err)
	}
	if !slices.ContainsFunc(entries, func(e snapshot.Entry) bool { return e.ID == s.job.ID }) {
		s.fatalf("snapshot %v is not in the store", s.job.ID)
	}
	for _, e := range entries {
		if e.ID == s.job.ID {
			continue
		}
		if err := store.Delete(s.t.Context(), e.ID); err != nil {
			s.fatalf("%v", err)
		}
	}
	if _, err := store.Collect(s.t.Context()); err != nil {
		s.fatalf("%v", err)
	}
	for _, file := range s.overlays() {
		if err := os.Remove(file); err != nil {
			s.fatalf("%v", err)
		}
	}
}

func (s *saga) store() *snapshot.Store {
	s.t.Helper()
	store, err := snapshot.OpenStore(s.job.Store)
	if err != nil {
		s.fatalf("%v", err)
	}
	return store
}

// storeKiB is how much of the file system that the store is on is in use.
func (s *saga) storeKiB() uint64 {
	s.t.Helper()
	var fs unix.Statfs_t
	if err := unix.Statfs(s.job.Store, &fs); err != nil {
		s.fatalf("%v", err)
	}
	return (fs.Blocks - fs.Bfree) * uint64(fs.Bsize) >> 10
}
