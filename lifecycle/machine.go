package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"

	"filippo.io/age"

	"github.com/cryovisor/cryovisor/memory"
	"github.com/cryovisor/cryovisor/snapshot"
	"github.com/cryovisor/cryovisor/vmm"
)

// sectionPrefix begins the names of the sections that vmm makes.
const sectionPrefix = "vmm/"

// Machine is a VM and the snapshot that it was resumed from, if any. Its methods
// may be called from several goroutines; a Pause and a Close wait for each other
// as those of the VM do.
type Machine struct {
	VM *vmm.VM

	template *Template        // what the VM was resumed from, nil if it was booted
	origin   *snapshot.Reader // the template's
	image    *memory.Image    // the template's

	disks  []*machineDisk // in the order of their indices in snapshots
	ledger ledger

	prefetched []snapshot.Range // the working set that the resume was told of
	prefetch   *prefetching     // nil if it was booted

	pausing sync.Mutex // held by an attempt
	closed  bool
	// base is what the next snapshot is a diff of: the last checkpoint, or origin. baseEpoch is what was written since the
	// checkpoint, nil for origin, of which the memory itself knows.
	base      *snapshot.Reader
	baseEpoch *epoch

	mu      sync.Mutex
	attempt *attempt // the one under way, or nil
}

// Boot makes a machine that has not run yet. VM.Start sets it going. Its copy-on-write disks come before those of cfg.Hardware.
// ctx bounds Boot: to find out the identity of a large image takes seconds.
//
// Errors, besides those of vmm.New: those of package blockdev for disks, such as blockdev.ErrNotDisk.
func Boot(ctx context.Context, cfg vmm.Config, disks Disks) (*Machine, error) {
	m := &Machine{}
	if err := m.boot(ctx, cfg, disks); err != nil {
		return nil, errors.Join(fmt.Errorf("boot: %w", err), m.Close())
	}
	return m, nil
}

func (m *Machine) boot(ctx context.Context, cfg vmm.Config, disks Disks) error {
	if len(disks.Boot) > snapshot.MaxDisks {
		return fmt.Errorf("%w: %d copy-on-write disks; at most %d", vmm.ErrConfig, len(disks.Boot), snapshot.MaxDisks)
	}
	for _, d := range disks.Boot {
		if err := vmm.CheckDiskName(d.Name); err != nil {
			return err
		}
		disk, err := disks.bootDisk(ctx, d)
		if disk != nil {
			m.disks = append(m.disks, disk)
		}
		if err != nil {
			return fmt.Errorf("disk %q: %w", d.Name, err)
		}
	}
	cfg.Hardware = m.hardware(cfg.Hardware, disks.OnError)
	var err error
	m.VM, err = vmm.New(cfg)
	m.ledger.vm, m.ledger.disks = m.VM, m.disks
	return err
}

// ResumeOptions are the choices of a resume.
type ResumeOptions struct {
	// Identities open the snapshot; one that fits is enough.
	Identities []age.Identity
	// Hardware connects the machine to this process.
	Hardware vmm.Hardware
	// Disks says where the machine's copy-on-write disks are; Disks.Boot is not looked at.
	Disks Disks
	// Eager loads all of the memory before the machine runs, instead of each
	// page when it is touched. It is slower, and works on hosts where
	// userfaultfd does not.
	Eager bool
	// Prefetch says what is fetched before the guest asks for it, while it runs.
	Prefetch Prefetch
	// WorkingSet, if not nil, is what Machine.WorkingSet has said of a machine of this snapshot, to be
	// prefetched instead of what the snapshot knows.
	WorkingSet []byte
	// SmallPages keeps the memory that was prefetched, or loaded, in pages of 4 KiB. Otherwise it is moved to huge pages of
	// the host's, where it is dense, once it is there: a guest then touches it for the first time at a fraction of
	// the cost. See memory.Memory.Collapse for the price.
	SmallPages bool
	// Pool, if not nil, has VMs that were made in advance. One is used if the pool is of the size of the machine's memory and has one
	// ready; otherwise one is made now.
	Pool *Pool
	// Progress, if not nil, is told how many bytes of guest memory, of those that
	// the snapshot has, an eager resume has loaded. It is called from several
	// goroutines.
	Progress func(done, total uint64)
}

// Resume makes a machine of a snapshot: paused where it stopped, with its memory
// to be read from the store as it is touched. VM.Resume sets it going. The store's
// files must stay until the machine is closed.
//
// Errors: those of snapshot.Store.Open; vmm.ErrCPU, vmm.ErrHostMemory and the
// other host errors of package vmm when this host can't run the machine;
// vmm.ErrNoUserfaultfd when it can with Eager only; a *blockdev.BaseError when an image under a disk is not
// what it was.
func Resume(ctx context.Context, store *snapshot.Store, id snapshot.ID, opts ResumeOptions) (*Machine, error) {
	// The kernel takes as long to make a VM as it takes to open the snapshot, which it does not depend on.
	shell := opts.Pool.take()
	defer shell.close()
	t, err := Open(ctx, store, id, opts.Identities...)
	if err != nil {
		return nil, err
	}
	m, err := t.resume(ctx, shell, opts)
	return m, errors.Join(err, t.Close())
}

