package lifecycle

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"time"

	"filippo.io/age"

	"github.com/cryovisor/cryovisor/memory"
	"github.com/cryovisor/cryovisor/snapshot"
)

// PauseOptions are the choices of a pause.
type PauseOptions struct {
	// Recipients are who can open the snapshot; at least one.
	Recipients []age.Recipient
	// Full stores all of the memory even if the machine was resumed from a
	// snapshot of the same store, so that the new one depends on no other.
	Full bool
	// Workers is how many goroutines compress and encrypt; 0 lets the snapshot
	// package choose.
	Workers int
	// Progress, if not nil, is told how many bytes of guest memory and of disks, of
	// those that are looked at, are done. It is called from one goroutine at a time.
	Progress func(done, total uint64)
	// Extra, if not nil, is called when the machine stands still, and returns
	// sections to be stored with the snapshot: what the caller's own devices have
	// to remember, say. Their names must not begin with "vmm/", nor be "disks".
	Extra func() ([]snapshot.Section, error)
}

// Paused says what a pause did.
type Paused struct {
	snapshot.Info
	// Parent is the snapshot that this one is a diff of, zero for a full one.
	Parent snapshot.ID
	// CandidateBytes is the guest memory that was looked at: all that the machine
	// ever touched, or for a diff what it wrote since its resume.
	CandidateBytes uint64
	// DiskBytes is what was looked at of the copy-on-write disks.
	DiskBytes uint64
	// Freeze is how long it took to stop the machine and take everything but its
	// memory. Total is the time until the snapshot was durable. In a pause, the
	// machine stands still for all of it.
	Freeze, Total time.Duration
}

// ErrResumed is the error of a Pause that was given up because somebody wanted the machine to run on.
var ErrResumed = errors.New("lifecycle: the machine was resumed while it was being stored")

// attempt is a Pause under way.
type attempt struct {
	ctx    context.Context // of the Pause
	cancel context.CancelCauseFunc
	// released is closed when the Pause does nothing more to the VM. It has set it going again if resumed says so.
	released chan struct{}
	resumed  bool
	err      error // of that
}

// Pause stops the machine and stores it. When it returns without an error the
// snapshot is durable and the machine is paused: Close it, or let it run on with
// Resume. With an error nothing is stored, and the machine runs on if it ran
// before (unless the guest has ended: then the error says how). It runs before Pause
// has cleared away what it wrote.
//
// Pauses wait for each other. Resume, Close or the end of ctx gives one up.
//
// A machine that was resumed from a snapshot is stored as a diff: what it has
// written since. store must then be the store of that snapshot, or opts.Full set.
func (m *Machine) Pause(ctx context.Context, store *snapshot.Store, opts PauseOptions) (Paused, error) {
	m.pausing.Lock()
	defer m.pausing.Unlock()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	a := &attempt{ctx: ctx, cancel: cancel, released: make(chan struct{})}
	m.setAttempt(a)
	defer m.setAttempt(nil)
	p, err := m.pause(ctx, a, store, opts)
	if cause := context.Cause(ctx); err != nil && cause != nil && !errors.Is(err, cause) {
		err = fmt.Errorf("%w: %w", cause, err)
	}
	if err != nil {
		return Paused{}, fmt.Errorf("pause: %w", err)
	}
	return p, nil
}

func (m *Machine) setAttempt(a *attempt) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.attempt = a
}

// Resume lets a machine that stands still run: one that Resume, the function, has made, or that was paused. If a Pause
// is under way, that is given up: it returns ErrResumed and leaves no snapshot. Resume does not wait for it to clear away what it
// wrote. Errors: those of VM.Resume.
func (m *Machine) Resume() error {
	a := m.giveUp(ErrResumed)
	if a == nil {
		return m.VM.Resume()
	}
	<-a.released
	if a.resumed {
		return a.err
	}
	return m.VM.Resume()
}

// giveUp has the Pause under way end with an error, and returns it: nil if there is none.
func (m *Machine) giveUp(because error) *attempt {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.attempt != nil {
		m.attempt.cancel(because)
	}
	return m.attempt
}

func (m *Machine) pause(ctx context.Context, a *attempt, store *snapshot.Store, opts PauseOptions) (Paused, error) {
	s := storing{m: m, began: time.Now(), opts: opts}
	ran := !m.VM.Paused()
	if ran {
		if err := m.VM.Pause(ctx); err != nil {
			a.resumed = ctx.Err() != nil // else it may not have run at all
			close(a.released)
			return Paused{}, err
		}
	}
	s.launches = m.VM.Launches()
	err := s.write(ctx, store)
	if err == nil {
		err = s.commit(ctx)
	}
	if err == nil {
		s.contents.durable()
		close(a.released)
		return s.paused, nil
	}
	if ran {
		a.resumed, a.err = true, m.VM.Resume()
	}
	close(a.released)
	// Whoever waits for that goes first. To free what was written takes long system calls, and the scheduler notices only
	// after 10 to 20 ms that a processor is in one.
	runtime.Gosched()
	return Paused{}, errors.Join(err, a.err, s.clear(store))
}

