package memory

import (
	"errors"
	"fmt"
	"time"

	"github.com/cryovisor/cryovisor/internal/instant"
	"github.com/cryovisor/cryovisor/internal/uffd"
)

// arm write-protects r, all of whose pages are private. The caller holds m.mu for
// writing: no Go code is about to write there, and none can meet the protection
// without knowing of it.
func (s *Still) arm(r Range) error {
	if r.Len == 0 {
		return nil
	}
	s.armed.set(r.GPA/PageSize, r.End()/PageSize)
	if err := s.fd.WriteProtect(s.m.host(r.GPA), uintptr(r.Len), true); err != nil {
		return fmt.Errorf("memory: protect GPA %#x: %w", r.GPA, err)
	}
	return nil
}

// disarm takes the protection off what is armed of r, and lets those go that wait
// there. It takes exact runs, as older kernels want a range that lies in one
// mapping, and a page that could not be had is a mapping by itself. Others may do
// the same at the same time. The caller holds m.mu.
func (s *Still) disarm(r Range) error {
	for lo, end := r.GPA/PageSize, r.End()/PageSize; lo < end; {
		lo = s.armed.next(lo, end, true)
		hi := s.armed.next(lo, end, false)
		if lo == hi {
			break
		}
		if err := s.fd.WriteProtect(s.m.host(lo*PageSize), uintptr((hi-lo)*PageSize), false); err != nil {
			return fmt.Errorf("memory: let GPA %#x be written: %w", lo*PageSize, err)
		}
		s.armed.clear(lo, hi) // last: who sees it clear writes
		lo = hi
	}
	return nil
}

// guarded says whether a write to any of the n bytes at gpa would have to wait. Go
// code must not wait like that (see the package comment). The caller holds mu.
func (m *Memory) guarded(gpa, n uint64) bool {
	if m.still == nil {
		return false
	}
	lo, hi := gpa/PageSize, (gpa+n+PageSize-1)/PageSize
	return m.still.armed.next(lo, hi, true) < hi
}

// release lets the n bytes at gpa be written, and with them the pieces of 256 KiB
// that they are in: the Still has what it needs of them first. It may have to wait for
// the Still's reader, so the caller must not hold mu.
func (m *Memory) release(gpa, n uint64) error {
	if err := m.enter("write"); err != nil {
		return err
	}
	defer m.busy.Done()
	lo := gpa &^ (instant.UnitSize - 1)
	hi := (gpa + n + instant.UnitSize - 1) &^ (instant.UnitSize - 1)
	var kept *instant.Instant
	m.mu.RLock()
	defer m.mu.RUnlock()
	for m.guarded(gpa, n) {
		moment := m.still.moment.Load()
		if moment == nil || moment == kept {
			return m.still.disarm(Range{GPA: lo, Len: hi - lo})
		}
		m.mu.RUnlock()
		moment.Keep(int64(lo), int64(hi-lo))
		kept = moment
		m.mu.RLock() // and look again: what was kept may be that of another Still
	}
	return nil
}

// held serves a write that waits for a protected page.
func (m *Memory) held(fd *uffd.FD, gpa uint64) {
	s := m.current()
	if s != nil {
		s.waiting.Add(1)
		defer s.served(time.Now())
	}
	err := m.release(gpa, PageSize)
	if err != nil && !errors.Is(err, ErrClosed) {
		err = m.refuse(s, gpa, err)
	}
	// Somebody else may have let the page go before this thread began to wait. When
	// the memory is closed, the end of fd lets it go, into an error.
	if err == nil {
		err = fd.Wake(m.host(gpa), PageSize)
	}
	if err != nil && !errors.Is(err, ErrClosed) && !errors.Is(err, uffd.ErrClosed) {
		m.fail(fmt.Errorf("memory: release the thread that waits to write GPA %#x: %w", gpa, err))
	}
}

// served counts a write that was held since start.
func (s *Still) served(start time.Time) {
	s.stats.fault(time.Since(start))
	s.waiting.Add(-1)
}

// refuse fails the memory for a write that could not be let go, and takes the page
// out of reach, so that whoever waits gets an error. Nobody may be reading it.
func (m *Memory) refuse(s *Still, gpa uint64, why error) error {
	m.fail(fmt.Errorf("write to GPA %#x: %w", gpa, why))
	if s != nil {
		s.giveUp(why)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.withdraw(Range{GPA: gpa, Len: PageSize})
}

// current is the Still that there is, or nil.
func (m *Memory) current() *Still {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return m.still
}
