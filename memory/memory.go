package memory

import (
	"context"
	"errors"
	"fmt"
	"sync"
)

// Options are the choices for the memory of a machine that boots. The zero
// value is a good choice.
type Options struct {
	// SmallPages keeps the kernel from backing RAM with huge pages. A machine
	// that touches memory sparsely then takes less of the host's, and its first
	// writes cost five times as much (BenchmarkFirstTouch).
	SmallPages bool
}

// Memory is the RAM of one machine. All methods are safe for concurrent use
// with each other and with the running guest.
type Memory struct {
	size   uint64
	ranges []Range
	mm     *mapping
	img    *Image // nil for a machine that booted
	lazy   *lazy  // nil if no page can be missing
	pagers sync.WaitGroup
	stats  stats

	// mu is held for reading while Go code copies to or from the mapping or notes
	// that a page is resident, never while a page is fetched or kept; and for writing
	// by what takes pages away or protects them.
	mu       sync.RWMutex
	closed   bool
	poisoned bitmap // pages that can't be had; not accessible. nil if there are none
	written  bitmap // pages changed since TakeWrites; nil unless TrackWrites is on
	still    *Still // the one that there is

	busy sync.WaitGroup // calls under way; grows under mu, and not once closed

	failMu sync.Mutex
	failed chan struct{}
	err    error
	hook   func(error)
}

// New returns size bytes of anonymous memory, all zero, for a machine that
// boots. Host memory is taken as it is touched; whether the host has that much
// is the caller's question. The error is a *[SizeError], or wraps the system's,
// or [errors.ErrUnsupported] where there is no guest memory at all.
func New(size uint64, opts Options) (*Memory, error) {
	place, err := Reserve(size)
	if err != nil {
		return nil, err
	}
	m := place.memory()
	for _, r := range m.ranges {
		err := m.mm.place(r, nil)
		if err == nil {
			err = m.mm.advise(r, !opts.SmallPages)
		}
		if err != nil {
			return nil, errors.Join(err, m.mm.unmap())
		}
	}
	return m, nil
}

func checkSize(size uint64) error {
	if size == 0 || size%PageSize != 0 || size > MaxSize {
		return &SizeError{Size: size}
	}
	return nil
}

// Size is the amount of RAM in bytes, without the hole.
func (m *Memory) Size() uint64 { return m.size }

// Ranges is where RAM lies: Layout(Size()). The caller owns the slice.
func (m *Memory) Ranges() []Range { return Layout(m.size) }

// HostAddr is the host virtual address of gpa, for KVM's memory slots. Go code
// must not make a pointer of it (see the package comment). It stays valid until
// Close.
func (m *Memory) HostAddr(gpa uint64) uintptr { return m.host(gpa) }

func (m *Memory) host(gpa uint64) uintptr { return m.mm.base() + uintptr(gpa) }

// ReadAt copies len(p) bytes of RAM at guest physical address gpa into p. It
// fetches missing pages first. It copies all or nothing: a range that isn't
// wholly inside RAM is a *[RangeError], and a page that can't be fetched is the
// error of the fetch.
//
// An aligned access of 2, 4 or 8 bytes is a single load, and every call is a full
// memory barrier before and after, so that rings shared with the guest can be
// read and written with these methods.
func (m *Memory) ReadAt(p []byte, gpa int64) (int, error) {
	return m.access("read", false, p, gpa, func(ram []byte) { load(p, ram) })
}

// WriteAt copies p to RAM at guest physical address gpa. The pages become part
// of the dirty set. All that is said of ReadAt holds here too. It may have to wait
// for the reader of a [Still], as the guest's writes may.
func (m *Memory) WriteAt(p []byte, gpa int64) (int, error) {
	return m.access("write", true, p, gpa, func(ram []byte) {
		store(ram, p)
		m.wrote(uint64(gpa), uint64(len(p)))
	})
}

