package blockdevtest

import (
	"bytes"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"sync"
	"testing"

	"go.uber.org/goleak"

	"github.com/cryovisor/cryovisor/blockdev"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// bug is what is wrong with a blockDisk.
type bug string

const (
	correct          bug = ""
	unlocked         bug = "read-modify-write without locking"
	roundedDiscard   bug = "discard that leaves partial blocks"
	forgottenZeroes  bug = "write zeroes that does not"
	noSync           bug = "flush that does not sync"
	syncsTwice       bug = "flush that tries a sync again"
	hiddenErrors     bug = "write that says nothing of an error"
	staleCache       bug = "write that is remembered, but failed"
	wideWrite        bug = "write that spoils a neighbour when it fails"
	unchecked        bug = "ranges that are not checked"
	looseEnd         bug = "range of which only the end is checked"
	keepsBuffer      bug = "buffer that is kept"
	writableReadOnly bug = "read-only disk that can be written"
)

// blockDisk is a disk that changes whole blocks of a Medium, or has a bug.
type blockDisk struct {
	bug      bug
	medium   *Medium
	size     int64
	readOnly bool

	mu       sync.RWMutex
	flushErr error
	kept     []byte
	keptAt   int64
}

func (d *blockDisk) Size() int64    { return d.size }
func (d *blockDisk) BlockSize() int { return 512 }
func (d *blockDisk) ReadOnly() bool { return d.readOnly }

func (d *blockDisk) outside(op string, off, n int64) error {
	switch {
	case d.bug == unchecked && off >= 0 && n >= 0:
		return nil
	case d.bug == looseEnd && off >= 0 && n >= 0 && off+n <= d.size:
		return nil
	default:
		return blockdev.CheckRange(op, off, n, d.size)
	}
}

func (d *blockDisk) lock() (unlock func()) {
	if d.bug == unlocked {
		return func() {}
	}
	d.mu.Lock()
	return d.mu.Unlock
}

func (d *blockDisk) ReadAt(p []byte, off int64) (int, error) {
	if err := d.outside("read", off, int64(len(p))); err != nil {
		return 0, err
	}
	if d.bug != unlocked {
		d.mu.RLock()
		defer d.mu.RUnlock()
	}
	n, err := d.medium.ReadAt(p, off)
	if d.bug == keepsBuffer || d.bug == staleCache {
		for i := range d.kept {
			if at := d.keptAt + int64(i) - off; at >= 0 && at < int64(len(p)) {
				p[at] = d.kept[i]
			}
		}
	}
	return n, err
}

func (d *blockDisk) WriteAt(p []byte, off int64) (int, error) {
	if err := d.changes("write", off, int64(len(p))); err != nil {
		return 0, err
	}
	defer d.lock()()
	switch d.bug {
	case keepsBuffer:
		d.kept, d.keptAt = p, off
	case staleCache:
		d.kept, d.keptAt = bytes.Clone(p), off
	default: // right
	}
	if err := d.write(p, off); err != nil && d.bug != hiddenErrors {
		return 0, err
	}
	return len(p), nil
}

func (d *blockDisk) changes(op string, off, n int64) error {
	if d.readOnly && d.bug != writableReadOnly {
		return blockdev.ErrReadOnly
	}
	return d.outside(op, off, n)
}

// forget ends what a bug remembers.
func (d *blockDisk) forget() {
	if d.bug == keepsBuffer || d.bug == staleCache {
		d.kept = nil
	}
}

// write replaces whole blocks.
func (d *blockDisk) write(p []byte, off int64) error {
	first := off &^ (blockBytes - 1)
	last := min((off+int64(len(p))+blockBytes-1)&^(blockBytes-1), d.size)
	blocks := make([]byte, max(0, last-first))
	if _, err := d.medium.ReadAt(blocks, first); err != nil {
		return err
	}
	if d.bug == unlocked {
		runtime.Gosched()
	}
	copy(blocks[off-first:], p)
	_, err := d.medium.WriteAt(blocks, first)
	if err != nil && d.bug == wideWrite {
		_, _ = d.medium.WriteAt(make([]byte, len(blocks)), first)
	}
	return err
}

func (d *blockDisk) Discard(off, n int64) error {
	if err := d.changes("discard", off, n); err != nil {
		return err
	}
	if d.bug == roundedDiscard {
		first, last := (off+blockBytes-1)&^(blockBytes-1), (off+n)&^(blockBytes-1)
		off, n = first, max(0, last-first)
	}
	defer d.lock()()
	d.forget()
	if n == 0 {
		return nil
	}
	return d.medium.PunchHole(off, n)
}

func (d *blockDisk) WriteZeroes(off, n int64) error {
	if err := d.changes("write zeroes to", off, n); err != nil {
		return err
	}
	defer d.lock()()
	d.forget()
	if d.bug == forgottenZeroes {
		return nil
	}
	return d.write(make([]byte, n), off)
}

func (d *blockDisk) Flush() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.bug == noSync {
		return nil
	}
	if d.flushErr == nil || d.bug == syncsTwice {
		d.flushErr = d.medium.Sync()
	}
	return d.flushErr
}

