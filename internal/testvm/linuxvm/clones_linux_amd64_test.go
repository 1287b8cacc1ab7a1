package linuxvm

import (
	"fmt"
	"os"
	"regexp"
	"testing"
	"time"

	"github.com/cryovisor/cryovisor/internal/testvm/kvmlab"
)

// TestLinuxClones resumes one snapshot in two processes at once, with one image under their disks, and lets both live on
// through pauses of their own. The kernel is one that knows generation IDs.
func TestLinuxClones(t *testing.T) {
	cfg := labConfig
	cfg.Kernels = []string{kvmlab.Generic}
	Run(t, withE2fs(t, cfg), func(t *testing.T, lab *Lab) {
		opts := Options{Kernel: kvmlab.Generic, MemoryMiB: 320, Modules: deviceModules(kvmlab.Generic)}
		origin := newSaga(t, lab, opts)
		origin.useDisk(64)
		origin.useVsock(3)
		origin.start()
		origin.until("up ")
		origin.order("start")
		origin.steps(1)
		origin.order("note origin")
		before := origin.identity()
		origin.pause()

		clones := []*saga{origin.clone("first", 4), origin.clone("second", 5)}
		for _, c := range clones {
			c.start()
		}
		// Asked before anything else has given the guests a reason to differ.
		ids := []identity{before}
		for _, c := range clones {
			ids = append(ids, c.identity())
		}
		checkIdentities(t, ids)
		for _, c := range clones {
			c.wantLast("noted", "done noted origin") // also after the other has written
			c.order("note " + c.job.Vsock)
		}
		for cycle := range rounds(1, 3) {
			for _, c := range clones {
				c.steps(1 + uint64(cycle))
			}
			for _, c := range clones {
				c.pause()
				c.start()
				c.wantLast("noted", "done noted "+c.job.Vsock)
			}
		}
		for _, c := range clones {
			c.finish()
			if err := checkDisk(t, c.leftDisk()); err != nil {
				t.Error(err)
			}
		}
	})
}

// clone makes a saga that goes on from the last pause of s by itself, with another CID.
func (s *saga) clone(name string, cid uint32) *saga {
	s.t.Helper()
	c := &saga{t: s.t, names: s.names, job: s.job, logs: cloneLogs(s.saved.logs), echoes: nil}
	begin := time.Now()
	c.console = NewConsole(func(line string) { s.t.Logf("%6.2fs %s: %s", time.Since(begin).Seconds(), name, line) })
	c.console.Rewind(s.saved.partial)
	var err error
	if c.input.r, c.input.w, err = os.Pipe(); err != nil {
		s.fatalf("%v", err)
	}
	s.t.Cleanup(func() {
		c.kill()
		c.input.r.Close()
		c.input.w.Close()
	})
	c.job.DiskDir = s.t.TempDir()
	c.useVsock(cid)
	return c
}

// identity is what a guest says when it is asked for entropy.
type identity struct{ random, hwrng, boot, cid string }

var identityAnswer = regexp.MustCompile(`random=([0-9a-f]{64}) hwrng=([0-9a-f]{64}) boot=(\S{36}) cid=(\d+)$`)

func (s *saga) identity() identity {
	s.t.Helper()
	lines := s.order("entropy")
	m := identityAnswer.FindStringSubmatch(lines[len(lines)-1])
	if m == nil {
		s.fatalf("the guest says %q", lines)
	}
	if want := fmt.Sprint(s.job.CID); m[4] != want {
		s.errorf("the guest has CID %s, want %s", m[4], want)
	}
	return identity{m[1], m[2], m[3], m[4]}
}

// checkIdentities: what is random differs, and the CID; the boot id shows that these are guests of one boot.
func checkIdentities(t *testing.T, ids []identity) {
	t.Helper()
	seen := map[string]string{}
	for i, id := range ids {
		for what, value := range map[string]string{"getrandom": id.random, "hwrng": id.hwrng, "CID": id.cid} {
			if who, dup := seen[value]; dup {
				t.Errorf("%s of guest %d is that of %s: %s", what, i, who, value)
			}
			seen[value] = fmt.Sprintf("%s of guest %d", what, i)
		}
		if id.boot != ids[0].boot {
			t.Errorf("guest %d has boot id %s, the one that it is a clone of %s", i, id.boot, ids[0].boot)
		}
	}
}
