package snapshot

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"
	"time"
)

// Delete removes a snapshot for good: first its manifest, which holds the keys
// and is overwritten before it is unlinked, then the packs that no other snapshot
// in the store needs. What descendants share stays, and so do they.
//
// A VM that still runs from the snapshot may need its packs: whoever deletes must
// know that there is none. (Overwriting destroys the keys where the file system
// writes in place; on a copy-on-write file system or worn flash, old blocks live on.)
//
// If another manifest's header can't be read, Delete removes no packs and returns
// its error, because that manifest might need them; the snapshot itself is gone.
// Delete reads the headers of all manifests.
func (s *Store) Delete(ctx context.Context, id ID) error {
	return s.delete(ctx, id, func([]ID) (map[ID]bool, error) { return s.neededPacks() })
}

// DeleteKeeping is Delete for somebody who knows which packs all other snapshots of the store need, and so
// saves reading their headers: needed is asked for each pack of the snapshot, while no snapshot can be committed.
func (s *Store) DeleteKeeping(ctx context.Context, id ID, needed func(pack ID) bool) error {
	return s.delete(ctx, id, func(packs []ID) (map[ID]bool, error) {
		keep := make(map[ID]bool)
		for _, pack := range packs {
			keep[pack] = needed(pack)
		}
		return keep, nil
	})
}

func (s *Store) delete(ctx context.Context, id ID, neededOf func(packs []ID) (map[ID]bool, error)) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if _, err := s.findDoomed(id); err != nil {
		return err
	}
	unlock, err := s.lock(true)
	if err != nil {
		return err
	}
	defer unlock()
	path, err := s.findDoomed(id) // nobody else deletes it now
	if err != nil {
		return err
	}
	entry, headerErr := s.headerAt(path, id)
	if err := s.shredManifest(id, path); err != nil {
		return err
	}
	if fe := (*FileError)(nil); errors.As(headerErr, &fe) && !fe.Temporary() {
		return nil // a header that is damaged tells no packs; Collect finds them
	}
	needed, err := map[ID]bool(nil), headerErr
	if err == nil {
		needed, err = neededOf(entry.Packs)
	}
	if err != nil {
		return fmt.Errorf("snapshot %v is deleted, its packs are left for Collect: %w", id, err)
	}
	_, err = s.removePacks(ctx, entry.Packs, needed)
	return err
}

// findDoomed returns the path of a manifest that is to be deleted: that of its snapshot, or that of a deletion which has
// failed after it was begun.
func (s *Store) findDoomed(id ID) (string, error) {
	for _, path := range []string{s.ManifestPath(id), s.deletedPath(id)} {
		_, err := s.files.Stat(path)
		if err == nil {
			return path, nil
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return "", fileError("delete", path, err)
		}
	}
	return "", fileError("delete", s.ManifestPath(id), fmt.Errorf("snapshot %w: %w", ErrNotFound, fs.ErrNotExist))
}

func (s *Store) deletedPath(id ID) string {
	return filepath.Join(s.manifests(), deletedPrefix+id.String())
}

// Garbage is what Collect removed.
type Garbage struct {
	Packs []ID   `json:"packs"`
	Bytes uint64 `json:"bytes"`
	Temps int    `json:"temps"` // temporary files and half-deleted manifests
}

// Collect removes what processes that died have left: packs that no manifest
// names, deletions that were begun, and temporary files older than a day. It
// needs no key. It is safe while other processes write, and removes nothing
// if the header of any manifest can't be read, for that may name any pack.
func (s *Store) Collect(ctx context.Context) (Garbage, error) {
	var g Garbage
	switch _, err := s.files.Stat(s.manifests()); {
	case errors.Is(err, fs.ErrNotExist):
		return g, nil // packs come later
	case err != nil:
		return g, fileError("collect", s.manifests(), err)
	}
	unlock, err := s.lock(true)
	if err != nil {
		return g, err
	}
	defer unlock()
	// A manifest that went away without being synced, as its process died or the disk failed, can come back by a crash:
	// not before its packs are gone, nor when it has been overwritten.
	if err := s.files.SyncDir(s.manifests()); err != nil {
		return g, fileError("sync", s.manifests(), err)
	}
	needed, err := s.neededPacks()
	if err != nil {
		return g, err
	}
	all, err := s.listIDs(s.packs(), packExt)
	if err != nil {
		return g, err
	}
	if g, err = s.removePacks(ctx, all, needed); err != nil {
		return g, err
	}
	for _, dir := range []string{s.packs(), s.manifests()} {
		n, err := s.removeTemps(dir)
		g.Temps += n
		if err != nil {
			return g, err
		}
	}
	return g, nil
}

// neededPacks returns the packs that the store's manifests name.
func (s *Store) neededPacks() (map[ID]bool, error) {
	entries, err := s.List()
	if err != nil {
		return nil, err
	}
	needed := make(map[ID]bool)
	for _, e := range entries {
		for _, id := range e.Packs {
			needed[id] = true
		}
	}
	return needed, nil
}

// removePacks removes those of packs that are not needed.
func (s *Store) removePacks(ctx context.Context, packs []ID, needed map[ID]bool) (Garbage, error) {
	var g Garbage
	for _, id := range packs {
		if err := ctx.Err(); err != nil {
			return g, err
		}
		if needed[id] {
			continue
		}
		path := s.PackPath(id)
		fi, err := s.files.Stat(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return g, fileError("remove pack", path, err)
		}
		if err := s.files.Remove(path); err != nil {
			return g, fileError("remove pack", path, err)
		}
		g.Packs = append(g.Packs, id)
		g.Bytes += uint64(fi.Size())
	}
	if len(g.Packs) == 0 {
		return g, nil
	}
	if err := s.files.SyncDir(s.packs()); err != nil {
		return g, fileError("sync", s.packs(), err)
	}
	return g, nil
}

// removeTemps removes temporary files that nobody can be using.
func (s *Store) removeTemps(dir string) (int, error) {
	names, err := s.files.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return 0, err
	}
	n := 0
	for _, e := range names {
		path := filepath.Join(dir, e.Name())
		switch {
		case strings.HasPrefix(e.Name(), deletedPrefix):
			err = s.shred(path)
		case strings.HasPrefix(e.Name(), tempPrefix) && stale(e):
			err = s.files.Remove(path)
		default:
			continue
		}
		if err != nil {
			return n, fileError("remove", path, err)
		}
		n++
	}
	return n, nil
}

func stale(e fs.DirEntry) bool {
	fi, err := e.Info()
	return err == nil && time.Since(fi.ModTime()) > staleTemp
}

// shredManifest makes a snapshot disappear, and then its keys. The rename comes
// first, so that nobody ever sees a manifest that is half overwritten. path is where the manifest is.
func (s *Store) shredManifest(id ID, path string) error {
	doomed := s.deletedPath(id)
	if path != doomed {
		if err := s.files.Rename(path, doomed); err != nil {
			return fileError("delete", path, err)
		}
	}
	if err := s.files.SyncDir(s.manifests()); err != nil {
		return fileError("sync", s.manifests(), err)
	}
	if err := s.shred(doomed); err != nil {
		return fileError("shred", doomed, err)
	}
	return nil
}

// shred overwrites a file with random bytes, waits until they are on stable
// storage, and removes it.
func (s *Store) shred(path string) error {
	f, err := s.files.Overwrite(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := overwrite(f, 0); err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	if err := s.files.Remove(path); err != nil {
		return err
	}
	return s.files.SyncDir(filepath.Dir(path))
}
