package lifecycle

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

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

	origin *snapshot.Reader // what the VM was resumed from, nil if it was booted
	image  *memory.Image
	disks  []*machineDisk // in the order of their indices in snapshots
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
	origin, err := store.Open(ctx, id, opts.Identities...)
	if err != nil {
		return nil, err
	}
	m := &Machine{origin: origin}
	if err := m.resume(ctx, opts); err != nil {
		return nil, errors.Join(fmt.Errorf("resume snapshot %v: %w", id, err), m.Close())
	}
	return m, nil
}

func (m *Machine) resume(ctx context.Context, opts ResumeOptions) error {
	state, err := readState(m.origin)
	if err != nil {
		return err
	}
	if err := m.resumeDisks(ctx, opts.Disks); err != nil {
		return err
	}
	opts.Hardware = m.hardware(opts.Hardware, opts.Disks.OnError)
	if err := vmm.CheckHost(state, opts.Hardware); err != nil {
		return err
	}
	if !opts.Eager {
		if err := vmm.CheckLazy(); err != nil {
			return err
		}
	}
	if m.image, err = memory.NewImage(state.Machine.MemoryBytes, m.origin); err != nil {
		return err
	}
	mapping := memory.MapOptions{Eager: opts.Eager}
	if opts.Progress != nil {
		total := m.origin.Header().PagesMapped * memory.PageSize
		mapping.Progress = func(bytes uint64) { opts.Progress(bytes, total) }
	}
	mem, err := m.image.Map(ctx, mapping)
	if err != nil {
		return err
	}
	m.VM, err = vmm.Restore(state, mem, opts.Hardware)
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
	var sections []vmm.Section
	for _, s := range r.Sections() {
		if !strings.HasPrefix(s.Name, sectionPrefix) {
			continue
		}
		sections = append(sections, vmm.Section{Name: s.Name, Version: s.Version, Data: s.Data})
	}
	return vmm.ParseState(sections)
}

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

// Pause stops the machine and stores it. When it returns without an error the
// snapshot is durable and the machine is paused: Close it, or let it run on with
// VM.Resume. With an error nothing is stored, and the machine runs on if it ran
// before (unless the guest has ended: then the error says how).
//
// A machine that was resumed from a snapshot is stored as a diff: what it has
// written since. store must then be the store of that snapshot, or opts.Full set.
func (m *Machine) Pause(ctx context.Context, store *snapshot.Store, opts PauseOptions) (Paused, error) {
	began := time.Now()
	if !m.VM.Paused() {
		if err := m.VM.Pause(ctx); err != nil {
			return Paused{}, fmt.Errorf("pause: %w", err)
		}
		paused, err := m.store(ctx, store, opts, began)
		if err != nil {
			return Paused{}, errors.Join(fmt.Errorf("pause: %w", err), m.VM.Resume())
		}
		return paused, nil
	}
	paused, err := m.store(ctx, store, opts, began)
	if err != nil {
		return Paused{}, fmt.Errorf("pause: %w", err)
	}
	return paused, nil
}

// store writes the paused machine to a new snapshot.
func (m *Machine) store(ctx context.Context, store *snapshot.Store, opts PauseOptions, began time.Time) (Paused, error) {
	sections, err := m.sections(opts.Extra)
	if err != nil {
		return Paused{}, err
	}
	var p Paused
	parent := m.origin
	if opts.Full {
		parent = nil
	}
	if parent != nil {
		p.Parent = parent.Header().ID
	}
	ranges, err := m.candidates(ctx, parent != nil)
	if err != nil {
		return Paused{}, err
	}
	for _, r := range ranges {
		p.CandidateBytes += r.Len
	}
	contents := m.diskContents(parent == nil)
	p.DiskBytes = contents.bytes
	p.Freeze = time.Since(began)
	meter := progress{report: opts.Progress, total: p.CandidateBytes + p.DiskBytes}
	w, err := store.Create(ctx, snapshot.Options{
		Recipients: opts.Recipients, Parent: parent, Workers: opts.Workers, Progress: meter.function(),
	})
	if err != nil {
		return Paused{}, err
	}
	defer w.Abort() //nolint:errcheck // it does nothing after a Commit, and the first error is the one to report
	for _, section := range sections {
		if err := w.AddSection(section); err != nil {
			return Paused{}, err
		}
	}
	mem := m.VM.Memory()
	if err := w.WriteMemory(ctx, mem.Size(), ranges, mem.View); err != nil {
		return Paused{}, err
	}
	for _, disk := range contents.disks {
		meter.next()
		if err := w.WriteDisk(ctx, disk); err != nil {
			return Paused{}, err
		}
	}
	if p.Info, err = w.Commit(ctx); err != nil {
		return Paused{}, err
	}
	contents.durable()
	p.Total = time.Since(began)
	return p, nil
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

// Close ends the machine and gives everything back. It may be called more than
// once. The file with what the machine has changed on a disk is removed if a snapshot
// has all of that; otherwise it stays, flushed, for somebody to use or to remove.
func (m *Machine) Close() error {
	var errs []error
	if m.VM != nil {
		errs = append(errs, m.VM.Close())
	}
	for _, d := range m.disks {
		errs = append(errs, d.close())
	}
	m.disks = nil
	if m.image != nil {
		errs = append(errs, m.image.Close())
	}
	if m.origin != nil {
		errs = append(errs, m.origin.Close())
	}
	return errors.Join(errs...)
}