func (m *Machine) resume(ctx context.Context, made *pendingShell, opts ResumeOptions) error {
	state, err := readState(m.origin)
	if err != nil {
		return err
	}
	if err := m.resumeDisks(ctx, opts.Disks); err != nil {
		return err
	}
	opts.Hardware = m.hardware(opts.Hardware, opts.Disks.OnError)
	shell, err := made.wait()
	if err != nil {
		return err
	}
	if place := shell.Reservation(); place != nil && place.Size() != state.Machine.MemoryBytes {
		made.put()
		if shell, err = made.wait(); err != nil {
			return err
		}
	}
	if err := shell.CheckHost(state, opts.Hardware); err != nil {
		return err
	}
	mapping := memory.MapOptions{Eager: opts.Eager, Reservation: shell.Reservation()}
	if opts.Progress != nil {
		total := m.origin.Header().PagesMapped * memory.PageSize
		mapping.Progress = func(bytes uint64) { opts.Progress(bytes, total) }
	}
	mem, err := m.image.Map(ctx, mapping)
	if err != nil {
		return explained(err, opts.Eager)
	}
	if m.VM, err = shell.Restore(state, mem, opts.Hardware); err != nil {
		return err
	}
	m.ledger.vm, m.ledger.disks = m.VM, m.disks
	m.startPrefetch(opts)
	return nil
}

// explained is why memory could not be mapped. Whether a lazy mapping is possible at all is asked only when one has failed:
// the question costs as much as the mapping.
func explained(err error, eager bool) error {
	if eager {
		return err
	}
	if lazy := vmm.CheckLazy(); lazy != nil {
		return lazy
	}
	return err
}

// resumeDisks makes the disks that the snapshot has.
func (m *Machine) resumeDisks(ctx context.Context, disks Disks) error {
	infos, err := DisksOf(m.origin)
	if err != nil {
		return err
	}
	for name := range disks.Images {
		if !slices.ContainsFunc(infos, func(d DiskInfo) bool { return d.Name == name }) {
			return fmt.Errorf("%w: an image was given for disk %q, which the snapshot does not have", vmm.ErrConfig, name)
		}
	}
	for i, info := range infos {
		disk, err := disks.resumeDisk(ctx, m.origin, i, info)
		m.disks = append(m.disks, disk)
		if err != nil {
			return err
		}
	}
	return nil
}

func readState(r *snapshot.Reader) (*vmm.State, error) {
	err := r.CheckSections(func(name string, version uint32) bool {
		return strings.HasPrefix(name, sectionPrefix) || name == disksSection && version == disksVersion
	})
	if err != nil {
		return nil, err
	}
	return parseState(r)
}

// parseState is readState for who restores no machine: sections that he does not know may be critical.
func parseState(r *snapshot.Reader) (*vmm.State, error) {
	var sections []vmm.Section
	for _, s := range r.Sections() {
		if !strings.HasPrefix(s.Name, sectionPrefix) {
			continue
		}
		sections = append(sections, vmm.Section{Name: s.Name, Version: s.Version, Data: s.Data})
	}
	return vmm.ParseState(sections)
}

// Origin returns the id of the snapshot that the machine was resumed from, zero
// for one that was booted.
func (m *Machine) Origin() snapshot.ID {
	if m.origin == nil {
		return snapshot.ID{}
	}
	return m.origin.Header().ID
}

// Section returns a section of the snapshot that the machine was resumed from;
// see snapshot.Reader.ReadSection.
func (m *Machine) Section(name string) (snapshot.Section, error) {
	if m.origin == nil {
		return snapshot.Section{}, fmt.Errorf("section %q of a machine that was booted: %w", name, snapshot.ErrNotFound)
	}
	return m.origin.ReadSection(name)
}

// Reclaim gives back, now, what the machine's memory takes twice, since the guest has rewritten what its snapshot holds, and says how
// many bytes that were. It is done every few seconds by itself.
func (m *Machine) Reclaim(ctx context.Context) (freed uint64, err error) {
	if m.image == nil {
		return 0, nil
	}
	return m.image.Reclaim(ctx)
}

// Close ends the machine and gives everything back. A Pause, Checkpoint or Prepare under way is given up. It may be called more than
// once. The file with what the machine has changed on a disk is removed if a snapshot
// has all of that; otherwise it stays, flushed, for somebody to use or to remove.
func (m *Machine) Close() error { return m.end((*machineDisk).close) }

// Discard is Close for a machine that nobody wants back: what it has changed on its disks is removed in any case.
func (m *Machine) Discard() error { return m.end((*machineDisk).remove) }

// disconnect is the first part of Close or Discard, one of which must follow: it gives back what is of the machine's Hardware, and nothing
// that takes KVM long.
func (m *Machine) disconnect() error {
	m.giveUp(vmm.ErrClosed)
	m.pausing.Lock()
	defer m.pausing.Unlock()
	m.stop()
	return m.VM.Disconnect()
}

// stop ends what goes on beside the VM. The caller holds pausing: what a Pause reads must not go away under it.
func (m *Machine) stop() {
	m.closed = true
	m.prefetch.end()
}

func (m *Machine) end(endDisk func(*machineDisk) error) error {
	m.giveUp(vmm.ErrClosed)
	m.pausing.Lock()
	defer m.pausing.Unlock()
	m.stop()
	var errs []error
	if m.VM != nil {
		errs = append(errs, m.VM.Close())
	}
	for _, d := range m.disks {
		errs = append(errs, endDisk(d))
	}
	m.disks = nil
	if m.base != nil && m.base != m.origin {
		errs = append(errs, m.base.Close())
	}
	if m.template != nil {
		errs = append(errs, m.template.leave())
		m.template = nil
	}
	return errors.Join(errs...)
}
