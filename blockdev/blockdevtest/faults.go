package blockdevtest

import (
	"errors"
	"fmt"
	"strconv"
	"syscall"
	"testing"

	"github.com/cryovisor/cryovisor/blockdev"
)

// RunFaults tests disks that lie in a file, whose file fails or whose host crashes. newDisk makes a disk of an empty
// file, and open opens what newDisk made in it, with its own t.Cleanup for Close; an error of Close means nothing, since
// the file may have crashed. The disk should be small, as some hundred KiB: hundreds are made.
//
// Until a Flush has returned nil nothing need be left of a disk: open may fail.
func RunFaults(
	t *testing.T,
	newDisk func(t *testing.T, m *Medium) Disk,
	open func(t *testing.T, m *Medium) (blockdev.Device, error),
) {
	faultSuite(t, faultTest{newDisk, open}, report)
}

// faultTest is what RunFaults is given.
type faultTest struct {
	newDisk func(t *testing.T, m *Medium) Disk
	open    func(t *testing.T, m *Medium) (blockdev.Device, error)
}

func faultSuite(t *testing.T, f faultTest, run runner) {
	var trace []OpKind
	run(t, "faults/none", func(t *testing.T) (err error) {
		trace, err = f.sequence(t, 0, noFault)
		if err == nil && len(trace) == 0 {
			err = errors.New("it does not use its file")
		}
		return err
	})
	for _, plan := range plans() {
		run(t, "faults/"+plan.name, func(t *testing.T) error {
			for step, kind := range trace {
				if !plan.fits(kind) {
					continue
				}
				err := scoped(t, strconv.Itoa(step), func(t *testing.T) error {
					_, err := f.sequence(t, step, plan)
					return err
				})
				if err != nil {
					return fmt.Errorf("operation %d of the file, %s, fails: %w", step, kind, err)
				}
			}
			return nil
		})
	}
	crashSuite(t, f, run)
}

// scoped runs a check with a T of its own, so that what it makes is closed when it ends.
func scoped(t *testing.T, name string, check func(t *testing.T) error) (err error) {
	if !t.Run(name, func(t *testing.T) { err = check(t) }) && err == nil {
		err = errors.New("it could not be made")
	}
	return err
}

// plan is a way for operations of a file to fail.
type plan struct {
	name    string
	err     error
	part    Part
	forever bool // every write from then on, instead of one operation
}

var noFault = plan{name: "none"}

func plans() []plan {
	var all []plan
	for _, e := range []struct {
		name string
		err  error
	}{{"no space", syscall.ENOSPC}, {"I/O error", syscall.EIO}} {
		for _, part := range []Part{PartNone, PartHalf, PartSectors} {
			all = append(all, plan{fmt.Sprintf("%s, written: %s", e.name, part), e.err, part, false})
		}
	}
	return append(all, plan{"no space from then on", syscall.ENOSPC, PartSectors, true})
}

// fits says whether operations of a kind can fail in this way, and in no simpler one.
func (p plan) fits(kind OpKind) bool {
	switch {
	case p.forever:
		return kind == OpWrite
	case p.part == PartNone:
		return true
	default:
		return kind == OpWrite || kind == OpPunch
	}
}

// hook returns a hook that makes operations fail from a step on, and records in trace what it is asked.
func (p plan) hook(step int, trace *[]OpKind) func(Op) *Fault {
	rng := seeded(uint64(step), 4)
	return func(op Op) *Fault {
		now := len(*trace)
		*trace = append(*trace, op.Kind)
		if p.err != nil && (now == step || now > step && p.forever && op.Kind == OpWrite) {
			return &Fault{Err: p.err, Part: p.part, Rand: rng}
		}
		return nil
	}
}

// sequenceOfFaults is what is done to each disk: w writes, d discards, z writes zeroes, r reads, f flushes.
const sequenceOfFaults = "wwdrfwzwrwwfrdwzrwdfwwrzwdrwfwrf"

// sequence does the same operations on a new disk each time, with those of the file failing as planned from a step on.
// What it returns is a disk that read as it must not, then or after it was opened again.
func (f faultTest) sequence(t *testing.T, step int, p plan) (trace []OpKind, err error) {
	m := NewMedium()
	d := f.newDisk(t, m)
	w := d.work(6)
	w.limit = 20 << 10
	// Within a few blocks, so that operations meet what others that failed left.
	size := int64(len(d.Content))
	middle := around(size/2, size)
	w.model.own = []extent{{0, min(closeBytes, middle.off)}, middle, {max(middle.end, size-closeBytes), size}}
	w.model.remember()
	w.mayFail = func() bool { return p.err != nil && len(trace) > step }
	m.SetHook(p.hook(step, &trace))
	for i, act := range sequenceOfFaults {
		err := w.do(action(act))
		if err == nil && i%2 == 0 { // not always: reads settle what a failure has left
			err = w.read(w.last.blocks().clip(extent{0, size}))
		}
		if err != nil {
			return trace, fmt.Errorf("step %d: %w", i, err)
		}
	}
	m.SetHook(nil)
	w.model.own = []extent{{0, size}}
	if err := w.check(); err != nil {
		return trace, err
	}
	return trace, f.outlives(t, m, w)
}

// outlives opens the disk again, as another process does and then after a crash, and compares what is there.
func (f faultTest) outlives(t *testing.T, m *Medium, w *worker) error {
	if !w.model.flushed {
		return nil
	}
	for _, leave := range []func() *Medium{m.Open, func() *Medium { return m.Crash(w.rng) }} {
		dev, err := f.open(t, leave())
		if err != nil {
			return fmt.Errorf("open again: %w", err)
		}
		disk, err := readAll(dev, len(w.model.now))
		if err != nil {
			return err
		}
		if err := w.model.reopened(disk); err != nil {
			return err
		}
	}
	return nil
}

func readAll(dev blockdev.Device, size int) ([]byte, error) {
	disk := make([]byte, size)
	n, err := dev.ReadAt(disk, 0)
	if err == nil && (n != size || dev.Size() != int64(size)) {
		err = fmt.Errorf("%d bytes of %d", n, dev.Size())
	}
	if err != nil {
		return nil, fmt.Errorf("read of all %d bytes, opened again: %w", size, err)
	}
	return disk, nil
}
