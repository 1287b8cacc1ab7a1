package snapshot

import (
	"bytes"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"strings"
	"testing"
)

// thorough says whether to look at more of everything.
func thorough() bool { return os.Getenv("CRYOVISOR_LONG") != "" }

// TestCrash loses power after every step of everything that is done to a store, for several choices of what of the unsynced
// survives. What was there must be, what is being made or deleted is there as a whole or not at all, what was reported as
// done is done, and the store works on.
func TestCrash(t *testing.T) {
	for name, base := range bases {
		for _, op := range chosen(name) {
			t.Run(name+"/"+op.name, func(t *testing.T) {
				t.Parallel()
				c := newCrashes(t, newWorld(t), base, &op)
				made, err := op.do(c.w, c.lab)
				if err != nil {
					t.Fatal(err)
				}
				c.checkRecorder()
				c.checkShredded(&op)
				for k := range len(c.files.log) {
					c.crashAt(k, c.w.during(&op))
				}
				c.crashAt(len(c.files.log), c.w.after(&op, made))
				c.report()
			})
		}
	}
}

// TestCrashAfterFailure is TestCrash of what follows after an error, or after the death of the process, at each step: the
// clearing away, then Collect, then the second attempt.
func TestCrashAfterFailure(t *testing.T) {
	for name, base := range bases {
		for _, op := range chosen(name) {
			t.Run(name+"/"+op.name, func(t *testing.T) {
				t.Parallel()
				total := &crashes{w: newWorld(t), seen: map[string]bool{}}
				for _, x := range []fault{{how: failBefore}, {how: failAfter}, {how: failBefore, forever: true}} {
					for at, last := 1, false; !last; at++ {
						x.at = at
						last = crashAfterFailure(t, base, &op, x, total)
					}
				}
				t.Logf("%d crashes, %d different", total.points, total.states)
			})
		}
	}
}

// crashAfterFailure says whether the fault is behind the last step.
func crashAfterFailure(t *testing.T, base fileSystem, op *operation, x fault, total *crashes) bool {
	t.Helper()
	c := newCrashes(t, total.w, base, op)
	c.seen, c.light = total.seen, true
	c.what = fmt.Sprintf("fault %+v, ", x)
	x.err = errInjected
	c.files.fault = &x
	made, err := op.do(c.w, c.lab)
	c.files.fault = nil
	if x.hit == "" {
		return true
	}
	if x.looks && x.forever {
		return false // as if it had died at the next change
	}
	if alike(x.hit, x.at) {
		return false
	}
	c.what += "hit " + x.hit + ", "
	e, ended := c.w.during(op), len(c.files.log)
	if err := collectGarbage(c.lab); err != nil {
		t.Fatalf("%scollect: %v", c.what, err)
	}
	for k := x.logged; k <= len(c.files.log); k++ {
		if k == ended && err == nil { // the step was one that may fail
			e = c.w.after(op, made)
		}
		c.crashAt(k, e)
	}
	if err != nil {
		c.secondAttempt(op, e)
	}
	total.points += c.points
	total.states += c.states
	return false
}

// secondAttempt is the operation again, which succeeds or finds that there is nothing to do, and a crash after it.
func (c *crashes) secondAttempt(op *operation, e expectation) {
	c.t.Helper()
	c.what += "second attempt, "
	made, err := op.do(c.w, c.lab)
	if op.removes != nil && isNotFound(err) {
		err = nil
	}
	if err != nil {
		c.t.Fatalf("%s%v", c.what, err)
	}
	after := c.w.after(op, made)
	after.may = e.may
	if op.removes != nil {
		after.may = nil
	}
	c.crashAt(len(c.files.log), after)
}

// crashes are those of one operation.
type crashes struct {
	t       *testing.T
	w       *world
	lab     *lab
	files   *testFiles
	start   map[string][]byte // what was there before
	rnd     *rand.Rand
	scratch string // for what survives
	what    string // for messages
	seen    map[string]bool
	light   bool // not to use the store much after each crash

	points, states int // crashes, and those that differ from all before
}

func newCrashes(t *testing.T, w *world, base fileSystem, op *operation) *crashes {
	t.Helper()
	c := &crashes{t: t, w: w, scratch: fastDir(t), rnd: testRand(t), seen: map[string]bool{}}
	if c.start = c.w.tree; op.empty {
		c.start = map[string][]byte{"var": nil}
	}
	dir := fastDir(t)
	writeTree(t, dir, c.start)
	c.files = &testFiles{base: base, root: dir}
	c.lab = c.w.lab(t, dir, c.files)
	if err := ageTemps(c.lab); err != nil {
		t.Fatal(err)
	}
	return c
}