func (m *Memory) access(op string, write bool, p []byte, gpa int64, move func(ram []byte)) (int, error) {
	n := uint64(len(p))
	if gpa < 0 || !inRAM(m.ranges, uint64(gpa), n) {
		return 0, &RangeError{Op: op, GPA: gpa, Len: len(p)}
	}
	m.mu.RLock()
	if m.missing(uint64(gpa), n) {
		m.mu.RUnlock()
		defer m.img.pin(uint64(gpa), n)()
		m.mu.RLock()
	}
	// Again, if what was made resident has been discarded before mu was held, or
	// what was let go protected.
	for !m.closed && (m.missing(uint64(gpa), n) || write && m.guarded(uint64(gpa), n)) {
		m.mu.RUnlock()
		err := m.Resident(context.Background(), uint64(gpa), len(p))
		if err == nil && write {
			err = m.release(uint64(gpa), n)
		}
		if err != nil {
			return 0, err
		}
		m.mu.RLock()
	}
	defer m.mu.RUnlock()
	if m.closed {
		return 0, fmt.Errorf("memory: %s: %w", op, ErrClosed)
	}
	if err := m.checkPoison(uint64(gpa), n); err != nil {
		return 0, err
	}
	move(m.mm.mem[gpa : gpa+int64(n)])
	return len(p), nil
}

// enter begins a call that Close has to wait for, until busy.Done.
func (m *Memory) enter(op string) error {
	m.mu.RLock()
	defer m.mu.RUnlock()
	if m.closed {
		return fmt.Errorf("memory: %s: %w", op, ErrClosed)
	}
	m.busy.Add(1)
	return nil
}

// View returns the n bytes at gpa without copying them: a window into RAM, to be
// read only, while the machine is paused, before Close, and before the next
// Discard, which takes pages from under it. It never fetches:
// pages of a lazy mapping that are neither in the image nor reported by Dirty
// are refused with ErrNotResident, and so are those of an image with a limit that
// Dirty has not reported, as they may go at any time.
func (m *Memory) View(gpa uint64, n int) ([]byte, error) {
	if n < 0 || !inRAM(m.ranges, gpa, uint64(n)) {
		return nil, &RangeError{Op: "view", GPA: int64(gpa), Len: n}
	}
	m.mu.RLock()
	defer m.mu.RUnlock()
	if m.closed {
		return nil, fmt.Errorf("memory: view: %w", ErrClosed)
	}
	if m.missing(gpa, uint64(n)) || m.fleeting(gpa, uint64(n)) {
		return nil, fmt.Errorf("memory: view of %d bytes at GPA %#x: %w", n, gpa, ErrNotResident)
	}
	if err := m.checkPoison(gpa, uint64(n)); err != nil {
		return nil, err
	}
	end := gpa + uint64(n)
	return m.mm.mem[gpa:end:end], nil
}

// Populate fetches everything that is missing, so that nothing of the source is
// needed any more, unless Reclaim takes pages back. With a limit of the image it stops there. Ranges that the source knows to be zero stay as they are:
// they cost the kernel's tables only, and only when they are touched.
func (m *Memory) Populate(ctx context.Context) error {
	if err := m.enter("populate"); err != nil {
		return err
	}
	defer m.busy.Done()
	if m.lazy == nil {
		return nil
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(m.lazy.ctx, cancel)()
	if err := m.img.Populate(ctx); err != nil {
		return m.because(err)
	}
	return nil
}

// Close gives the memory back. Stop the machine first: a thread that is still in
// KVM_RUN gets EFAULT, also one that waits for a page. Close cancels fetches,
// gives a Still up, waits for calls under way, and ends the pager. It is idempotent; later calls
// of other methods return ErrClosed. Views of the memory must not be used any
// more, and KVM must not be told of its addresses again.
func (m *Memory) Close() error {
	m.mu.Lock()
	again := m.closed
	m.closed = true
	s := m.still
	m.mu.Unlock()
	if again {
		return nil
	}
	if m.lazy != nil {
		m.lazy.cancel()
	}
	if s != nil {
		s.giveUp(ErrClosed)
	}
	m.busy.Wait()
	err := m.endPager(s)
	err = errors.Join(err, m.mm.unmap())
	if m.img != nil {
		m.img.leave(m)
		err = errors.Join(err, m.img.release())
	}
	return err
}

// endPager lets go of all who wait for a page, or to write one that s protects.
func (m *Memory) endPager(s *Still) error {
	if m.lazy == nil && s == nil {
		return nil
	}
	var err error
	// Out of reach first, then let go: whoever still waits for a page must
	// find an error there and not a hole of the image, which reads as zero.
	for _, r := range m.ranges {
		err = errors.Join(err, m.mm.deny(r))
	}
	if s != nil {
		err = errors.Join(err, s.hangUp())
	}
	err = errors.Join(err, m.lazy.close())
	m.pagers.Wait()
	return err
}

// shut says whether Close has been called.
func (m *Memory) shut() bool {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return m.closed
}
