package memory

import (
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/cryovisor/cryovisor/internal/pagemap"
	"github.com/cryovisor/cryovisor/internal/uffd"
)

// eventBatch is how many faults are read at once. As many wait only if as many
// threads fault at the same time.
const eventBatch = 16

// defaultHandlers is how many goroutines wait for faults unless somebody asked for
// another number: while one works on what it read, another waits for more.
const defaultHandlers = 2

func (m *Memory) startPager(handlers int) {
	if handlers <= 0 {
		handlers = defaultHandlers
	}
	for range handlers {
		m.pagers.Go(func() { m.handle(m.lazy.fd, &m.pagers) })
	}
}

// handle serves the faults of fd until that is closed, with the help of more
// goroutines of the same group: those that may have to wait must not keep it from
// serving others.
func (m *Memory) handle(fd *uffd.FD, group *sync.WaitGroup) {
	events := make([]uffd.Event, eventBatch)
	for {
		n, err := fd.Read(events)
		if errors.Is(err, uffd.ErrClosed) {
			return
		}
		if err != nil {
			m.lose(fd, fmt.Errorf("memory: pager: %w", err))
			return
		}
		for i := range events[:n] {
			addr, _, ok := events[i].Fault()
			if !ok {
				continue
			}
			gpa := uint64(addr - m.host(0))
			switch {
			case events[i].Protected():
				group.Go(func() { m.held(fd, gpa) })
			case m.resident(gpa/PageSize) || i == n-1:
				m.fault(gpa)
			default:
				group.Go(func() { m.fault(gpa) })
			}
		}
	}
}

// fault serves one fault and lets the thread go on, if need be into an error.
func (m *Memory) fault(gpa uint64) {
	start := time.Now()
	run := Range{GPA: gpa, Len: PageSize}
	early := func(r Range) {
		_ = m.lazy.fd.Wake(m.host(r.GPA), uintptr(r.Len)) // who is not woken here is below
	}
	var err error
	if m.resident(gpa / PageSize) {
		m.stats.wakeOnly.Add(1)
	} else if run, err = m.serve(m.lazy.ctx, gpa, &need{gpa, early}); err != nil {
		m.fail(fmt.Errorf("page fault at GPA %#x: %w", gpa, err))
		run = Range{GPA: gpa, Len: PageSize}
		err = m.poison(run)
	}
	if err == nil {
		err = m.lazy.fd.Wake(m.host(run.GPA), uintptr(run.Len))
	}
	if err != nil && !errors.Is(err, uffd.ErrClosed) {
		m.fail(fmt.Errorf("memory: release the thread that waits at GPA %#x: %w", gpa, err))
	}
	m.stats.fault(time.Since(start))
	if m.img.cameAhead(gpa) {
		m.stats.prefetched.Add(1)
	}
}

// lose fails the memory because the faults of fd can't be read any more: nobody will
// serve who waits for a page, or comes to. So all that is missing is taken out of
// reach, and all that is protected let go.
func (m *Memory) lose(fd *uffd.FD, why error) {
	m.Fail(why)
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return
	}
	if s := m.still; s != nil {
		for _, r := range m.ranges {
			_ = s.disarm(r) // what can be said of it is why
		}
	}
	if m.lazy == nil {
		return
	}
	for _, r := range m.ranges {
		m.withdrawMissing(r)
		_ = fd.Wake(m.host(r.GPA), uintptr(r.Len))
	}
}

// withdrawMissing makes what is missing of r inaccessible, as far as the kernel has
// room for so many mappings. The caller holds mu for writing.
func (m *Memory) withdrawMissing(r Range) {
	pm, err := pagemap.Open()
	if err != nil {
		return
	}
	defer pm.Close()
	private, err := pm.Private(m.host(r.GPA), m.host(r.End()))
	if err != nil {
		return
	}
	m.collect(nil, private) // so that it is resident: what the machine wrote is not lost
	for lo, end := r.GPA/PageSize, r.End()/PageSize; lo < end; {
		hi := lo
		for hi < end && !m.resident(hi) {
			hi++
		}
		if hi > lo {
			_ = m.withdraw(Range{GPA: lo * PageSize, Len: (hi - lo) * PageSize})
		}
		lo = hi + 1
	}
}

