package linuxvm

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/cryovisor/cryovisor/internal/testvm/kvmlab"
)

// TestLinuxIntegrity pauses a guest in the midst of its work and resumes it in a new process, again and again, and
// demands that nothing in it shows.
func TestLinuxIntegrity(t *testing.T) {
	Run(t, withE2fs(t, labConfig), func(t *testing.T, lab *Lab) { testIntegrity(t, lab, Options{Kernel: kvmlab.Cloud}, rounds(10, 20)) })
}

func TestLinuxIntegrityGeneric(t *testing.T) {
	cfg := labConfig
	cfg.Kernels = []string{kvmlab.Generic}
	Run(t, withE2fs(t, cfg), func(t *testing.T, lab *Lab) { testIntegrity(t, lab, Options{Kernel: kvmlab.Generic}, rounds(3, 8)) })
}

func TestLinuxIntegrityTwoVCPUs(t *testing.T) {
	Run(t, withE2fs(t, labConfig), func(t *testing.T, lab *Lab) {
		testIntegrity(t, lab, Options{Kernel: kvmlab.Cloud, VCPUs: 2}, rounds(7, 20))
	})
}

var labConfig = kvmlab.Config{Kernels: []string{kvmlab.Cloud}, MemoryMiB: 2048, TimeLimit: 10 * time.Minute}

func testIntegrity(t *testing.T, lab *Lab, opts Options, cycles int) {
	opts.Modules = deviceModules(opts.Kernel)
	s := newSaga(t, lab, opts)
	s.useDisk(64)
	s.useVsock(3)
	s.start()
	s.until("up ")
	s.order("start")
	var asked []string
	for cycle := range cycles {
		if cycle%5 != 4 { // else: paused as soon as it runs
			s.steps(1 + uint64(cycle%3))
		}
		// Input that is on its way when the guest is paused.
		s.tell(fmt.Sprintf("echo %d", cycle))
		asked = append(asked, fmt.Sprintf("done echo %d", cycle))
		p := s.pause()
		t.Logf("cycle %d: froze %v, in all %v, %d pages, %d KiB stored", cycle, p.Freeze, p.Total, p.PagesStored, p.StoredBytes>>10)
		s.job.Eager = cycle%7 == 6
		s.start()
	}
	s.steps(2)
	s.finish()
	if !slices.Equal(s.echoes, asked) {
		t.Errorf("the guest answers %q, want %q", s.echoes, asked)
	}
	if err := checkDisk(t, s.leftDisk()); err != nil {
		t.Error(err)
	}
}

// pausedFor is long against what a machine runs between a pause and the next line of its logs.
const pausedFor = 10 * time.Second

// TestLinuxClock demands that the time in which a guest is paused does not pass for it, unless it is wished: then its
// wall clock is right, and timers that were due have fired.
func TestLinuxClock(t *testing.T) {
	Run(t, labConfig, func(t *testing.T, lab *Lab) {
		s := newSaga(t, lab, Options{Kernel: kvmlab.Cloud})
		s.start()
		s.until("up ")
		s.order("start")
		s.steps(2)
		s.pause()
		before := s.mono
		<-time.After(pausedFor)
		begin := time.Now()
		s.start()
		s.steps(1)
		ran := time.Since(begin) + time.Second // before the pause, the guest ran on after its last line
		if passed := time.Duration(s.mono - before); passed <= 0 || passed > ran {
			t.Errorf("%v have passed for a guest that ran for %v and was paused for %v", passed, ran, pausedFor)
		}

		guest, host := s.clock(), time.Now()
		s.pause()
		<-time.After(pausedFor)
		s.job.AdvanceClock = true
		s.start()
		s.steps(1)
		passed, passedHere := s.clock().Sub(guest), time.Since(host)
		// An emulated machine's clock is not exact; the time of the pause is long against that.
		if diff := passed - passedHere; diff.Abs() > pausedFor/2 {
			t.Errorf("the guest's wall clock went on by %v in %v, of which it was paused for %v", passed, passedHere, pausedFor)
		}
		s.finish()
	})
}

// clock asks the guest for its wall clock.
func (s *saga) clock() time.Time {
	s.t.Helper()
	lines := s.order("clock")
	answer := lines[len(lines)-1]
	var mono, wall int64
	if _, err := fmt.Sscanf(answer, "done clock mono=%d wall=%d", &mono, &wall); err != nil {
		s.fatalf("the guest says %q: %v", answer, err)
	}
	return time.Unix(0, wall)
}
