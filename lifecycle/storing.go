package lifecycle

import (
	"context"
	"errors"

	"github.com/cryovisor/cryovisor/memory"
	"github.com/cryovisor/cryovisor/snapshot"
)

// storing is a snapshot of a machine that is being written.
type storing struct {
	m      *Machine
	store  *snapshot.Store
	opts   PauseOptions
	parent *snapshot.Reader // nil for a full snapshot
	writer *snapshot.Writer
	// since is what has changed since the last time that something was written; nil if nothing was.
	since *epoch

	shared     bool     // some of the contents is the image's, which may drop it: it is to be copied, not viewed
	diskWrites []uint64 // Overlay.Writes of each disk, when the machine stood still
	paused     Paused
}

// newStoring begins a snapshot. clear or a successful commit ends it.
func (m *Machine) newStoring(ctx context.Context, store *snapshot.Store, opts PauseOptions) (*storing, error) {
	s := &storing{m: m, store: store, opts: opts}
	if !opts.Full {
		s.parent = m.base
	}
	if s.parent != nil {
		s.paused.Parent = s.parent.Header().ID
	}
	// Before the machine stands still: a hint need not be of that moment.
	hints, err := m.workingSetSections(ctx)
	if err != nil {
		return nil, err
	}
	s.writer, err = store.Create(ctx, snapshot.Options{
		Recipients: opts.Recipients, Parent: s.parent, Workers: opts.Workers, Progress: opts.Progress,
	})
	if err != nil {
		return nil, err
	}
	for _, section := range hints {
		if err := s.writer.AddSection(section); err != nil {
			return nil, errors.Join(err, s.writer.Abort())
		}
	}
	return s, nil
}

// changes are what has to be written: since the last time, or since the parent. nil means everything that may be different from
// the parent, where nobody has kept a record.
func (s *storing) changes() (*changes, error) {
	switch {
	case s.since != nil:
		return s.m.ledger.take(s.since)
	case s.parent != nil && s.m.baseEpoch != nil:
		return s.m.ledger.read(s.m.baseEpoch)
	}
	return nil, nil
}

// stop takes the state of a machine that stands still, and says what is to be written of its memory and its disks, whose
// contents the caller sees to.
func (s *storing) stop(ctx context.Context) (snapshot.Contents, error) {
	sections, err := s.m.sections(s.opts.Extra)
	if err != nil {
		return snapshot.Contents{}, err
	}
	for _, section := range sections {
		if err := s.writer.AddSection(section); err != nil {
			return snapshot.Contents{}, err
		}
	}
	s.diskWrites = nil
	for _, d := range s.m.disks {
		s.diskWrites = append(s.diskWrites, d.overlay.Writes())
	}
	contents, err := s.contents(ctx)
	if err != nil {
		return snapshot.Contents{}, err
	}
	s.paused.CandidateBytes = size(contents.Memory.Data)
	for _, d := range contents.Disks {
		s.paused.DiskBytes += size(d.Data)
	}
	return contents, nil
}

// contents are what is to be written, as it is in the machine now.
func (s *storing) contents(ctx context.Context) (snapshot.Contents, error) {
	s.shared = false
	changed, err := s.changes()
	if err != nil {
		return snapshot.Contents{}, err
	}
	mem := s.m.VM.Memory()
	// After the changes: what they have of pages that are not private any more has been discarded.
	private, err := mem.Dirty(ctx)
	if err != nil {
		return snapshot.Contents{}, err
	}
	ram := &snapshot.Memory{Size: mem.Size(), ReadAt: mem.ReadAt, Data: memoryRanges(private)}
	if changed != nil {
		ram.Data, ram.Zeros = split(changed.memory, ram.Data)
	} else if s.parent == nil && s.m.origin != nil {
		s.shared = true
		if ram.Data, err = s.everything(ctx, ram.Data); err != nil {
			return snapshot.Contents{}, err
		}
	}
	return snapshot.Contents{Memory: ram, Disks: s.disks(changed)}, nil
}

// everything is the memory that differs from zero in a machine that was resumed: what it has written, and what its snapshot has.
func (s *storing) everything(ctx context.Context, written []snapshot.Range) ([]snapshot.Range, error) {
	mem := s.m.VM.Memory()
	if err := mem.Populate(ctx); err != nil {
		return nil, err
	}
	for _, r := range mem.Ranges() {
		written = append(written, stored(s.m.origin, r)...)
	}
	return merge(written), nil
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

// disks are what is to be written of the disks.
func (s *storing) disks(changed *changes) (out []snapshot.Disk) {
	for i, d := range s.m.disks {
		changedData, changedZeros := d.overlay.Changes()
		data, zeros := diskRanges(changedData), diskRanges(changedZeros)
		if changed != nil {
			data, _ = split(changed.disks[i], data)
			zeros, _ = split(changed.disks[i], zeros)
		} else if s.parent == nil && s.m.origin != nil {
			_, held := split(s.m.origin.Disk(i).Held(), zeros)
			data = merge(append(data, held...))
		}
		out = append(out, snapshot.Disk{
			Index: i, Size: uint64(d.info.Size), Layered: d.base != nil, ReadAt: d.overlay.ReadAt, Data: data, Zeros: zeros,
		})
	}
	return out
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
		if err != nil {
			return err
		}
	case <-ctx.Done():
		return ctx.Err()
	}
	s.paused.Info = info
	for i, d := range s.m.disks {
		d.durable, d.writes = true, s.diskWrites[i]
	}
	return nil
}

// clear removes what was written of a snapshot that was given up. It may have been committed all the same.
func (s *storing) clear() error {
	// Abort waits for Commit, and does nothing after one that succeeded.
	s.m.ledger.end(s.since)
	if err := s.writer.Abort(); err != nil {
		return err
	}
	err := s.store.Delete(context.Background(), s.writer.ID())
	if errors.Is(err, snapshot.ErrNotFound) {
		return nil
	}
	return err
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
