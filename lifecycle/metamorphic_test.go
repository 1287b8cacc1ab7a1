//go:build linux && amd64

package lifecycle_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"iter"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"filippo.io/age"

	"github.com/cryovisor/cryovisor/internal/testvm"
	"github.com/cryovisor/cryovisor/lifecycle"
	"github.com/cryovisor/cryovisor/memory"
	"github.com/cryovisor/cryovisor/snapshot"
	"github.com/cryovisor/cryovisor/vmm"
)

// way is how a machine is stored and resumed. None of it may make a difference.
type way struct {
	full, eager bool
	codec       snapshot.Codec
	workers     int
	how         storing
}

func (w way) String() string {
	return fmt.Sprintf("full=%v,eager=%v,%v,workers=%d,%s", w.full, w.eager, w.codec, w.workers, w.how)
}

// storing is what is called to store a machine.
type storing string

const (
	pausing       storing = "pause"
	preparing     storing = "prepare"    // before the pause, while more is done
	checkpointing storing = "checkpoint" // which the machine goes on from; and some that it runs on after
)

func ways() (out []way) {
	if testing.Short() { // each choice in some
		return []way{
			{true, true, snapshot.CodecLZ4, 1, pausing},
			{false, false, snapshot.CodecStored, 3, pausing},
			{true, false, snapshot.CodecLZ4, 3, preparing},
			{false, false, snapshot.CodecLZ4, 1, checkpointing},
		}
	}
	for _, full := range []bool{true, false} {
		for _, eager := range []bool{true, false} {
			for _, codec := range []snapshot.Codec{snapshot.CodecLZ4, snapshot.CodecStored} {
				for _, workers := range []int{1, 3} {
					out = append(out, way{full, eager, codec, workers, pausing})
				}
			}
		}
	}
	return append(
		out, way{true, false, snapshot.CodecLZ4, 3, preparing}, way{false, true, snapshot.CodecStored, 1, preparing},
		way{false, false, snapshot.CodecLZ4, 1, checkpointing},
	)
}

// traveller is a machine that goes one way. What is done to it is the same for all.
type traveller struct {
	*guest
	way
	t     *testing.T
	m     *lifecycle.Machine
	steps uint64 // that the guest may make
	// gone are the ranges that were discarded, and that the guest has not taken back since: they read as anything.
	gone []memory.Range
	// dropped are those of their pages that the machine has noted as discarded, since it notes that: the next snapshot has nothing
	// of them. nil if it does not.
	dropped  map[uint64]bool
	prepared *lifecycle.Preparation // of the next pause, or nil
	path     []string               // what was done, for messages
}

// action is something that is done to a machine which stands still, with all chances taken.
type action struct {
	name string
	do   func(*traveller)
}

const travelMemory = 4 << 20

// TestMetamorphic does one random list of things to machines that are stored and resumed in every way: they must have the same
// memory, disks and registers. $CRYOVISOR_METAMORPHIC_SEED chooses the list.
func TestMetamorphic(t *testing.T) {
	seed := envInt("CRYOVISOR_METAMORPHIC_SEED", int(time.Now().UnixNano()%1e9))
	lists := 1
	if os.Getenv("CRYOVISOR_LONG") != "" {
		lists = 12
	}
	for n := range lists {
		t.Logf("seed %d", seed+n)
		actions := someActions(rand.New(rand.NewPCG(uint64(seed+n), 0)))
		var first *result
		for _, w := range ways() {
			t.Run(fmt.Sprintf("seed=%d,%v", seed+n, w), func(t *testing.T) {
				got := travel(t, w, actions)
				if first == nil {
					first = got
				}
				if what := first.differs(got); what != "" {
					t.Errorf("seed %d: other %s than the first way", seed+n, what)
				}
			})
		}
	}
}

