//go:build linux && amd64

package lifecycle_test

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/cryovisor/cryovisor/lifecycle"
)

// What TestModel does; $CRYOVISOR_MODEL_OPS and $CRYOVISOR_MODEL_SEED change it.
const (
	modelOps     = 600
	modelCallers = 6
	modelRound   = 100 // operations from one crash or advance of the clock to the next, about
)

// box is a sandbox as the model has it. Each belongs to one caller, so that what happens to it is known.
type box struct {
	id       string
	running  bool
	idle     time.Duration
	active   time.Time
	mark     uint64   // what its memory holds, if it runs
	stored   []uint64 // what it may hold after a resume: one value, but for a pause that a crash has cut; none if it was never paused
	onPause  bool
	deadline time.Time
	paused   time.Time
	timeout  time.Duration
	note     string // its metadata
	pending  string // the operation under way
}

// extend is what a connection does, and the start: the deadline is at least so far away.
func (b *box) extend(now time.Time, timeout time.Duration) {
	if d := now.Add(timeout); d.After(b.deadline) {
		b.deadline = d
	}
	b.active = now
}

// end is when the timeout is reached, or, of one that is paused, when it was.
func (b *box) end() time.Time {
	switch idle := b.active.Add(b.idle); {
	case !b.running:
		return b.paused
	case b.idle > 0 && idle.Before(b.deadline):
		return idle
	}
	return b.deadline
}

// model is the simple model, and the process that it is held against.
type model struct {
	t     *testing.T
	dir   string
	rnd   *rand.Rand
	now   time.Time
	next  uint64 // mark
	ops   int
	crash int // crashes so far

	process *exec.Cmd
	in      io.WriteCloser
	said    bytes.Buffer // by the process, to be read when it has ended

	mu      sync.Mutex
	boxes   []*box
	kept    map[string][]uint64 // checkpoints by id, and the mark they may have
	deleted map[string]bool     // checkpoints
	opening time.Duration       // what the last one took, of the process
	waiting map[int]chan report
	n       int
	dead    chan struct{}
}

func envInt(name string, absent int) int {
	n, err := strconv.Atoi(os.Getenv(name))
	if err != nil {
		return absent
	}
	return n
}

// TestModel has many callers do random things to the sandboxes of a Manager in another process, which is killed again and again, and holds what is
// found afterwards against a simple model: nothing is lost, nothing is resurrected, and nothing is left over.
func TestModel(t *testing.T) {
	needKVM(t)
	seed := envInt("CRYOVISOR_MODEL_SEED", int(time.Now().UnixNano()%1e9))
	total := modelOps
	if testing.Short() {
		total /= 3
	}
	total = envInt("CRYOVISOR_MODEL_OPS", total)
	t.Logf("seed %d, %d operations", seed, total)
	m := &model{
		t: t, dir: t.TempDir(), rnd: rand.New(rand.NewPCG(uint64(seed), 0)), now: newFakeClock().now, next: 1, kept: make(map[string][]uint64),
		deleted: make(map[string]bool),
	}
	m.start()
	for m.ops < total && !t.Failed() {
		switch m.rnd.IntN(4) {
		case 0:
			m.round(0)
			m.pass()
		case 1:
			m.round(0)
			m.cut()
			m.restart()
		default:
			m.round(1 + m.rnd.IntN(modelRound))
			m.restart()
		}
	}
	m.round(0) // so that something has happened that no crash has tidied up
	m.finish()
	t.Logf("%d operations, %d crashes", m.ops, m.crash)
}

// start starts the process, and compares what it finds with the model.
func (m *model) start() {
	m.t.Helper()
	m.launch()
	began := time.Now()
	r, alive := m.ask(m.open())
	if !alive || r.Err != "" || len(r.Wrong) > 0 {
		m.t.Fatalf("open: %+v, alive: %v", r, alive)
	}
	m.opening = time.Since(began)
	m.reconcile(r)
	m.audit("after a crash")
}

func (m *model) open() order { return order{Op: "open", Advance: m.now.Sub(newFakeClock().now)} }

func (m *model) audit(when string) {
	m.t.Helper()
	if r, alive := m.ask(order{Op: "audit"}); !alive || r.Err != "" || len(r.Wrong) > 0 {
		m.t.Errorf("%s: %+v", when, r)
	}
}

