package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"filippo.io/age"

	"github.com/cryovisor/cryovisor/snapshot"
)

// FsckOptions are the choices of Fsck.
type FsckOptions struct {
	Keys KeyProvider // as ManagerOptions.Keys
	// Deep reads every byte of every snapshot.
	Deep bool
	// Repair deletes records of sandboxes and templates whose snapshot is gone, and everything that no record names, and records that what ran does not run.
	Repair bool
}

// ProblemKind says what is wrong.
type ProblemKind string

// The kinds of problems. Those that Repair takes care of are so marked.
const (
	ProblemCatalog  ProblemKind = "catalog"  // the database is damaged
	ProblemMissing  ProblemKind = "missing"  // a record names a snapshot that is not there; repaired, by deleting the record
	ProblemDamaged  ProblemKind = "damaged"  // a snapshot, or a pack that it needs, is
	ProblemKey      ProblemKind = "key"      // the key of a snapshot is missing, or does not open it
	ProblemRunning  ProblemKind = "running"  // a sandbox was running when its process ended; repaired, by what it was at its last pause
	ProblemOrphan   ProblemKind = "orphan"   // a file that no record names; repaired, by deleting it
	ProblemUnpaused ProblemKind = "unpaused" // a sandbox was running that had never been paused; repaired, by deleting its record
)

// Problem is something that is not as it should be.
type Problem struct {
	Kind     ProblemKind `json:"kind"`
	ID       string      `json:"id"` // of the sandbox, template or snapshot; the name of a file
	Detail   string      `json:"detail"`
	Repaired bool        `json:"repaired"`
}

// FsckReport is what Fsck found.
type FsckReport struct {
	Sandboxes, Templates, Snapshots int // that were looked at
	Problems                        []Problem
}

// Fsck looks for what is wrong in a data directory that no Manager has: ErrLocked if one does. Without Repair it changes nothing.
func Fsck(ctx context.Context, dir string, opts FsckOptions) (FsckReport, error) {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return FsckReport{}, err
	}
	if _, err := os.Stat(filepath.Join(abs, catalogFile)); err != nil {
		return FsckReport{}, fmt.Errorf("check data directory: %w", err)
	}
	f := fsck{m: newManager(abs, ManagerOptions{Keys: opts.Keys}), opts: opts}
	err = f.run(ctx)
	return f.report, errors.Join(err, f.m.release())
}

// fsck is an Fsck under way.
type fsck struct {
	m      *Manager
	opts   FsckOptions
	report FsckReport
	named  map[snapshot.ID]bool // by records
	// careful says that it is not known which packs are needed: Repair deletes no snapshots and packs.
	careful bool
}

func (f *fsck) found(kind ProblemKind, id string, repaired bool, format string, args ...any) {
	f.report.Problems = append(f.report.Problems, Problem{
		Kind: kind, ID: id, Detail: fmt.Sprintf(format, args...), Repaired: repaired && f.opts.Repair,
	})
}

func (f *fsck) run(ctx context.Context) error {
	if f.m.keys == nil {
		// Without a master key there is nothing to open, and none is to be made.
		if _, err := os.Stat(filepath.Join(f.m.dir, keysDir, masterFile)); err != nil {
			return fmt.Errorf("%w: %w", ErrKey, err)
		}
	}
	if err := f.m.openParts(); err != nil {
		return err
	}
	if err := f.m.catalog.Check(ctx); err != nil {
		f.found(ProblemCatalog, catalogFile, false, "%v", err)
		return nil
	}
	f.named = make(map[snapshot.ID]bool)
	if err := f.templates(ctx); err != nil {
		return err
	}
	if err := f.sandboxes(ctx); err != nil {
		return err
	}
	if err := f.orphans(); err != nil {
		return err
	}
	if !f.opts.Repair {
		return nil
	}
	return f.m.recover(ctx)
}

func (f *fsck) templates(ctx context.Context) error {
	rows, err := f.m.catalog.Templates(ctx)
	if err != nil {
		return err
	}
	f.report.Templates = len(rows)
	for _, row := range rows {
		if gone := f.snapshot(ctx, row.ID, row.Snapshot); gone && f.opts.Repair {
			if err := f.m.catalog.DeleteTemplate(ctx, row.ID); err != nil {
				return err
			}
		}
	}
	return nil
}