// newBlockDisk makes a disk with contents.
func newBlockDisk(t *testing.T, m *Medium, size int64, b bug) Disk {
	content := randomBytes(seeded(1, uint64(size)), size)
	if _, err := m.WriteAt(content, 0); err != nil {
		t.Fatal(err)
	}
	if err := m.Sync(); err != nil {
		t.Fatal(err)
	}
	reopen := func(*testing.T) blockdev.Device { return &blockDisk{bug: b, medium: m.Open(), size: size} }
	return Disk{Device: reopen(t), Content: content, Reopen: reopen}
}

// run runs everything on blockDisks.
func (b bug) run(t *testing.T, run runner, size int64) {
	suite(t, func(t *testing.T) Disk { return newBlockDisk(t, NewMedium(), size, b) }, run)
}

func (b bug) runReadOnly(t *testing.T, run runner, size int64) {
	readOnlySuite(t, func(t *testing.T) Disk {
		d := newBlockDisk(t, NewMedium(), size, b)
		d.Device.(*blockDisk).readOnly = true
		d.Reopen = nil
		return d
	}, run)
}

func (b bug) runFaults(t *testing.T, run runner, size int64) {
	faultSuite(t, faultTest{
		newDisk: func(t *testing.T, m *Medium) Disk { return newBlockDisk(t, m, size, b) },
		open: func(t *testing.T, m *Medium) (blockdev.Device, error) {
			return &blockDisk{bug: b, medium: m, size: size}, nil
		},
	}, run)
}

func TestCorrectDisk(t *testing.T) {
	for _, size := range []int64{64 << 10, 300<<10 + 512, 3 << 20, 16<<20 + 3*512} {
		t.Run(fmt.Sprint(size), func(t *testing.T) { correct.run(t, report, size) })
	}
	t.Run("read-only", func(t *testing.T) { correct.runReadOnly(t, report, 300<<10+512) })
	t.Run("faults", func(t *testing.T) { correct.runFaults(t, report, 200<<10+512) })
}

// Each bug is found, by the check that is made for it.
func TestBugsAreFound(t *testing.T) {
	for b, c := range map[bug]struct {
		run  func(b bug, t *testing.T, run runner, size int64)
		want string // begins the name of a check that fails
	}{
		unlocked:         {bug.run, "concurrent/"},
		roundedDiscard:   {bug.run, "zeros"},
		forgottenZeroes:  {bug.run, "zeros"},
		unchecked:        {bug.run, "ranges"},
		looseEnd:         {bug.run, "ranges"},
		keepsBuffer:      {bug.run, "sequence/"},
		writableReadOnly: {bug.runReadOnly, "changes"},
		noSync:           {bug.runFaults, "crashes/"},
		syncsTwice:       {bug.runFaults, "faults/I/O error"},
		hiddenErrors:     {bug.runFaults, "faults/no space"},
		staleCache:       {bug.runFaults, "faults/no space"},
		wideWrite:        {bug.runFaults, "faults/no space"},
	} {
		t.Run(string(b), func(t *testing.T) {
			var found error
			c.run(b, t, func(t *testing.T, name string, check func(t *testing.T) error) {
				// The other checks may find it too, but the race detector would, before them.
				if !strings.HasPrefix(name, c.want) && name != "faults/none" {
					return
				}
				if err := scoped(t, name, check); err != nil {
					found = errors.Join(found, fmt.Errorf("%s: %w", name, err))
				}
			}, 200<<10+512)
			if found == nil {
				t.Fatalf("no check of %q has found it", c.want)
			}
			t.Log(found)
		})
	}
}
