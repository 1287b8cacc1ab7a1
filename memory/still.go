package memory

import (
	"context"
	"errors"
	"fmt"
	"math"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cryovisor/cryovisor/internal/instant"
	"github.com/cryovisor/cryovisor/internal/pagemap"
	"github.com/cryovisor/cryovisor/internal/uffd"
)

// protectStep is how much memory is protected, or let go, between two looks at
// the context. Accesses from Go code wait that long, a fraction of a millisecond.
const protectStep = 16 << 20

// A Still is what pages of a Memory held at one moment, while the machine runs
// on. The pages are write-protected: a write has to wait until what the page held
// has been copied, and its neighbours with it, 256 KiB in all; once they have been
// read it need not even wait for that. Copies that nobody has read yet take 16 MiB at
// most: who writes faster than the Still is read waits for its reader.
//
// There is one Still at a time. Its methods may be called from any number of
// goroutines.
type Still struct {
	m      *Memory
	fd     *uffd.FD
	pagers sync.WaitGroup // of fd, if it is not the pager's

	// armed is the pages that are write-protected: exactly these. Bits are set, with
	// the protection, while m.mu is held for writing, and cleared when the protection
	// is off, while it is held for reading. So who holds m.mu knows that a page whose
	// bit is clear can be written without waiting.
	armed bitmap

	moment  atomic.Pointer[instant.Instant] // set by Freeze, with m.mu held for writing
	buffers int                             // of moment; 0 is the default

	mu  sync.RWMutex // held for reading while a page of the moment is read
	err error        // why the Still is of no use any more

	once   sync.Once
	closed error // what Close returned

	stats   stats
	waiting atomic.Int64
	copied  atomic.Uint64
}

// StillStats are counts since the Still was made.
type StillStats struct {
	Waiting  int64         // writes of the machine that wait now, reported and not yet let go
	Held     uint64        // those that had to wait and were let go
	HeldTime time.Duration // how long it took to let all of them go
	Slowest  time.Duration // and the slowest
	Copies   uint64        // pieces of 256 KiB that were copied because a write was to come
}

// Protect begins a Still. It write-protects those of the expected pages that are
// private (see Dirty) while the machine runs, so that Freeze has less to do; a
// page that the machine writes until then is let go at once, with its neighbours,
// and is Freeze's to protect again. expected is ascending; it may be empty.
//
// The error matches [ErrNoWriteProtect], [ErrNotPermitted] or [ErrKernel] where a
// Still is not to be had, [ErrFrozen] if there is one already, ctx's, or is the
// system's.
func (m *Memory) Protect(ctx context.Context, expected []Range) (*Still, error) {
	if err := m.enter("protect"); err != nil {
		return nil, err
	}
	defer m.busy.Done()
	s, err := m.newStill()
	if err != nil {
		return nil, err
	}
	if err = s.listen(); err == nil {
		err = s.protect(ctx, expected)
	}
	if err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

// newStill makes the Still of m that there can be.
func (m *Memory) newStill() (*Still, error) {
	s := &Still{m: m, armed: newBitmap(span(m.size) / PageSize)}
	var err error
	if m.lazy != nil {
		s.fd = m.lazy.fd
	} else if s.fd, err = uffd.Open(); err != nil {
		return nil, err
	}
	if err = s.fd.CanWriteProtect(); err == nil {
		err = m.claim(s)
	}
	if err != nil {
		return nil, errors.Join(err, s.hangUp())
	}
	return s, nil
}

func (m *Memory) claim(s *Still) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case m.closed:
		return fmt.Errorf("memory: protect: %w", ErrClosed)
	case m.still != nil:
		return fmt.Errorf("memory: protect: %w", ErrFrozen)
	}
	m.still = s
	return nil
}

// listen has writes to protected pages reported. Memory that may miss pages has a
// descriptor and handlers; it can't be taken back there, as missing pages would go
// unreported meanwhile.
func (s *Still) listen() error {
	m := s.m
	mode := uint64(uffd.ModeWriteProtect)
	if m.lazy != nil {
		mode |= uffd.ModeMissing
	}
	for _, r := range m.ranges {
		if err := s.fd.Register(m.host(r.GPA), uintptr(r.Len), mode); err != nil {
			return fmt.Errorf("memory: protect: %w", err)
		}
	}
	if m.lazy == nil {
		for range defaultHandlers {
			s.pagers.Go(func() { m.handle(s.fd, &s.pagers) })
		}
	}
	return nil
}

