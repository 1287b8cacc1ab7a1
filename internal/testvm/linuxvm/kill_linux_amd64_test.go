package linuxvm

import (
	"math/rand/v2"
	"testing"
	"time"

	"github.com/cryovisor/cryovisor/internal/testvm/kvmlab"
)

// TestLinuxKill kills the process with SIGKILL at random moments of a pause, and demands that the last completed pause
// can be resumed, every time.
func TestLinuxKill(t *testing.T) {
	Run(t, labConfig, func(t *testing.T, lab *Lab) {
		s := newSaga(t, lab, Options{Kernel: kvmlab.Cloud})
		s.start()
		s.until("up ")
		s.order("start")
		s.steps(2)
		s.pause()
		// The first pause of a guest stores much, those that follow little: this one is what the others are like.
		s.start()
		s.steps(1)
		begin := time.Now()
		s.pause()
		typical := time.Since(begin)
		kills := 50
		if testing.Short() {
			kills = 12
		}
		completed := 0
		for range kills {
			s.start()
			s.steps(1)
			if s.killPausing(time.Duration(rand.Float64() * 2 * float64(typical))) {
				completed++
			}
		}
		t.Logf("%d of %d pauses were complete when the process was killed", completed, kills)
		if completed == 0 || completed == kills {
			t.Errorf("%d of %d pauses were complete: the kills were not in the midst of them", completed, kills)
		}
		s.start()
		s.steps(1)
		s.finish()
	})
}

// killPausing kills the process some time after it was told to pause the guest, and says whether the pause was complete.
// If it was not, the guest goes back to its last one.
func (s *saga) killPausing(after time.Duration) bool {
	s.t.Helper()
	s.orderPause()
	<-time.After(after) // what is tested is that any moment will do
	if err := s.proc.cmd.Process.Kill(); err != nil {
		s.t.Fatal(err)
	}
	<-s.proc.gone
	r, err := s.report()
	_ = s.proc.end() // the kill
	s.proc = nil
	if err != nil || r.Paused == nil {
		s.rewind()
		return false
	}
	s.paused(r.Paused)
	return true
}