// launch starts the process, which does nothing yet.
func (m *model) launch() {
	m.t.Helper()
	binary, err := os.Executable()
	if err != nil {
		m.t.Fatal(err)
	}
	replies, theirs, err := os.Pipe()
	if err != nil {
		m.t.Fatal(err)
	}
	m.process = exec.Command(binary, "-test.run=^TestModelProcess$")
	m.process.Env = append(os.Environ(), envModel+"="+m.dir)
	m.process.ExtraFiles = []*os.File{theirs}
	m.said.Reset()
	m.process.Stdout, m.process.Stderr = &m.said, os.Stderr
	if m.in, err = m.process.StdinPipe(); err != nil {
		m.t.Fatal(err)
	}
	if err := m.process.Start(); err != nil {
		m.t.Fatal(err)
	}
	theirs.Close()
	m.waiting, m.dead = make(map[int]chan report), make(chan struct{})
	go m.read(replies, m.dead)
	if _, alive := m.ask(order{Op: "hello"}); !alive {
		m.t.Fatal("the process does not start")
	}
}

// read hands replies to who waits for them, until the process ends.
func (m *model) read(replies *os.File, dead chan struct{}) {
	defer replies.Close()
	defer close(dead)
	lines := bufio.NewScanner(replies)
	lines.Buffer(nil, 64<<20)
	for lines.Scan() {
		var r report
		if json.Unmarshal(lines.Bytes(), &r) != nil {
			return // cut off
		}
		m.mu.Lock()
		c := m.waiting[r.N]
		m.mu.Unlock()
		c <- r
	}
}

// ask has the process do something. alive is false if it died before it has said what came of that.
func (m *model) ask(o order) (r report, alive bool) {
	c, dead := m.tell(o)
	select {
	case r = <-c:
		return r, true
	case <-dead:
	}
	select { // it may have been the last thing that it said
	case r = <-c:
		return r, true
	default:
		return r, false
	}
}

// tell has the process do something, and does not wait.
func (m *model) tell(o order) (c chan report, dead chan struct{}) {
	c = make(chan report, 1)
	m.mu.Lock()
	defer m.mu.Unlock()
	m.n++
	o.N = m.n
	m.waiting[o.N] = c
	if err := json.NewEncoder(m.in).Encode(o); err != nil { // it was killed
		<-m.dead
	}
	return c, m.dead
}

// round has callers do random things at the same time, until the round is over, or the process is killed after so many operations; 0: it is not.
func (m *model) round(kill int) {
	m.mu.Lock()
	for len(m.boxes) < modelCallers*2 {
		m.boxes = append(m.boxes, &box{})
	}
	boxes := slices.Clone(m.boxes)
	m.mu.Unlock()
	left, done := modelRound, 0
	take := func() bool {
		m.mu.Lock()
		defer m.mu.Unlock()
		if done++; done == kill {
			_ = m.process.Process.Kill()
		}
		left--
		return left >= 0
	}
	var callers sync.WaitGroup
	for i := range modelCallers {
		rnd := rand.New(rand.NewPCG(m.rnd.Uint64(), uint64(i)))
		callers.Go(func() {
			for take() {
				if !m.act(rnd, boxes[i*len(boxes)/modelCallers:(i+1)*len(boxes)/modelCallers]) {
					return
				}
			}
		})
	}
	callers.Wait()
	m.ops += min(done, modelRound)
	if kill > 0 {
		_ = m.process.Process.Kill()
	}
}

// mark is a new one.
func (m *model) newMark() uint64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.next++
	return m.next
}

// act does one random thing to one of a caller's boxes. It says whether the process lives.
func (m *model) act(rnd *rand.Rand, boxes []*box) bool {
	b := boxes[rnd.IntN(len(boxes))]
	timeout := time.Duration(1+rnd.IntN(60)) * time.Minute
	switch {
	case b.id == "":
		return m.create(rnd, b, timeout)
	case rnd.IntN(12) == 0:
		return m.checkpoint(rnd, b)
	case rnd.IntN(12) == 0:
		return m.fork(b, boxes, timeout)
	case rnd.IntN(10) == 0:
		return m.plain(b, "kill", order{}, true, func(report) { *b = box{} })
	case b.running:
		return m.actRunning(rnd, b, timeout)
	}
	op := []string{"connect", "resume", "pause", "timeout"}[rnd.IntN(4)]
	return m.plain(b, op, order{Timeout: timeout}, op == "connect" || op == "resume", func(r report) {
		if op == "connect" && !r.Resumed {
			m.t.Errorf("%s was paused, and connecting to it did not resume it", b.id)
		}
		if !slices.Contains(b.stored, r.Mark) {
			m.t.Errorf("%s holds %d after a resume; its last pause had %v", b.id, r.Mark, b.stored)
		}
		b.running, b.mark, b.stored = true, r.Mark, []uint64{r.Mark}
		b.timeout, b.deadline = timeout, time.Time{}
		b.extend(m.now, timeout)
	})
}