// storing is a snapshot of a machine that is being written.
type storing struct {
	m        *Machine
	opts     PauseOptions
	began    time.Time
	launches uint64 // of the VM, when it stood still

	writer   *snapshot.Writer // nil until there is one
	contents diskContents
	paused   Paused
}

// write writes the paused machine to a new snapshot, which is not committed.
func (s *storing) write(ctx context.Context, store *snapshot.Store) error {
	m, p := s.m, &s.paused
	sections, err := m.sections(s.opts.Extra)
	if err != nil {
		return err
	}
	parent := m.origin
	if s.opts.Full {
		parent = nil
	}
	if parent != nil {
		p.Parent = parent.Header().ID
	}
	ranges, err := m.candidates(ctx, parent != nil)
	if err != nil {
		return err
	}
	for _, r := range ranges {
		p.CandidateBytes += r.Len
	}
	s.contents = m.diskContents(parent == nil)
	p.DiskBytes = s.contents.bytes
	p.Freeze = time.Since(s.began)
	meter := progress{report: s.opts.Progress, total: p.CandidateBytes + p.DiskBytes}
	s.writer, err = store.Create(ctx, snapshot.Options{
		Recipients: s.opts.Recipients, Parent: parent, Workers: s.opts.Workers, Progress: meter.function(),
	})
	if err != nil {
		return err
	}
	for _, section := range sections {
		if err := s.writer.AddSection(section); err != nil {
			return err
		}
	}
	mem := m.VM.Memory()
	if err := s.writer.WriteMemory(ctx, mem.Size(), ranges, mem.View); err != nil {
		return err
	}
	for _, disk := range s.contents.disks {
		meter.next()
		if err := s.writer.WriteDisk(ctx, disk); err != nil {
			return err
		}
	}
	if m.VM.Launches() != s.launches {
		return ErrResumed // by VM.Resume, and what was read is of no moment
	}
	return nil
}

// commit makes the snapshot durable. It does not wait for that when ctx ends: a sync may take long, and needs nothing of the
// machine.
func (s *storing) commit(ctx context.Context) error {
	var info snapshot.Info
	committed := make(chan error, 1)
	go func() {
		var err error
		info, err = s.writer.Commit(ctx)
		committed <- err
	}()
	select {
	case err := <-committed:
		s.paused.Info, s.paused.Total = info, time.Since(s.began)
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// clear removes what was written of a snapshot that was given up. It may have been committed all the same.
func (s *storing) clear(store *snapshot.Store) error {
	if s.writer == nil {
		return nil
	}
	// Abort waits for Commit, and does nothing after one that succeeded.
	if err := s.writer.Abort(); err != nil {
		return err
	}
	err := store.Delete(context.Background(), s.writer.ID())
	if errors.Is(err, snapshot.ErrNotFound) {
		return nil
	}
	return err
}

// candidates are the ranges of memory that may differ from the parent, or from
// zero if there is none.
func (m *Machine) candidates(ctx context.Context, diff bool) ([]snapshot.Range, error) {
	mem := m.VM.Memory()
	dirty, err := mem.Dirty(ctx)
	if err != nil {
		return nil, err
	}
	var ranges []snapshot.Range
	for _, r := range dirty {
		ranges = append(ranges, snapshot.Range(r))
	}
	if diff || m.origin == nil {
		return ranges, nil
	}
	if err := mem.Populate(ctx); err != nil {
		return nil, err
	}
	for _, r := range mem.Ranges() {
		ranges = append(ranges, stored(m.origin, r)...)
	}
	return merge(ranges), nil
}

// stored are the parts of a range that a snapshot has bytes for; the rest is
// zero.
func stored(r *snapshot.Reader, in memory.Range) (out []snapshot.Range) {
	for gpa := in.GPA; gpa < in.End(); {
		start, length, chunk := r.Lookup(gpa)
		end := min(start+length, in.End())
		if chunk >= 0 {
			out = append(out, snapshot.Range{GPA: gpa, Len: end - gpa})
		}
		gpa = end
	}
	return out
}

// merge orders ranges and joins those that touch or overlap.
func merge(ranges []snapshot.Range) []snapshot.Range {
	slices.SortFunc(ranges, func(a, b snapshot.Range) int { return cmp.Compare(a.GPA, b.GPA) })
	out := ranges[:0]
	for _, r := range ranges {
		if n := len(out); n > 0 && r.GPA <= out[n-1].GPA+out[n-1].Len {
			out[n-1].Len = max(out[n-1].Len, r.GPA+r.Len-out[n-1].GPA)
			continue
		}
		out = append(out, r)
	}
	return out
}

// sections are the machine's state and what the caller adds to it.
func (m *Machine) sections(extra func() ([]snapshot.Section, error)) ([]snapshot.Section, error) {
	state, err := m.VM.State()
	if err != nil {
		return nil, err
	}
	var out []snapshot.Section
	for _, s := range state.Sections() {
		out = append(out, snapshot.Section{Name: s.Name, Version: s.Version, Critical: true, Data: s.Data})
	}
	disks, err := m.diskSection()
	out = append(out, disks...)
	if extra == nil || err != nil {
		return out, err
	}
	more, err := extra()
	return append(out, more...), err
}