// poison takes a page that could not be fetched out of the machine: a system
// call that touches it, KVM_RUN above all, now gets EFAULT instead of waiting
// for ever, or of reading zeros that were never there.
func (m *Memory) poison(page Range) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.resident(page.GPA / PageSize) {
		return nil // somebody else has fetched it in the meantime
	}
	return m.withdraw(page)
}

// withdraw makes pages inaccessible, to Go code too. The caller holds mu for
// writing.
func (m *Memory) withdraw(r Range) error {
	if err := m.mm.deny(r); err != nil {
		return err
	}
	if m.poisoned == nil {
		m.poisoned = newBitmap(span(m.size) / PageSize)
	}
	m.poisoned.set(r.GPA/PageSize, r.End()/PageSize)
	return nil
}

// checkPoison returns the failure if a page of [gpa, gpa+n) is poisoned. The
// caller holds mu.
func (m *Memory) checkPoison(gpa, n uint64) error {
	lo, hi := gpa/PageSize, (gpa+n+PageSize-1)/PageSize
	if m.poisoned != nil && m.poisoned.next(lo, hi, true) < hi {
		return m.Err()
	}
	return nil
}

// Fail has every access to a page that is still missing fail from now on,
// including those that wait for one: fetches under way are cancelled, and
// system calls, KVM_RUN included, get EFAULT. A [Still] is given up, and writes that
// wait for its reader go on. Use it to get the vCPUs of a
// machine out of a fetch that takes too long. err is what Err will say, unless
// the memory has failed before.
func (m *Memory) Fail(err error) {
	m.fail(err)
	if m.lazy != nil {
		m.lazy.cancel()
	}
	if s := m.current(); s != nil {
		s.giveUp(err)
	}
}

// Failed is closed when the memory has failed: a page that the guest touched
// can't be had. The machine can't go on, but nothing is lost: what it wrote is
// intact, and no instruction of it has completed with false contents, if OnFail
// stops the vCPUs and none is run again once Err is not nil.
//
// KVM_RUN then ends in one of three ways. A page fault of the guest gives
// EFAULT. An access that KVM makes for the guest, emulating an instruction, gives
// KVM_EXIT_MMIO with an address in RAM, because that is what KVM takes an address
// without memory for. And a kick gives EINTR where it comes first.
//
// A kick alone is not enough to get a vCPU away from a missing page. It ends the
// wait of a guest's page fault at once (Linux 6.2 and later), but an access that
// KVM makes itself can't be interrupted: with a signal pending, the kernel tries
// it over and over, at full load, until the page is there or Fail is called.
func (m *Memory) Failed() <-chan struct{} { return m.failed }

// Err is why the memory has failed, or nil.
func (m *Memory) Err() error {
	m.failMu.Lock()
	defer m.failMu.Unlock()
	return m.err
}

// OnFail has hook called when the memory fails: once, with the reason, before
// any thread that waits for the missing page is released, or right here if it
// has failed already. It is for stopping the vCPUs (immediate_exit and a signal
// to each), and must not wait for them. There is one hook: the last counts.
func (m *Memory) OnFail(hook func(error)) {
	m.failMu.Lock()
	m.hook = hook
	err := m.err
	m.failMu.Unlock()
	if err != nil {
		hook(err)
	}
}

// fail records the first failure. It returns when the hook has.
func (m *Memory) fail(err error) {
	if m.shut() {
		return // it is Close that ended the fetch
	}
	m.failMu.Lock()
	if m.err != nil {
		m.failMu.Unlock()
		return
	}
	m.err = err
	hook := m.hook
	m.failMu.Unlock()
	if hook != nil {
		hook(err)
	}
	close(m.failed)
}

// because is err, or the reason why a fetch was cancelled if that is what it
// says: the memory has failed, or was closed.
func (m *Memory) because(err error) error {
	switch {
	case !ended(err):
		return err
	case m.shut():
		return fmt.Errorf("memory: fetch: %w", ErrClosed)
	case m.Err() != nil:
		return m.Err()
	}
	return err
}