func (m *model) actRunning(rnd *rand.Rand, b *box, timeout time.Duration) bool {
	switch rnd.IntN(7) {
	case 0:
		return m.plain(b, "connect", order{Timeout: timeout}, true, func(r report) {
			if r.Resumed || r.Mark != b.mark {
				m.t.Errorf("%s ran and held %d: %+v", b.id, b.mark, r)
			}
			b.extend(m.now, timeout)
		})
	case 1:
		return m.plain(b, "timeout", order{Timeout: timeout}, true, func(report) { b.deadline, b.active = m.now.Add(timeout), m.now })
	case 4:
		return m.plain(b, "touch", order{}, true, func(report) { b.active = m.now })
	case 2:
		return m.plain(b, "resume", order{}, false, nil)
	case 3:
		mark := m.newMark()
		return m.plain(b, "mark", order{Mark: mark}, true, func(report) { b.mark = mark })
	}
	mark := m.newMark() // so that each pause can be told from the others
	if !m.plain(b, "mark", order{Mark: mark}, true, func(report) { b.mark = mark }) {
		return false
	}
	return m.plain(b, "pause", order{}, true, func(report) {
		b.running, b.stored, b.paused = false, []uint64{b.mark}, m.now
	})
}

// plain does one thing to a box, which must succeed, or fail because of its state.
func (m *model) plain(b *box, op string, o order, succeeds bool, then func(report)) bool {
	b.pending = op
	o.Op, o.ID = op, b.id
	r, alive := m.ask(o)
	if !alive {
		return false
	}
	b.pending = ""
	want := ""
	if !succeeds {
		want = "state"
	}
	if r.Err != want {
		m.t.Errorf("%s of %+v: %+v", op, *b, r)
		return true
	}
	if succeeds && then != nil {
		then(r)
	}
	return true
}

func (m *model) create(rnd *rand.Rand, b *box, timeout time.Duration) bool {
	template, marks := "ticker", []uint64{0}
	m.mu.Lock()
	for id, has := range m.kept {
		if rnd.IntN(2) == 0 {
			template, marks = id, has
			break
		}
	}
	m.mu.Unlock()
	fresh := box{running: true, onPause: rnd.IntN(2) == 0, timeout: timeout, note: strconv.FormatUint(m.newMark(), 10)}
	if rnd.IntN(2) == 0 {
		fresh.idle = time.Duration(1+rnd.IntN(60)) * time.Minute
	}
	r, alive := m.ask(order{
		Op: "create", ID: template, Timeout: timeout, Idle: fresh.idle, Pause: fresh.onPause, Metadata: map[string]string{"note": fresh.note},
	})
	if !alive {
		return false
	}
	if r.Err == "not found" && template != "ticker" {
		return true // another caller has deleted the checkpoint
	}
	if r.Err != "" || !slices.Contains(marks, r.Mark) {
		m.t.Errorf("created of %s, which has %v: %+v", template, marks, r)
		return true
	}
	fresh.id, fresh.mark = r.ID, r.Mark
	fresh.extend(m.now, timeout)
	*b = fresh
	return true
}

func (m *model) fork(b *box, boxes []*box, timeout time.Duration) bool {
	i := slices.IndexFunc(boxes, func(b *box) bool { return b.id == "" })
	if i < 0 {
		return true
	}
	return m.plain(b, "fork", order{Timeout: timeout}, true, func(r report) {
		has := b.stored
		if b.running {
			has = []uint64{b.mark}
		}
		if !slices.Contains(has, r.Mark) {
			m.t.Errorf("a fork of %s, which has %v, has %d", b.id, has, r.Mark)
		}
		f := box{id: r.ID, running: true, mark: r.Mark, onPause: b.onPause, timeout: timeout, idle: b.idle, note: b.note}
		f.extend(m.now, timeout)
		*boxes[i] = f
	})
}

