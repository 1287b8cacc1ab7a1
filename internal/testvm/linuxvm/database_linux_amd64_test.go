package linuxvm

import (
	"fmt"
	"strings"
	"testing"

	"github.com/cryovisor/cryovisor/internal/testvm/kvmlab"
)

// TestLinuxDatabase has a guest work on SQLite databases while it is paused and resumed in new processes, again and again.
// Fresh guests then check what it has left on its disk, and what was on the disk in the midst of it.
func TestLinuxDatabase(t *testing.T) {
	RunWith(t, withE2fs(t, labConfig), []string{DatabaseProgram}, func(t *testing.T, lab *Lab) {
		opts := Options{Kernel: kvmlab.Cloud, Modules: deviceModules(kvmlab.Cloud)}
		s := newSaga(t, lab, opts)
		s.useDisk(128)
		s.useDatabase()
		s.names = []string{"db", "disk", "timer"} // what has nothing to do with the disk would take its time
		s.start()
		s.until("up ")
		s.order("start " + strings.Join(s.names, " "))
		cycles := rounds(10, 20)
		var crashed string // the disk as it was in the midst
		var told uint64    // steps that the guest had told of by then
		for cycle := range cycles {
			s.awaitLog("db")
			// Some lines, of any job, so that the moment is another in each cycle.
			for range cycle % 5 {
				s.next()
			}
			p := s.pause()
			t.Logf("cycle %d: froze %v, in all %v, %d pages, %d KiB stored", cycle, p.Freeze, p.Total, p.PagesStored, p.StoredBytes>>10)
			if cycle == cycles/2 {
				told, crashed = s.count("db"), s.pausedDisk()
			}
			s.job.Eager = cycle%7 == 6
			s.start()
		}
		s.steps(1)
		s.finish()
		steps, files := s.count("db"), s.diskFiles()
		left := s.leftDisk()
		if err := checkDisk(t, left); err != nil {
			t.Error(err)
		}
		if got, gotFiles := checkImage(t, lab, opts, left, "db-check"); got != steps || gotFiles != files {
			t.Errorf("the disk has %d steps and %d files, want %d and %d", got, gotFiles, steps, files)
		}
		// A crash may undo the last step of one database: SQLite does not sync the removal of its journal.
		if got, _ := checkImage(t, lab, opts, crashed, "db-check-crashed"); got+1 < told || got > steps {
			t.Errorf("the disk has %d steps, want from %d, one less than the guest had told of, to %d", got, told-1, steps)
		}
	})
}

// awaitLog waits for the next line of a log.
func (s *saga) awaitLog(name string) {
	s.t.Helper()
	for n := s.count(name); s.count(name) == n; {
		s.next()
	}
}

// diskFiles is how many files the disk job had when it ended.
func (s *saga) diskFiles() (n uint64) {
	s.t.Helper()
	const word = "files="
	line := s.console.Last("log disk ")
	_, text, _ := strings.Cut(line, word)
	if _, err := fmt.Sscanf(text, "%d", &n); err != nil {
		s.fatalf("the last line of the disk's log is %q", line)
	}
	return n
}

// checkImage boots a guest that checks a disk which another has left, by an order that says how, and returns what it
// finds.
func checkImage(t *testing.T, lab *Lab, opts Options, path, order string) (steps, files uint64) {
	t.Helper()
	s := newSaga(t, lab, opts)
	s.useImage(path)
	s.useDatabase()
	s.start()
	s.until("up ")
	lines := s.order(order)
	answer := lines[len(lines)-1]
	if _, err := fmt.Sscanf(answer, "done "+order+" steps=%d files=%d", &steps, &files); err != nil {
		s.fatalf("the guest says %q: %v", answer, err)
	}
	s.powerOff()
	if err := checkDisk(t, s.leftDisk()); err != nil {
		t.Error(err)
	}
	return steps, files
}
