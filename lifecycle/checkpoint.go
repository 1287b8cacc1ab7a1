package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/cryovisor/cryovisor/blockdev"
	"github.com/cryovisor/cryovisor/memory"
	"github.com/cryovisor/cryovisor/snapshot"
	"github.com/cryovisor/cryovisor/vmm"
)

// Checkpoint stores the machine as it is at one moment, and lets it run on. It stands still (Paused.Freeze) only until its state is
// taken and its memory protected; what it writes afterwards waits until the old contents have been copied. When Checkpoint
// returns without an error the snapshot is durable. With an error nothing is stored. Either way the machine runs, if it did before.
//
// The next snapshot of the machine, checkpoint or pause, is a diff of this one: from the first checkpoint on the
// machine notes which pages it writes, which costs it something. So this snapshot must stay until there is the next.
//
// opts.Full is refused: Store.Flatten makes a snapshot that needs no other. Errors, besides those of Pause: memory.ErrNoWriteProtect
// and memory.ErrNotPermitted where userfaultfd can't protect memory.
func (m *Machine) Checkpoint(ctx context.Context, store *snapshot.Store, opts PauseOptions) (Paused, error) {
	p, err := m.try(ctx, true, func(ctx context.Context, _ *attempt) (Paused, error) {
		if opts.Full {
			return Paused{}, fmt.Errorf("%w: a checkpoint can't be made full; flatten it afterwards", vmm.ErrConfig)
		}
		return m.checkpoint(ctx, store, opts)
	})
	if err != nil {
		return Paused{}, fmt.Errorf("checkpoint: %w", err)
	}
	return p, nil
}

func (m *Machine) checkpoint(ctx context.Context, store *snapshot.Store, opts PauseOptions) (Paused, error) {
	began := time.Now()
	s, err := m.newStoring(ctx, store, opts)
	if err != nil {
		return Paused{}, err
	}
	// For the next one: it begins anew when this machine stands still.
	next, err := m.ledger.begin()
	if err != nil {
		return Paused{}, errors.Join(err, s.clear())
	}
	if err = s.storeMoment(ctx, next); err == nil {
		err = s.commit(ctx)
	}
	if err != nil {
		m.ledger.end(next)
		return Paused{}, errors.Join(err, s.clear())
	}
	s.paused.Total = time.Since(began)
	m.rebase(s.writer, next)
	return s.paused, nil
}

// rebase makes what a Writer has committed the base of the next snapshot. If that can't be, the base stays what it was, which costs
// room and is no reason to fail: the checkpoint is durable.
func (m *Machine) rebase(w *snapshot.Writer, since *epoch) {
	r, err := w.Reader()
	if err != nil {
		m.ledger.end(since)
		return
	}
	if m.base != nil && m.base != m.origin {
		_ = m.base.Close() // it has opened no file: nobody reads from it
	}
	old := m.baseEpoch
	m.base, m.baseEpoch = r, since
	m.ledger.end(old)
}

// storeMoment writes the machine as it is at one moment, at which next begins.
func (s *storing) storeMoment(ctx context.Context, next *epoch) error {
	moment, err := s.protect(ctx)
	if err != nil {
		return err
	}
	contents, err := moment.take(ctx, next)
	if err == nil {
		err = s.writer.Write(ctx, contents)
	}
	return errors.Join(err, moment.close())
}

// moment is a machine's memory and disks as they are, or will be, at one moment.
type moment struct {
	s      *storing
	memory *memory.Still
	disks  []*blockdev.Still
	// wanted is what the guest has changed and what is to be written soon, as it takes room.
	wanted chan snapshot.Range
}

// wantedHints is how many wishes may wait. More are no loss: they are hints, and what is wanted is written in its turn.
const wantedHints = 256

// protect protects, while the machine runs, what would be written if the moment were now: that takes longer than the machine may
// stand still.
func (s *storing) protect(ctx context.Context) (*moment, error) {
	contents, err := s.contents(ctx)
	if err != nil {
		return nil, err
	}
	still, err := s.m.VM.Memory().Protect(ctx, guestRanges(contents.Memory.Data))
	if err != nil {
		return nil, err
	}
	return &moment{s: s, memory: still, wanted: make(chan snapshot.Range, wantedHints)}, nil
}

// take stops the machine for the moment, and says what is to be written.
func (m *moment) take(ctx context.Context, next *epoch) (snapshot.Contents, error) {
	vm := m.s.m.VM
	began := time.Now()
	ran := !vm.Paused()
	if ran {
		if err := vm.Pause(ctx); err != nil {
			return snapshot.Contents{}, err
		}
	}
	launches := vm.Launches()
	contents, err := m.freeze(ctx, next)
	if vm.Launches() != launches {
		return contents, errors.Join(err, ErrResumed) // by VM.Resume: what was taken is of no moment
	}
	if ran {
		err = errors.Join(err, vm.Resume())
	}
	m.s.paused.Freeze = time.Since(began)
	return contents, err
}

// freeze takes the state of the machine, which stands still, and has the contents of the moment kept.
func (m *moment) freeze(ctx context.Context, next *epoch) (snapshot.Contents, error) {
	contents, err := m.s.stop(ctx)
	if err != nil {
		return contents, err
	}
	if _, err := m.s.m.ledger.take(next); err != nil {
		return contents, err
	}
	contents.Wanted = m.wanted
	err = m.memory.Freeze(guestRanges(contents.Memory.Data), func(r memory.Range) { m.want(snapshot.Range(r)) })
	if err != nil {
		return contents, err
	}
	contents.Memory.ReadAt = m.memory.ReadAt
	for i := range contents.Disks {
		if err := m.freezeDisk(&contents.Disks[i]); err != nil {
			return contents, err
		}
	}
	return contents, nil
}

func (m *moment) freezeDisk(d *snapshot.Disk) error {
	base := snapshot.DiskAddress(d.Index)
	still, err := m.s.m.disks[d.Index].overlay.Freeze(diskExtents(d.Data), func(e blockdev.Extent) {
		m.want(snapshot.Range{GPA: base + uint64(e.Off), Len: uint64(e.Len)})
	})
	if err != nil {
		return err
	}
	m.disks = append(m.disks, still)
	d.ReadAt = still.ReadAt
	return nil
}

func (m *moment) want(r snapshot.Range) {
	select {
	case m.wanted <- r:
	default:
	}
}

// close lets the guest write as it likes.
func (m *moment) close() error {
	for _, d := range m.disks {
		d.Close()
	}
	return m.memory.Close()
}
