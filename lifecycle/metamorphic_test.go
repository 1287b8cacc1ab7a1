//go:build linux && amd64

package lifecycle_test

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
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
}

func ways() (out []way) {
	for _, full := range []bool{true, false} {
		for _, eager := range []bool{true, false} {
			for _, codec := range []snapshot.Codec{snapshot.CodecLZ4, snapshot.CodecStored} {
				for _, workers := range []int{1, 3} {
					out = append(out, way{full, eager, codec, workers})
				}
			}
		}
	}
	return out
}

// traveller is a machine that goes one way. What is done to it is the same for all.
type traveller struct {
	*guest
	way
	t     *testing.T
	m     *lifecycle.Machine
	steps uint64 // that the guest may make
	// gone are the ranges that were discarded, and have not been written since: they read as anything.
	gone []memory.Range
	path []string // what was done, for messages
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
		for i, w := range ways() {
			if testing.Short() && i%5 != 0 { // each choice in some
				continue
			}
			t.Run(fmt.Sprintf("seed=%d,full=%v,eager=%v,%v,workers=%d", seed+n, w.full, w.eager, w.codec, w.workers), func(t *testing.T) {
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
}

// storeAway stores the machine, and ends it.
func (v *traveller) storeAway() snapshot.ID {
	v.t.Helper()
	p, err := v.m.Pause(v.t.Context(), v.store, lifecycle.PauseOptions{
		Recipients: []age.Recipient{v.key.Recipient()}, Full: v.full, Workers: v.workers,
	})
	if err != nil {
		v.t.Fatal(err)
	}
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
	before, gone := v.contents(), len(v.gone) > 0
	before.state = v.state()
	v.m = v.resumed(v.storeAway())
	after := v.contents()
	after.state = v.state()
	if gone { // of what was discarded the guest expects nothing
		after.memory = before.memory
	}
	if what := before.differs(after); what != "" {
		v.t.Fatalf("other %s after the resume than before the pause", what)
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
	s := v.state()
	// The guest holds in a loop of a few instructions, which counts in RCX, and stops anywhere in it.
	for i := range s.VCPUs {
		r := &s.VCPUs[i].Regs
		r.RIP, r.RAX, r.RCX, r.RFLAGS = 0, 0, 0, 0
	}
	r := v.contents()
	r.state = s
	return r
}

// contents are a result but for the state.
func (v *traveller) contents() *result {
	v.t.Helper()
	return &result{
		memory: v.sum(v.m.VM.Memory(), travelMemory), raw: v.sum(v.m.DiskDevice("raw"), 1<<20),
		blank: v.sum(v.m.DiskDevice("blank"), 1<<20), report: v.device.State()[0].Last,
	}
}

func (v *traveller) sum(r io.ReaderAt, size int64) (sum [sha256.Size]byte) {
	v.t.Helper()
	h := sha256.New()
	if _, err := io.Copy(h, io.NewSectionReader(r, 0, size)); err != nil {
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
func (v *traveller) state() *vmm.State {
	v.t.Helper()
	s, err := v.m.VM.State()
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
