package blockdevtest

import (
	"errors"
	"io"
	"maps"
	"math"
	"math/rand/v2"
	"os"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
)

// ErrCrashed is what operations of a Medium fail with after Crash. A hook that says it for every operation from one on
// has the host crash at that one: what a later Crash leaves is of before.
var ErrCrashed = errors.New("blockdevtest: the host has crashed")

// OpKind is what an operation of a Medium does.
type OpKind string

// The operations.
const (
	OpRead     OpKind = "read"
	OpWrite    OpKind = "write"
	OpPunch    OpKind = "punch hole"
	OpTruncate OpKind = "truncate" // N is the new size
	OpSync     OpKind = "sync"
)

// Op is an operation that a Medium is about to do.
type Op struct {
	Kind   OpKind
	Off, N int64
}

// Part says how much of a write, or of a hole, a failure leaves.
type Part string

// The parts.
const (
	PartNone    Part = "none"
	PartHalf    Part = "half"    // the first half of the bytes
	PartSectors Part = "sectors" // of each sector that the range touches either all of the range's bytes or none
)

// Fault makes an operation fail.
type Fault struct {
	Err  error
	Part Part       // "" is PartNone
	Rand *rand.Rand // for PartSectors
}

// ranges returns what is done of a range.
func (f *Fault) ranges(e extent) []extent {
	switch f.Part {
	case PartHalf:
		return []extent{{e.off, e.off + e.len()/2}}
	case PartSectors:
		var chosen []extent
		for at := e.off; at < e.end; {
			next := min(e.end, (at/sectorBytes+1)*sectorBytes)
			if f.Rand.IntN(2) == 0 {
				chosen = append(chosen, extent{at, next})
			}
			at = next
		}
		return chosen
	default:
		return nil
	}
}

// sectorBytes is what a crash leaves as a whole, as disks do.
const sectorBytes = 512

// A Medium is a file in memory that can fail, and that a host crash can befall. A write reaches the page cache, which
// reads see; only a Sync brings it to the disk, which a crash leaves. Holes and what was never written are zeros. Its
// errors are those of os.File, or what a hook gives.
//
// It is a handle, as an os.File is: Open gives another one of the same file. All methods are safe for concurrent use, and
// operations happen one at a time.
type Medium struct {
	file   *file
	closed atomic.Bool
}

// file is what the handles share.
type file struct {
	mu      sync.Mutex
	hook    func(Op) *Fault
	crashed bool
	now     contents // the page cache
	size    int64
	disk    contents // what was synced
	// changed has what each sector held since the last Sync, by its number, the oldest first; sizes has the size at the
	// last Sync and those since.
	changed map[int64][][]byte
	sizes   []int64
}

// NewMedium returns an empty file.
func NewMedium() *Medium {
	return &Medium{file: &file{now: contents{}, disk: contents{}, changed: map[int64][][]byte{}, sizes: []int64{0}}}
}

// Open returns another handle of the file, as another process has.
func (m *Medium) Open() *Medium { return &Medium{file: m.file} }

// SetHook has every operation from now on, of all handles, ask hook first: what it returns makes the operation fail,
// unless that is nil. It is called for one operation at a time, and must not call the Medium. A nil hook ends it.
func (m *Medium) SetHook(hook func(Op) *Fault) {
	m.file.mu.Lock()
	defer m.file.mu.Unlock()
	m.file.hook = hook
}

// begin returns why an operation fails, or nil.
func (m *Medium) begin(op Op) *Fault {
	switch {
	case m.closed.Load():
		return &Fault{Err: os.ErrClosed}
	case m.file.crashed:
		return &Fault{Err: ErrCrashed}
	case op.Off < 0 || op.N < 0 || op.N > math.MaxInt64-op.Off || op.Kind == OpPunch && op.N == 0:
		return &Fault{Err: syscall.EINVAL}
	case m.file.hook != nil:
		return m.file.hook(op)
	default:
		return nil
	}
}

// ReadAt reads as os.File does: io.EOF if the file ends before p does.
func (m *Medium) ReadAt(p []byte, off int64) (int, error) {
	m.file.mu.Lock()
	defer m.file.mu.Unlock()
	if fault := m.begin(Op{OpRead, off, int64(len(p))}); fault != nil {
		return 0, fault.Err
	}
	n := max(0, min(int64(len(p)), m.file.size-off))
	m.file.now.read(p[:n], off)
	if n < int64(len(p)) {
		return int(n), io.EOF
	}
	return len(p), nil
}