// hangUp undoes listen, where that can be done.
func (s *Still) hangUp() error {
	if s.m.lazy != nil {
		return nil
	}
	err := s.fd.Close()
	s.pagers.Wait()
	return err
}

// protect protects what is private of expected.
func (s *Still) protect(ctx context.Context, expected []Range) (err error) {
	pm, err := pagemap.Open()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, pm.Close()) }()
	return s.m.steps(func(step Range) error {
		if err := ctx.Err(); err != nil {
			return err
		}
		if part := overlap(expected, []Range{step}); len(part) > 0 {
			return s.protectPart(pm, step, part)
		}
		return nil
	})
}

// steps calls f for all of RAM, a step at a time.
func (m *Memory) steps(f func(Range) error) error {
	return inSteps(m.ranges, protectStep, f)
}

// protectPart looks again at what is private: the protection of a page that has
// been discarded would be lost, or be on nothing, and armed would not be true.
func (s *Still) protectPart(pm *pagemap.Map, step Range, part []Range) error {
	m := s.m
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := s.usable(); err != nil {
		return err
	}
	regions, err := pm.Private(m.host(step.GPA), m.host(step.End()))
	if err != nil {
		return err
	}
	for _, r := range overlap(m.collect(nil, regions), part) {
		if err := s.arm(r); err != nil {
			return err
		}
	}
	return nil
}

// usable says why nothing can be protected any more, or nil. The caller holds m.mu.
func (s *Still) usable() error {
	if s.m.closed {
		return fmt.Errorf("memory: still: %w", ErrClosed)
	}
	if err := s.over(); err != nil {
		return fmt.Errorf("memory: still: %w", err)
	}
	return nil
}

// Freeze is the moment: from here on the Still has what the pages of ranges hold
// now. Nobody may be writing to memory until it returns: the vCPUs are paused, the
// devices quiesced. ranges is ascending, and all in it is private: what Dirty has
// reported and nobody has discarded since, or a part of that.
//
// wanted, if not nil, is told of ranges that had better be read soon: a writer had to have them
// copied, and others may have to wait until they are read. They may have been read
// meanwhile, and not all of their pages need be in the Still. It is called from several goroutines, and
// must not wait for anything.
//
// What Protect has protected and nobody has written since costs next to nothing
// here; all else a system call for each run of pages. After an error but
// [ErrFrozen], for a second Freeze, or [RangeError], the Still is of no use: close
// it.
func (s *Still) Freeze(ranges []Range, wanted func(Range)) error {
	m := s.m
	if err := m.enter("freeze"); err != nil {
		return err
	}
	defer m.busy.Done()
	blocks, err := m.blocks(ranges)
	if err != nil {
		return err
	}
	moment := instant.New(instant.Config{
		Size: int64(span(m.size)), Blocks: blocks, Read: s.read, Buffers: s.buffers,
		Wanted: func(off, n int64) {
			s.copied.Add(1)
			if wanted != nil {
				lo, hi := clip(m.ranges, uint64(off), uint64(off), uint64(n))
				wanted(Range{GPA: lo, Len: hi - lo})
			}
		},
	})
	m.mu.Lock()
	defer m.mu.Unlock()
	if s.moment.Load() != nil {
		return fmt.Errorf("memory: freeze: %w", ErrFrozen)
	}
	if err := s.freeze(ranges); err != nil {
		s.giveUp(err)
		return err
	}
	s.moment.Store(moment)
	// Who gave the Still up before that has not seen the moment.
	if err := s.usable(); err != nil {
		moment.Close()
		return err
	}
	return nil
}

// blocks checks ranges.
func (m *Memory) blocks(ranges []Range) ([]instant.Extent, error) {
	blocks := make([]instant.Extent, len(ranges))
	end := uint64(0)
	for i, r := range ranges {
		if r.GPA%PageSize != 0 || r.Len%PageSize != 0 || r.GPA < end || !inRAM(m.ranges, r.GPA, r.Len) {
			return nil, &RangeError{Op: "freeze", GPA: int64(r.GPA), Len: int(min(r.Len, math.MaxInt))}
		}
		blocks[i], end = instant.Extent{Off: int64(r.GPA), Len: int64(r.Len)}, r.End()
	}
	return blocks, nil
}