// travel does all of the actions to a new machine.
func travel(t *testing.T, w way, actions []action) *result {
	t.Helper()
	checkLeaks(t)
	g := newGuest(t, testvm.WorkerConfig{Memory: travelMemory, Every: 1})
	if at := g.worker.PageGPA(0); at != contentAt {
		t.Fatalf("the guest's content begins at %#x", at)
	}
	image := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(image, []byte(strings.Repeat("what is in the image. ", 40000)[:768<<10]), 0o400); err != nil {
		t.Fatal(err)
	}
	g.disks = lifecycle.Disks{Dir: filepath.Join(t.TempDir(), "disks"), Boot: []lifecycle.Disk{
		{Name: "raw", Image: image, Size: 1 << 20}, {Name: "blank", Size: 1 << 20},
	}}
	v := &traveller{guest: g, way: w, t: t, steps: 8}
	v.m = g.boot(t, v.steps)
	v.hold()
	defer func() {
		if t.Failed() {
			t.Logf("done: %s", strings.Join(v.path, "; "))
		}
	}()
	for _, a := range actions {
		v.path = append(v.path, a.name)
		a.do(v)
	}
	v.fill()
	r := v.result()
	closeMachine(t, v.m)
	return r
}

// hold waits until the guest has made its steps, and stops the machine.
func (v *traveller) hold() {
	v.t.Helper()
	ctx, cancel := context.WithCancelCause(v.t.Context())
	defer cancel(nil)
	vm := v.m.VM
	go func() { cancel(vm.Wait(ctx)) }() // a guest that has ended never holds
	if _, err := v.device.WaitHeld(ctx); err != nil {
		v.t.Fatal(err)
	}
	if err := v.m.VM.Pause(v.t.Context()); err != nil {
		v.t.Fatal(err)
	}
}

// run lets the guest work on what is in its memory.
func (v *traveller) run(steps uint64) {
	v.t.Helper()
	v.fill()
	v.steps += steps
	v.device.SetLimit(v.steps)
	if err := v.m.VM.Resume(); err != nil {
		v.t.Fatal(err)
	}
	v.hold()
}

// fill writes to what was discarded, as a guest does that takes it back.
func (v *traveller) fill() {
	v.t.Helper()
	for _, r := range v.gone {
		v.write(r.GPA, []byte(strings.Repeat("again", int(r.Len)))[:r.Len])
	}
	v.gone = nil
}

func (v *traveller) write(gpa uint64, b []byte) {
	v.t.Helper()
	if _, err := v.m.VM.Memory().WriteAt(b, int64(gpa)); err != nil {
		v.t.Fatal(err)
	}
	for p := range pagesIn(gpa, len(b)) {
		delete(v.dropped, p)
	}
}

// discard gives memory back as a balloon does.
func (v *traveller) discard(r memory.Range) {
	v.t.Helper()
	v.gone = append(v.gone, r)
	if err := v.m.VM.Memory().Discard(r.GPA, r.Len); err != nil {
		v.t.Fatal(err)
	}
	if v.dropped != nil {
		for p := range pagesIn(r.GPA, int(r.Len)) {
			v.dropped[p] = true
		}
	}
}

// pagesIn yields the addresses of the pages that n bytes touch.
func pagesIn(gpa uint64, n int) iter.Seq[uint64] {
	return func(yield func(uint64) bool) {
		for p := gpa / memory.PageSize * memory.PageSize; p < gpa+uint64(n) && yield(p); p += memory.PageSize {
		}
	}
}

func (v *traveller) pauseOptions() lifecycle.PauseOptions {
	opts := v.options()
	opts.Full, opts.Workers = v.full, v.workers
	return opts
}

