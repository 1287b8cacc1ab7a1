package lifecycle

import (
	"slices"
	"sync"

	"github.com/cryovisor/cryovisor/snapshot"
	"github.com/cryovisor/cryovisor/vmm"
)

// changes are what was written of a machine's memory and of each of its disks.
type changes struct {
	memory []snapshot.Range
	disks  [][]snapshot.Range
}

func (c *changes) size() uint64 {
	n := size(c.memory)
	for _, d := range c.disks {
		n += size(d)
	}
	return n
}

func (c *changes) clone() *changes {
	out := &changes{memory: slices.Clone(c.memory)}
	for _, d := range c.disks {
		out.disks = append(out.disks, slices.Clone(d))
	}
	return out
}

// epoch collects what has been written since a moment.
type epoch struct{ changes }

// ledger keeps a machine's epochs. The machine and the disks note what is written only once, and only as long as there are any.
type ledger struct {
	vm    *vmm.VM
	disks []*machineDisk

	mu     sync.Mutex
	epochs []*epoch
}

// begin begins an epoch, now.
func (l *ledger) begin() (*epoch, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.epochs) == 0 {
		if err := l.vm.TrackDirty(true); err != nil {
			return nil, err
		}
		for _, d := range l.disks {
			d.overlay.TrackWrites(true)
		}
	} else if err := l.collect(); err != nil {
		return nil, err
	}
	e := &epoch{changes{disks: make([][]snapshot.Range, len(l.disks))}}
	l.epochs = append(l.epochs, e)
	return e, nil
}

// collect adds to every epoch what has been written since the last time. The caller holds mu.
func (l *ledger) collect() error {
	dirty, err := l.vm.TakeDirty()
	if err != nil {
		return err
	}
	written := memoryRanges(dirty)
	for _, e := range l.epochs {
		e.memory = merge(append(e.memory, written...))
	}
	for i, d := range l.disks {
		written := diskRanges(d.overlay.TakeWrites())
		for _, e := range l.epochs {
			e.disks[i] = merge(append(e.disks[i], written...))
		}
	}
	return nil
}

// read returns what has been written in an epoch so far.
func (l *ledger) read(e *epoch) (*changes, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.collect(); err != nil {
		return nil, err
	}
	return e.clone(), nil
}

// take returns it, and begins the epoch anew.
func (l *ledger) take(e *epoch) (*changes, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.collect(); err != nil {
		return nil, err
	}
	c := e.changes
	e.changes = changes{disks: make([][]snapshot.Range, len(l.disks))}
	return &c, nil
}

// end ends an epoch, which may be nil. Where KVM can't be told to note no more, it goes on: that costs the guest something, and
// is no reason to fail.
func (l *ledger) end(e *epoch) {
	l.mu.Lock()
	defer l.mu.Unlock()
	i := slices.Index(l.epochs, e)
	if i < 0 {
		return
	}
	l.epochs = slices.Delete(l.epochs, i, i+1)
	if len(l.epochs) > 0 {
		return
	}
	for _, d := range l.disks {
		d.overlay.TrackWrites(false)
	}
	_ = l.vm.TrackDirty(false)
}
