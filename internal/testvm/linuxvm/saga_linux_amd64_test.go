package linuxvm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"filippo.io/age"

	"github.com/cryovisor/cryovisor/internal/testvm/guestinit/wire"
	"github.com/cryovisor/cryovisor/internal/testvm/kvmlab"
	"github.com/cryovisor/cryovisor/lifecycle"
	"github.com/cryovisor/cryovisor/snapshot"
)

// saga is a guest that lives in one process after another, with one console and one set of logs through all of them.
type saga struct {
	t       testing.TB
	console *Console
	input   pipe // to the guest's console
	job     job
	proc    *process // nil while the guest is paused
	names   []string // of the logs
	logs    wire.Logs
	mono    int64    // the guest's monotonic clock in its last log line, in ns
	echoes  []string // answers to orders "echo"
	saved   savedSaga
}

type pipe struct{ r, w *os.File }

// savedSaga is what the host knew of the guest at its last pause.
type savedSaga struct {
	logs    wire.Logs
	partial []byte
}

// logNames are the logs of the guest program's load.
var logNames = []string{"files", "heap", "mapped", "pipe", "tcp", "timer", "unlinked"}

func newSaga(t testing.TB, lab *Lab, opts Options) *saga {
	t.Helper()
	identity, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	dir, err := filepath.Abs(lab.dir)
	if err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	s := &saga{
		t: t, names: logNames, logs: wire.Logs{},
		console: NewConsole(func(line string) { t.Logf("%6.2fs %s", time.Since(begin).Seconds(), line) }),
		job:     job{Dir: dir, Store: t.TempDir(), DiskDir: t.TempDir(), Identity: identity.String(), Options: opts},
	}
	if s.input.r, s.input.w, err = os.Pipe(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		s.kill()
		s.input.r.Close()
		s.input.w.Close()
	})
	return s
}

// useDisk gives the machine, which has not been booted, a disk with an empty file system, and the load a log of it.
func (s *saga) useDisk(mib int64) {
	s.t.Helper()
	s.job.Disk = newDisk(s.t, mib)
	s.addLog("disk")
}

// useImage gives the machine, which has not been booted, a disk that another machine has left.
func (s *saga) useImage(path string) { s.job.Disk = path }

// useDatabase has the load use databases on the disk, with a log of it.
func (s *saga) useDatabase() {
	s.job.Options.Programs = append(s.job.Options.Programs, DatabaseProgram)
	s.addLog("db")
}

func (s *saga) addLog(name string) {
	s.names = slices.Sorted(slices.Values(append(slices.Clone(s.names), name)))
}

// useVsock gives the machine, which has not been booted, a socket device.
func (s *saga) useVsock(cid uint32) {
	s.t.Helper()
	s.job.Vsock, s.job.CID = filepath.Join(s.t.TempDir(), "vsock"), cid
}

// start starts a process for the guest, which boots it or goes on from its last pause, and waits until it runs.
func (s *saga) start() {
	s.t.Helper()
	p, err := startProcess(s.t.Context(), s.job, s.input.r, s.console)
	if err != nil {
		s.fatalf("%v", err)
	}
	s.proc = p
	if r, err := s.report(); err != nil || !r.Running {
		s.fatalf("the machine did not start: %+v, %v", r, err)
	}
}

// report waits for the next report of the process.
func (s *saga) report() (r report, err error) {
	return r, s.proc.reports.Decode(&r)
}

// kill kills the process if there is one.
func (s *saga) kill() {
	if s.proc == nil {
		return
	}
	_ = s.proc.cmd.Process.Kill()
	_ = s.proc.end() // the kill
	s.proc = nil
}

// fatalf ends the test with the reason in one line, which says what the guest's kernel and the process said last.
func (s *saga) fatalf(format string, args ...any) {
	s.t.Helper()
	reason := fmt.Sprintf(format, args...)
	if proc := s.proc; proc != nil {
		s.kill()
		reason += "; the process said: " + proc.said.String()
	}
	s.errorf("%s; the kernel said: %s", reason, s.console.kernelTail())
	s.t.FailNow()
}

// errorf fails the test with a reason in one line.
func (s *saga) errorf(format string, args ...any) {
	s.t.Helper()
	reason := strings.ReplaceAll(strings.TrimSpace(fmt.Sprintf(format, args...)), "\n", " | ")
	s.t.Errorf("%s%s", kvmlab.ReasonMark, reason)
}

// orderPause begins a pause.
func (s *saga) orderPause(order pauseOrder) {
	s.t.Helper()
	if err := json.NewEncoder(s.proc.orders).Encode(order); err != nil {
		s.fatalf("%v", err)
	}
}

// pause pauses the guest and waits until its process has ended.
func (s *saga) pause() lifecycle.Paused {
	s.t.Helper()
	return s.pauseBy(pauseOrder{HoldAt: -1})
}

func (s *saga) pauseBy(order pauseOrder) lifecycle.Paused {
	s.t.Helper()
	s.orderPause(order)
	r, err := s.report()
	if err != nil || r.Paused == nil {
		s.fatalf("the machine was not paused: %+v, %v", r, err)
	}
	err = s.proc.end()
	s.proc = nil
	if err != nil {
		s.fatalf("%v", err)
	}
	s.paused(r.Paused.ID)
	return *r.Paused
}