// mark is a moment before the next pause at which a machine that has a use for it is stored. It does actions meanwhile, when a
// part is stored.
func (v *traveller) mark(actions []action) {
	v.t.Helper()
	switch v.how {
	case preparing:
		v.during(actions, func(opts lifecycle.PauseOptions) (err error) {
			v.prepared, err = v.m.Prepare(v.t.Context(), v.store, opts)
			return err
		})
	case checkpointing:
		gone := slices.Clone(v.gone)
		before := v.held(v.m, gone)
		var id snapshot.ID
		v.during(actions, func(opts lifecycle.PauseOptions) error {
			p, err := v.m.Checkpoint(v.t.Context(), v.store, opts)
			id = p.ID
			return err
		})
		device := v.device
		twin := v.resumed(id)
		v.device = device
		if what := before.differs(v.held(twin, gone)); what != "" {
			v.t.Fatalf("other %s in the checkpoint than before", what)
		}
		if err := twin.Discard(); err != nil {
			v.t.Fatal(err)
		}
	default:
		v.do(actions)
	}
}

func (v *traveller) do(actions []action) {
	v.t.Helper()
	for _, a := range actions {
		a.do(v)
	}
}

// during does actions while the machine is stored.
func (v *traveller) during(actions []action, store func(lifecycle.PauseOptions) error) {
	v.t.Helper()
	opts := v.pauseOptions()
	begun, acted, stored := make(chan struct{}), make(chan struct{}), make(chan error, 1)
	var once sync.Once
	opts.Progress = func(uint64, uint64) {
		once.Do(func() {
			close(begun)
			<-acted
		})
	}
	v.dropped = map[uint64]bool{}
	go func() { stored <- store(opts) }()
	select {
	case <-begun:
	case err := <-stored: // there was nothing to store
		stored <- err
	}
	func() {
		defer close(acted) // also if it fails
		v.do(actions)
	}()
	err := <-stored
	if errors.Is(err, memory.ErrNoWriteProtect) {
		v.t.Skip(err)
	}
	if err != nil {
		v.t.Fatal(err)
	}
}

// storeAway stores the machine, and ends it.
func (v *traveller) storeAway() snapshot.ID {
	v.t.Helper()
	var p lifecycle.Paused
	var err error
	switch {
	case v.prepared != nil:
		p, err = v.prepared.Pause(v.t.Context())
	case v.how == checkpointing:
		p, err = v.m.Checkpoint(v.t.Context(), v.store, v.pauseOptions())
	default:
		p, err = v.m.Pause(v.t.Context(), v.store, v.pauseOptions())
	}
	if err != nil {
		v.t.Fatal(err)
	}
	v.prepared, v.dropped = nil, nil
	closeMachine(v.t, v.m)
	if v.codec == snapshot.CodecLZ4 {
		return p.ID
	}
	return v.transcode(p.ID)
}

// resumed resumes a snapshot. The machine stands still.
func (v *traveller) resumed(id snapshot.ID) *lifecycle.Machine {
	v.t.Helper()
	m, err := lifecycle.Resume(v.t.Context(), v.store, id, lifecycle.ResumeOptions{
		Identities: []age.Identity{v.key}, Hardware: v.hardware(v.steps), Disks: v.disks, Eager: v.eager,
	})
	if errors.Is(err, vmm.ErrNoUserfaultfd) {
		v.t.Skip(err)
	}
	if err != nil {
		v.t.Fatal(err)
	}
	v.t.Cleanup(func() { closeMachine(v.t, m) })
	return m
}

// pause stores the machine and resumes it, which changes nothing.
func (v *traveller) pause() {
	v.t.Helper()
	before, dropped := v.held(v.m, v.gone), v.dropped
	v.m = v.resumed(v.storeAway())
	if what := before.differs(v.held(v.m, v.gone)); what != "" {
		v.t.Fatalf("other %s after the resume than before the pause", what)
	}
	page, zeros := make([]byte, memory.PageSize), make([]byte, memory.PageSize)
	for p := range dropped {
		if _, err := v.m.VM.Memory().ReadAt(page, int64(p)); err != nil {
			v.t.Fatal(err)
		}
		if !bytes.Equal(page, zeros) {
			v.t.Fatalf("the snapshot has what was discarded at %#x after it had been stored", p)
		}
	}
}