// freeze protects what of ranges is not. The caller holds m.mu for writing.
func (s *Still) freeze(ranges []Range) error {
	if err := s.usable(); err != nil {
		return err
	}
	for _, r := range ranges {
		if s.m.missing(r.GPA, r.Len) {
			return fmt.Errorf("memory: freeze %d bytes at GPA %#x: %w", r.Len, r.GPA, ErrNotResident)
		}
		for lo, end := r.GPA/PageSize, r.End()/PageSize; lo < end; {
			lo = s.armed.next(lo, end, false)
			hi := s.armed.next(lo, end, true)
			if err := s.arm(Range{GPA: lo * PageSize, Len: (hi - lo) * PageSize}); err != nil {
				return err
			}
			lo = hi
		}
	}
	return nil
}

// ReadAt reads pages of the Still: whole ones, each once, in any order. Errors: a
// *[RangeError]; [ErrNotHeld] for pages that are not in it, or have been read; and
// why the Still is of no use any more, [ErrStillClosed] above all.
func (s *Still) ReadAt(p []byte, gpa int64) (int, error) {
	n := uint64(len(p))
	if gpa < 0 || !inRAM(s.m.ranges, uint64(gpa), n) {
		return 0, &RangeError{Op: "read", GPA: gpa, Len: len(p)}
	}
	err := ErrNotHeld
	if moment := s.moment.Load(); moment != nil && uint64(gpa)%PageSize == 0 && n%PageSize == 0 {
		_, err = moment.ReadAt(p, gpa)
	}
	if over := s.over(); err != nil && over != nil {
		err = over
	} else if errors.Is(err, instant.ErrNotHeld) {
		err = ErrNotHeld
	}
	if err != nil {
		return 0, fmt.Errorf("memory: still: read %d bytes at GPA %#x: %w", n, gpa, err)
	}
	return len(p), nil
}

// read is how the moment reads memory. A page that is pending there is private,
// and stays until it is kept: touching it waits for nobody.
func (s *Still) read(p []byte, off int64) error {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.err == nil {
		copy(p, s.m.mm.mem[off:])
	}
	return s.err
}

// Stats returns the counts so far.
func (s *Still) Stats() StillStats {
	return StillStats{
		Waiting:  s.waiting.Load(),
		Held:     s.stats.faults.Load(),
		HeldTime: time.Duration(s.stats.total.Load()),
		Slowest:  time.Duration(s.stats.slowest.Load()),
		Copies:   s.copied.Load(),
	}
}

// Close ends the Still, whether it has been read or not: writers that wait go on,
// and no page is protected any more. It is idempotent.
func (s *Still) Close() error {
	s.once.Do(func() { s.closed = s.close() })
	return s.closed
}

func (s *Still) close() error {
	s.giveUp(ErrStillClosed)
	m := s.m
	if m.enter("close a still") != nil {
		return nil // the memory's own Close sees to it
	}
	defer m.busy.Done()
	err := m.steps(func(step Range) error {
		m.mu.RLock()
		defer m.mu.RUnlock()
		return s.disarm(step)
	})
	if err != nil {
		m.fail(err) // and the Still remains m's, so that WriteAt knows of the pages
		return err
	}
	m.mu.Lock()
	m.still = nil
	m.mu.Unlock()
	return s.hangUp()
}

// giveUp makes the Still useless: when it returns, nobody reads memory for it, or
// waits for that. err is what its methods will say, unless it was given up before.
func (s *Still) giveUp(err error) {
	s.mu.Lock()
	if s.err == nil {
		s.err = err
	}
	s.mu.Unlock()
	if moment := s.moment.Load(); moment != nil {
		moment.Close()
	}
}

// over is why the Still is of no use any more, or nil.
func (s *Still) over() error {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.err
}

// overlap returns what is in both a and b, which are ascending.
func overlap(a, b []Range) []Range {
	var both []Range
	for len(a) > 0 && len(b) > 0 {
		lo, hi := max(a[0].GPA, b[0].GPA), min(a[0].End(), b[0].End())
		if lo < hi {
			both = append(both, Range{GPA: lo, Len: hi - lo})
		}
		if a[0].End() < b[0].End() {
			a = a[1:]
		} else {
			b = b[1:]
		}
	}
	return both
}