func (f *fsck) sandboxes(ctx context.Context) error {
	rows, err := f.m.catalog.Sandboxes(ctx)
	if err != nil {
		return err
	}
	f.report.Sandboxes = len(rows)
	for _, row := range rows {
		switch {
		case row.Snapshot == "":
			f.found(ProblemUnpaused, row.ID, true, "it ran, and was never paused")
			continue
		case row.Running:
			f.found(ProblemRunning, row.ID, true, "it ran; it is as it was at its last pause, at %v", row.Paused)
		}
		if gone := f.snapshot(ctx, row.ID, row.Snapshot); gone && f.opts.Repair {
			if err := f.m.catalog.DeleteSandbox(ctx, row.ID); err != nil {
				return err
			}
		}
	}
	return nil
}

// snapshot checks the snapshot of a record, and says whether there is none.
func (f *fsck) snapshot(ctx context.Context, owner, name string) (gone bool) {
	f.report.Snapshots++
	id, err := snapshot.ParseID(name)
	if err != nil {
		f.found(ProblemDamaged, owner, false, "%v", err)
		return false
	}
	f.named[id] = true
	entry, err := f.m.store.Header(id)
	if err != nil {
		missing := errors.Is(err, snapshot.ErrNotFound)
		kind := ProblemDamaged
		if missing {
			kind = ProblemMissing
		}
		f.found(kind, owner, missing, "snapshot %v: %v", id, err)
		f.careful = f.careful || !missing
		return missing
	}
	for _, pack := range entry.Packs {
		if _, err := os.Stat(f.m.store.PackPath(pack)); err != nil {
			f.found(ProblemDamaged, owner, false, "snapshot %v: %v", id, err)
			f.careful = true
			return false
		}
	}
	identity, err := f.m.identity(ctx, owner)
	if err != nil {
		f.found(ProblemKey, owner, false, "%v", err)
		return false
	}
	f.open(ctx, owner, id, identity)
	return false
}

// open authenticates a snapshot, and reads all of it if that is wanted.
func (f *fsck) open(ctx context.Context, owner string, id snapshot.ID, identity age.Identity) {
	r, err := f.m.store.Open(ctx, id, identity)
	if err != nil {
		kind := ProblemDamaged
		if errors.Is(err, snapshot.ErrKey) {
			kind = ProblemKey
		}
		f.found(kind, owner, false, "snapshot %v: %v", id, err)
		return
	}
	defer r.Close()
	if !f.opts.Deep {
		return
	}
	report, err := r.Verify(ctx, nil)
	if err == nil {
		err = report.Err()
	}
	if err != nil {
		f.found(ProblemDamaged, owner, false, "snapshot %v: %v", id, err)
	}
}

// orphans looks for files that no record names.
func (f *fsck) orphans() error {
	entries, err := f.m.store.List()
	if err != nil {
		f.found(ProblemDamaged, storeDir, false, "%v; until that is mended, no snapshots and packs are deleted", err)
		f.careful = true
	}
	needed := make(map[string]bool)
	for _, e := range entries {
		if !f.named[e.ID] {
			f.found(ProblemOrphan, e.ID.String(), !f.careful, "a snapshot of nobody, %d bytes", e.StoredBytes())
		}
		for _, pack := range e.Packs {
			needed[f.m.store.PackPath(pack)] = true
		}
	}
	packs, globErr := filepath.Glob(filepath.Join(f.m.dir, storeDir, "packs", "*.pack"))
	for _, path := range packs {
		if !needed[path] {
			f.found(ProblemOrphan, filepath.Base(path), !f.careful, "a pack of no snapshot")
		}
	}
	files, err := os.ReadDir(f.m.disks())
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	for _, file := range files {
		if filepath.Ext(file.Name()) == overlayExt {
			f.found(ProblemOrphan, file.Name(), true, "what a guest that has ended wrote to a disk")
		}
	}
	return errors.Join(globErr, err)
}