// fork has a twin of the machine do something else for a while.
func (v *traveller) fork(rnd *rand.Rand) {
	v.t.Helper()
	id := v.storeAway()
	twin := v.resumed(id)
	v.m = v.resumed(id) // after the twin, so that the guest's device is this machine's
	noise := make([]byte, 64<<10)
	for i := range noise {
		noise[i] = byte(rnd.Uint32())
	}
	for range 20 {
		_, err := twin.VM.Memory().WriteAt(noise, rnd.Int64N(travelMemory-int64(len(noise))))
		_, diskErr := twin.DiskDevice("raw").WriteAt(noise, rnd.Int64N(1<<20-int64(len(noise)))/512*512)
		if err := errors.Join(err, diskErr); err != nil {
			v.t.Fatal(err)
		}
	}
	if err := twin.Discard(); err != nil {
		v.t.Fatal(err)
	}
}

// result is what must be the same in the end.
type result struct {
	memory, raw, blank [sha256.Size]byte
	state              *vmm.State
	report             testvm.Report
}

func (v *traveller) result() *result {
	v.t.Helper()
	r := v.held(v.m, nil)
	// The guest holds in a loop of a few instructions, which counts in RCX, and stops anywhere in it.
	for i := range r.state.VCPUs {
		r := &r.state.VCPUs[i].Regs
		r.RIP, r.RAX, r.RCX, r.RFLAGS = 0, 0, 0, 0
	}
	r.report = v.device.State()[0].Last
	return r
}

// held is the result without the report, as a machine has it; gone are ranges of memory that don't count.
func (v *traveller) held(m *lifecycle.Machine, gone []memory.Range) *result {
	v.t.Helper()
	mem := make([]byte, travelMemory)
	if _, err := m.VM.Memory().ReadAt(mem, 0); err != nil {
		v.t.Fatal(err)
	}
	for _, r := range gone {
		clear(mem[r.GPA:r.End()])
	}
	return &result{
		memory: sha256.Sum256(mem), raw: v.sum(m.DiskDevice("raw")), blank: v.sum(m.DiskDevice("blank")), state: v.state(m),
	}
}

func (v *traveller) sum(disk io.ReaderAt) (sum [sha256.Size]byte) {
	v.t.Helper()
	h := sha256.New()
	if _, err := io.Copy(h, io.NewSectionReader(disk, 0, 1<<20)); err != nil {
		v.t.Fatal(err)
	}
	h.Sum(sum[:0])
	return sum
}

// differs says what of two results is not the same.
func (r *result) differs(o *result) string {
	var out []string
	for what, same := range map[string]bool{
		"memory": r.memory == o.memory, "contents of disk raw": r.raw == o.raw, "contents of disk blank": r.blank == o.blank,
		"report": r.report == o.report, "state": reflect.DeepEqual(r.state, o.state),
	} {
		if !same {
			out = append(out, what)
		}
	}
	return strings.Join(out, ", ")
}

// state is the machine's, but for what goes on while it stands still.
func (v *traveller) state(m *lifecycle.Machine) *vmm.State {
	v.t.Helper()
	s, err := m.VM.State()
	if err != nil {
		v.t.Fatal(err)
	}
	// A snapshot has sections in the order of their names; a device's slot is in its state.
	slices.SortFunc(s.Devices, func(a, b vmm.DeviceState) int { return strings.Compare(a.Name, b.Name) })
	clear(s.VM.Clock)
	for channel := range 3 {
		clear(s.VM.PIT[channel*24+16:][:8]) // when it was loaded
	}
	for i := range s.VCPUs {
		c := &s.VCPUs[i]
		c.TSCDeadline = 0
		clear(c.LAPIC[0x390:0x394]) // its timer's count
		for j, m := range c.MSRs {
			switch m.Index { // the TSC, MPERF and APERF, and counters of Hyper-V
			case 0x10, 0xe7, 0xe8, 0x40000010, 0x40000020:
				c.MSRs[j].Value = 0
			}
		}
	}
	return s
}