// checkpoint makes a checkpoint the one to go on from, while the guest runs on.
func (s *saga) checkpoint() lifecycle.Paused {
	s.t.Helper()
	s.orderPause(pauseOrder{Checkpoint: true, HoldAt: -1})
	r, err := s.report()
	if err != nil || r.Paused == nil {
		s.fatalf("there was no checkpoint: %+v, %v", r, err)
	}
	lines, partial := s.console.TakeMoment()
	for _, line := range lines {
		s.check(line)
	}
	s.job.ID = r.Paused.ID
	s.saved = savedSaga{cloneLogs(s.logs), partial}
	return *r.Paused
}

// paused makes a snapshot the one to go on from.
func (s *saga) paused(id snapshot.ID) {
	s.t.Helper()
	for _, line := range s.console.Take() {
		s.check(line)
	}
	s.job.ID = id
	s.saved = savedSaga{cloneLogs(s.logs), s.console.Partial()}
}

// rewind goes back to the last pause.
func (s *saga) rewind() {
	s.logs = cloneLogs(s.saved.logs)
	s.console.Rewind(s.saved.partial)
	s.mono = 0
}

func cloneLogs(logs wire.Logs) wire.Logs {
	out := wire.Logs{}
	for name, l := range logs {
		clone := *l
		out[name] = &clone
	}
	return out
}

// lineLimit is the time that a line may take: on an idle machine, a second. It is there for a machine that hangs, and long
// enough for a busy one.
const lineLimit = 4 * time.Minute

// next waits for the next line of the guest program and checks it.
func (s *saga) next() string {
	s.t.Helper()
	ctx, cancel := context.WithTimeoutCause(s.t.Context(), lineLimit, fmt.Errorf("nothing within %v", lineLimit))
	defer cancel()
	ctx, ended := context.WithCancelCause(ctx)
	defer ended(nil)
	proc := s.proc
	go func() {
		select {
		case <-proc.gone:
			ended(errors.New("the machine's process has ended"))
		case <-ctx.Done():
		}
	}()
	line, err := s.console.Next(ctx)
	if err != nil {
		s.fatalf("%v", err)
	}
	s.check(line)
	return line
}

// check checks a line of the guest program: its place in a log, and that it is no failure.
func (s *saga) check(line string) {
	s.t.Helper()
	_, e, isLog, err := s.logs.Check(line)
	switch {
	case err != nil:
		s.fatalf("%v", err)
	case isLog:
		s.mono = e.Monotonic
	case strings.HasPrefix(line, "error "), strings.HasPrefix(line, "failed "):
		s.fatalf("the guest says: %s", line)
	case strings.HasPrefix(line, "done echo "):
		s.echoes = append(s.echoes, line)
	}
}

// until waits for a line that begins with prefix, and returns it and those before it.
func (s *saga) until(prefix string) []string {
	s.t.Helper()
	var lines []string
	for {
		line := s.next()
		lines = append(lines, line)
		if strings.HasPrefix(line, prefix) {
			return lines
		}
	}
}

// tell gives an order.
func (s *saga) tell(order string) {
	s.t.Helper()
	if _, err := io.WriteString(s.input.w, order+"\n"); err != nil {
		s.fatalf("%v", err)
	}
}

// order gives an order and returns the lines up to the one that says that it is done.
func (s *saga) order(order string) []string {
	s.t.Helper()
	s.tell(order)
	return s.until("done " + order)
}

// steps waits until every log has n more lines.
func (s *saga) steps(n uint64) {
	s.t.Helper()
	want := map[string]uint64{}
	for _, name := range s.names {
		want[name] = s.count(name) + n
	}
	for len(want) > 0 {
		maps.DeleteFunc(want, func(name string, n uint64) bool { return s.count(name) >= n })
		if len(want) > 0 {
			s.next()
		}
	}
}

func (s *saga) count(name string) uint64 {
	if l := s.logs[name]; l != nil {
		return l.Count
	}
	return 0
}

// finish ends the load, for which the guest checks all that it holds, and the machine. What the guest counted must be
// what came.
func (s *saga) finish() {
	s.t.Helper()
	stop := s.order("stop")
	got := strings.Fields(strings.TrimPrefix(stop[len(stop)-1], "done stop "))
	var want []string
	for _, name := range s.names {
		want = append(want, fmt.Sprintf("%s=%d", name, s.count(name)))
	}
	if slices.Sort(got); !slices.Equal(got, want) {
		s.errorf("the guest counts %q, here came %q", got, want)
	}
	s.powerOff()
}

// powerOff ends the machine, whose kernel must have found no fault, and waits until its process has ended.
func (s *saga) powerOff() {
	s.t.Helper()
	if warnings := Warnings(s.order("warnings")); len(warnings) > 0 {
		s.errorf("the kernel warns: %q", warnings)
	}
	if facts := s.order("facts"); !strings.Contains(facts[len(facts)-1], "clocksource=kvm-clock") {
		s.errorf("the guest says %q", facts)
	}
	s.tell("poweroff")
	if r, err := s.report(); err != nil || !strings.Contains(r.Ended, "powered off") {
		s.errorf("the machine's end: %+v, %v", r, err)
	}
	err := s.proc.end()
	s.proc = nil
	if err != nil {
		s.errorf("the machine's process: %v", err)
	}
}