// WriteAt writes p and makes the file longer if need be. The number of bytes that it returns with an error is of those
// from off on; others may have been written too.
func (m *Medium) WriteAt(p []byte, off int64) (int, error) {
	m.file.mu.Lock()
	defer m.file.mu.Unlock()
	whole := extent{off, off + int64(len(p))}
	fault := m.begin(Op{OpWrite, off, whole.len()})
	if fault == nil {
		m.file.write(p, off)
		return len(p), nil
	}
	n := 0
	for _, e := range fault.ranges(whole) {
		m.file.write(p[e.off-off:e.end-off], e.off)
		if fault.Part == PartHalf {
			n = int(e.len())
		}
	}
	return n, fault.Err
}

// PunchHole makes a range zeros; the size stays. As with fallocate, n must be positive.
func (m *Medium) PunchHole(off, n int64) error {
	m.file.mu.Lock()
	defer m.file.mu.Unlock()
	whole := extent{off, off + n}
	fault := m.begin(Op{OpPunch, off, n})
	if fault == nil {
		m.file.punch(whole)
		return nil
	}
	for _, e := range fault.ranges(whole) {
		m.file.punch(e)
	}
	return fault.Err
}

// Truncate sets the size.
func (m *Medium) Truncate(size int64) error {
	m.file.mu.Lock()
	defer m.file.mu.Unlock()
	if fault := m.begin(Op{OpTruncate, 0, size}); fault != nil {
		return fault.Err
	}
	m.file.punch(extent{size, m.file.size})
	m.file.resize(size)
	return nil
}

// Sync brings what was changed to the disk. As Linux does, one that fails forgets that it has to: reads show the changes
// still, but later Syncs bring them to the disk only where their sectors are written once more. Like a sync that takes its
// time, it lets others run before it returns.
func (m *Medium) Sync() error {
	defer func() {
		for range 200 { // enough for others to write something
			runtime.Gosched()
		}
	}()
	m.file.mu.Lock()
	defer m.file.mu.Unlock()
	if fault := m.begin(Op{Kind: OpSync}); fault != nil {
		if !m.closed.Load() && !errors.Is(fault.Err, ErrCrashed) {
			m.file.lose()
		}
		return fault.Err
	}
	m.file.sync()
	return nil
}

// Close ends the handle: calls after it fail with os.ErrClosed. It syncs nothing.
func (m *Medium) Close() error {
	if m.closed.Swap(true) {
		return os.ErrClosed
	}
	return nil
}

// Crash returns the file as a crash of the host now leaves it: as it was at the last Sync that did not fail, but that
// any sector and the size may be what they were at any time since. rng chooses which. Calls of all handles of before
// fail with ErrCrashed from now on; the new file has no hook.
func (m *Medium) Crash(rng *rand.Rand) *Medium {
	f := m.file
	f.mu.Lock()
	defer f.mu.Unlock()
	f.crashed = true
	// Between all and nothing: were it a half every time, large changes would never be there as a whole.
	chance := rng.Float64()
	after := f.disk.clone()
	for _, sector := range slices.Sorted(maps.Keys(f.changed)) {
		held := f.changed[sector]
		if rng.Float64() < chance {
			after.write(held[rng.IntN(len(held))], sector*sectorBytes)
		}
	}
	left := NewMedium()
	left.file.size = f.sizes[rng.IntN(len(f.sizes))]
	left.file.sizes = []int64{left.file.size}
	after.cut(left.file.size)
	left.file.disk, left.file.now = after, after.clone()
	return left
}

func (f *file) sync() {
	for sector, held := range f.changed {
		f.disk.write(held[len(held)-1], sector*sectorBytes)
	}
	clear(f.changed)
	f.sizes = []int64{f.size}
}

// lose forgets what was not synced.
func (f *file) lose() {
	clear(f.changed)
	f.sizes = f.sizes[:1]
}

func (f *file) write(p []byte, off int64) {
	e := extent{off, off + int64(len(p))}
	if e.len() == 0 {
		return
	}
	f.now.write(p, off)
	f.note(e)
	f.resize(max(f.size, e.end))
}

func (f *file) punch(e extent) {
	e.end = min(e.end, f.size)
	if e.len() > 0 {
		f.now.zero(e)
		f.note(e)
	}
}

func (f *file) resize(size int64) {
	if size != f.size {
		f.size = size
		f.sizes = append(f.sizes, size)
	}
}

// note remembers what the sectors of a range, which is not empty, hold now.
func (f *file) note(e extent) {
	first, last := e.off/sectorBytes, (e.end-1)/sectorBytes
	held := make([]byte, (last-first+1)*sectorBytes)
	f.now.read(held, first*sectorBytes)
	for sector := first; sector <= last; sector++ {
		at := (sector - first) * sectorBytes
		f.changed[sector] = append(f.changed[sector], held[at:at+sectorBytes])
	}
}