// checkpoint keeps a box, or deletes what was kept.
func (m *model) checkpoint(rnd *rand.Rand, b *box) bool {
	m.mu.Lock()
	some := ""
	for id := range m.kept {
		some = id
	}
	remove := some != "" && (len(m.kept) > 3 || rnd.IntN(3) == 0)
	if remove {
		delete(m.kept, some)
	}
	m.mu.Unlock()
	if remove {
		r, alive := m.ask(order{Op: "delete", ID: some})
		m.mu.Lock()
		defer m.mu.Unlock()
		if m.deleted[some] = alive; alive && r.Err != "" {
			m.t.Errorf("delete %s: %+v", some, r)
		}
		return alive
	}
	return m.plain(b, "checkpoint", order{}, true, func(r report) {
		m.mu.Lock()
		defer m.mu.Unlock()
		m.kept[r.ID] = b.stored
		if b.running {
			m.kept[r.ID] = []uint64{b.mark}
		}
	})
}

// advance has the clock of the process, which has to be alive, go on.
func (m *model) advance() {
	m.t.Helper()
	d := time.Duration(m.rnd.IntN(40)) * time.Minute
	if m.rnd.IntN(4) == 0 {
		d = lifecycle.DefaultRetention - time.Hour
	}
	m.now = m.now.Add(d)
	if _, alive := m.ask(order{Op: "advance", Advance: d}); !alive {
		m.t.Fatal("the process has ended by itself")
	}
}

func (m *model) due(b *box) bool { return b.id != "" && b.running && !m.now.Before(b.end()) }

// pass lets time go on, while nobody calls, until what is due has happened.
func (m *model) pass() {
	m.t.Helper()
	m.advance()
	for _, b := range m.boxes {
		switch {
		case m.due(b) && b.onPause:
			b.running, b.stored, b.paused = false, []uint64{b.mark}, m.now
		case m.due(b), m.expired(b):
			*b = box{}
		}
	}
	m.wantList()
}

// cut lets time go on, and kills the process while it does what is due.
func (m *model) cut() {
	m.t.Helper()
	m.advance()
	for _, b := range m.boxes {
		switch {
		case m.due(b) && b.onPause:
			b.pending = "pause"
		case m.due(b):
			b.pending = "kill"
		}
	}
	for range m.rnd.IntN(200) {
		m.ask(order{Op: "hello"})
	}
	_ = m.process.Process.Kill()
}

// wantList waits until the sandboxes are those of the model.
func (m *model) wantList() {
	m.t.Helper()
	var wrong string
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); {
		r, alive := m.ask(order{Op: "list"})
		if !alive {
			m.t.Fatal("the process has ended by itself")
		}
		if wrong = m.compare(r); wrong == "" {
			return
		}
	}
	m.t.Errorf("for a minute, at %v: %s", m.now, wrong)
}

func (m *model) expired(b *box) bool {
	return b.id != "" && !b.running && !m.now.Before(b.paused.Add(lifecycle.DefaultRetention))
}

// compare says what of a list is not as the model has it.
func (m *model) compare(r report) string {
	found := make(map[string]lifecycle.SandboxInfo)
	for _, s := range r.Sandboxes {
		found[s.ID] = s
	}
	for _, b := range m.boxes {
		if b.id == "" {
			continue
		}
		s, ok := found[b.id]
		want := lifecycle.StatePaused
		if b.running {
			want = lifecycle.StateRunning
		}
		if !ok || s.State != want || s.Metadata["note"] != b.note || !s.End.Equal(b.end()) {
			return fmt.Sprintf("%+v is %+v", *b, s)
		}
		delete(found, b.id)
	}
	if len(found) > 0 {
		return fmt.Sprintf("%v should not be there", found)
	}
	return ""
}

// restart waits for the end of a process that was killed, and starts another. Now and then that is killed while it opens the directory.
func (m *model) restart() {
	m.t.Helper()
	for range m.rnd.IntN(3) {
		m.bury()
		m.launch()
		m.tell(m.open())
		time.Sleep(time.Duration(m.rnd.Float64() * float64(m.opening))) // any moment will do
		_ = m.process.Process.Kill()
	}
	m.bury()
	m.start()
}