// checkRecorder wants the log to have all that has changed.
func (c *crashes) checkRecorder() {
	c.t.Helper()
	m := c.replay(len(c.files.log))
	if !maps.EqualFunc(m.survivors(choice{how: everything}), readTree(c.t, c.files.root), bytes.Equal) {
		c.t.Fatal("something was changed past the file system of the store")
	}
}

// checkShredded wants what was deleted to be gone from the disk, and not just its name.
func (c *crashes) checkShredded(op *operation) {
	c.t.Helper()
	if op.removes == nil {
		return
	}
	was := c.start[storeAt+"/"+manifestName(op.removes(c.w))]
	for _, n := range c.replay(len(c.files.log)).open {
		if bytes.Equal(n.durable, was) {
			c.t.Fatal("the manifest is still on the disk")
		}
	}
}

// replay returns the file system as it is after the first k changes.
func (c *crashes) replay(k int) *crashModel {
	m := newCrashModel(c.start)
	for _, e := range c.files.log[:k] {
		e.apply(m)
	}
	return m
}

// crashAt crashes after the first k changes.
func (c *crashes) crashAt(k int, e expectation) {
	c.t.Helper()
	m := c.replay(k)
	for _, mask := range c.masks(m.pendingChanges()) {
		for how := range c.tears() {
			seed := c.rnd.Uint64()
			asked := 0
			tree := m.survivors(choice{mask, how, rand.New(rand.NewPCG(seed, 0)), &asked})
			c.points++
			key := fmt.Sprintf("%x %v", sumOf(tree), e)
			if c.seen[key] {
				continue
			}
			c.seen[key] = true
			c.states++
			if err := c.survive(tree, e); err != nil {
				c.t.Fatalf("%safter %d changes, %s; of the unsynced survive names %b, contents %d, seed %d: %v",
					c.what, k, c.last(k), mask, how, seed, err)
			}
		}
	}
}

// last names the changes before the crash.
func (c *crashes) last(k int) string {
	var names []string
	for _, e := range c.files.log[max(0, k-8):k] {
		names = append(names, e.what)
	}
	return strings.Join(names, ", ")
}

// survive goes on after a crash.
func (c *crashes) survive(tree map[string][]byte, e expectation) error {
	dir, err := os.MkdirTemp(c.scratch, "")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	writeTree(c.t, dir, tree)
	l := c.w.lab(c.t, dir, quickFiles{})
	if err := c.w.check(l, e); err != nil {
		return err
	}
	if c.light && !thorough() {
		return c.w.checkCollect(l)
	}
	return c.w.checkUse(l, e)
}

func (c *crashes) report() {
	c.t.Logf("%d changes, %d crashes, %d different", len(c.files.log), c.points, c.states)
}

// masks are choices of names: all of them, if they are few.
func (c *crashes) masks(n int) (out []uint64) {
	all, some := 3, 6
	if thorough() {
		all, some = 7, 100
	}
	if n <= all {
		for mask := range uint64(1) << n {
			out = append(out, mask)
		}
		return out
	}
	out = []uint64{0, ^uint64(0)}
	for range some {
		out = append(out, c.rnd.Uint64())
	}
	return out
}

// How contents survive.
const (
	nothing = iota
	everything
	torn // and more
)

func (c *crashes) tears() int {
	if thorough() {
		return torn + 8
	}
	return torn + 2
}

// choice is a decider by a mask of names, and chance for contents.
type choice struct {
	mask  uint64
	how   int
	rnd   *rand.Rand
	asked *int
}

func (c choice) change(d dirChange) int {
	if c.how == everything && c.asked == nil {
		return 1
	}
	bit := *c.asked
	*c.asked++
	switch {
	case c.mask>>bit&1 == 0:
		return 0
	case d.removed != "" && d.add != "" && c.how >= torn && c.rnd.IntN(2) == 0:
		return 2
	}
	return 1
}

func (c choice) contents(n *node) []byte {
	switch c.how {
	case nothing:
		return n.durable
	case everything:
		return n.cached
	}
	return n.torn(c.rnd)
}
