package linuxvm

import (
	"testing"

	"github.com/cryovisor/cryovisor/internal/testvm/kvmlab"
)

// TestLinuxCheckpoint makes checkpoints of a guest in the midst of its work, kills its process, and goes on from the last of
// them, in which nothing that was written afterwards may show; and prepares a pause now and then.
func TestLinuxCheckpoint(t *testing.T) {
	Run(t, withE2fs(t, labConfig), func(t *testing.T, lab *Lab) {
		s := newSaga(t, lab, Options{Kernel: kvmlab.Cloud, Modules: deviceModules(kvmlab.Cloud)})
		s.useDisk(64)
		s.start()
		s.until("up ")
		s.order("start")
		for cycle := range rounds(4, 20) {
			s.steps(1)
			if cycle%3 == 2 {
				p := s.pauseBy(pauseOrder{Prepare: true, HoldAt: -1})
				t.Logf("cycle %d: a prepared pause: %d KiB before, %d KiB after, froze %v, in all %v",
					cycle, p.PreparedBytes>>10, (p.CandidateBytes+p.DiskBytes)>>10, p.Freeze, p.Total)
				s.start()
				continue
			}
			for range 1 + cycle%2 {
				p := s.checkpoint()
				t.Logf("cycle %d: a checkpoint: %d KiB looked at, froze %v, in all %v",
					cycle, (p.CandidateBytes+p.DiskBytes)>>10, p.Freeze, p.Total)
				s.steps(1)
			}
			s.kill()
			s.rewind()
			s.tidy()
			s.start()
		}
		s.steps(1)
		s.finish()
		if err := checkDisk(t, s.leftDisk()); err != nil {
			t.Error(err)
		}
	})
}