func (m *model) bury() {
	<-m.dead
	_ = m.process.Wait()
	m.in.Close()
	m.crash++
}

// reconcile compares what a new process has found with what may be there, and makes the model what is.
func (m *model) reconcile(r report) {
	m.t.Helper()
	found := make(map[string]lifecycle.SandboxInfo)
	for _, s := range r.Sandboxes {
		found[s.ID] = s
	}
	for _, b := range m.boxes {
		if b.id == "" {
			continue
		}
		s, ok := found[b.id]
		delete(found, b.id)
		m.settle(b, s, ok)
	}
	if len(found) > 0 {
		m.t.Errorf("after a crash there are sandboxes that should not be: %v", found)
	}
	m.reconcileKept(r)
}

// settle makes a box what it is after a crash, if it may be that.
func (m *model) settle(b *box, s lifecycle.SandboxInfo, there bool) {
	m.t.Helper()
	stored := b.stored
	if b.pending == "pause" && b.running {
		stored = append(slices.Clone(stored), b.mark)
	}
	certain := len(b.stored) > 0 && b.pending != "kill"
	switch {
	case !there && certain && !m.expired(b):
		m.t.Errorf("lost: %+v", *b)
	case there && (len(stored) == 0 || s.State != lifecycle.StatePaused || s.Metadata["note"] != b.note):
		m.t.Errorf("resurrected, or not as it was: %+v is %+v", *b, s)
	}
	if !there {
		*b = box{}
		return
	}
	// One that ran is as if it had been paused now: it was not forgotten until then.
	since := s.Expires.Add(-lifecycle.DefaultRetention)
	resuming := b.pending == "connect" || b.pending == "resume"
	if wasPaused := !b.running && since.Equal(b.paused); !wasPaused && (!since.Equal(m.now) || !b.running && !resuming) {
		m.t.Errorf("%+v, at %v, is kept until %v", *b, m.now, s.Expires)
	}
	b.running, b.stored, b.pending, b.paused = false, stored, "", since
}

// reconcileKept does the same with checkpoints.
func (m *model) reconcileKept(r report) {
	m.t.Helper()
	found := make(map[string]bool)
	for _, t := range r.Templates {
		if t.Source != "" {
			found[t.ID] = true
		}
	}
	for id := range m.kept {
		if !found[id] {
			m.t.Errorf("checkpoint %s is lost", id)
		}
		delete(found, id)
	}
	for id := range found { // of which the crash has cut the making, or the deletion
		if m.deleted[id] {
			m.t.Errorf("checkpoint %s, which was deleted, is there", id)
		}
		if r, alive := m.ask(order{Op: "delete", ID: id}); !alive || r.Err != "" {
			m.t.Errorf("delete %s: %+v", id, r)
		}
	}
}

// finish looks at every sandbox, kills it, and sees to it that nothing is left.
func (m *model) finish() {
	m.t.Helper()
	m.wantList()
	for _, b := range m.boxes {
		if b.id == "" {
			continue
		}
		r, alive := m.ask(order{Op: "connect", ID: b.id})
		has := b.stored
		if b.running {
			has = []uint64{b.mark}
		}
		if !alive || r.Err != "" || !slices.Contains(has, r.Mark) {
			m.t.Errorf("in the end, %+v: %+v", *b, r)
		}
		if r, alive := m.ask(order{Op: "kill", ID: b.id}); !alive || r.Err != "" {
			m.t.Errorf("kill %s: %+v", b.id, r)
		}
	}
	for id := range m.kept {
		if r, alive := m.ask(order{Op: "delete", ID: id}); !alive || r.Err != "" {
			m.t.Errorf("delete %s: %+v", id, r)
		}
	}
	if r, alive := m.ask(order{Op: "list"}); !alive || len(r.Sandboxes) > 0 || len(r.Templates) != 1 {
		m.t.Errorf("in the end there are %+v", r)
	}
	m.audit("in the end")
	if r, alive := m.ask(order{Op: "close"}); !alive || r.Err != "" {
		m.t.Errorf("close: %+v", r)
	}
	<-m.dead
	if err := m.process.Wait(); err != nil { // it looks for leaks of its own
		m.t.Errorf("the process ends with %v: %s", err, &m.said)
	}
	m.in.Close()
}
