package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"

	"github.com/cryovisor/cryovisor/snapshot"
)

// holdings count who needs which snapshot, records and running machines alike, and which packs all of them need. A snapshot that nobody needs any more is
// deleted, its manifest and so its keys first. Its methods may be called from several goroutines.
type holdings struct {
	store *snapshot.Store

	mu        sync.Mutex
	snapshots map[snapshot.ID]*storedSnapshot
	packs     map[snapshot.ID]*storedPack
	doomed    map[snapshot.ID]bool // being deleted: nobody gets hold of them any more
	bytes     uint64               // of all manifests and packs
	cautious  bool                 // there are snapshots of which it is not known which packs they need: none is deleted
}

type storedSnapshot struct {
	users int
	packs []snapshot.ID
	bytes uint64 // of the manifest
}

type storedPack struct {
	snapshots int // that name it
	bytes     uint64
}

func newHoldings(store *snapshot.Store) *holdings {
	return &holdings{
		store: store, snapshots: make(map[snapshot.ID]*storedSnapshot), packs: make(map[snapshot.ID]*storedPack),
		doomed: make(map[snapshot.ID]bool),
	}
}

// hold notes that somebody needs a snapshot, which must be in the store: snapshot.ErrNotFound if it is not, or is being deleted.
func (s *holdings) hold(id snapshot.ID) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if known := s.snapshots[id]; known != nil {
		known.users++
		return nil
	}
	if s.doomed[id] {
		return fmt.Errorf("snapshot %v is being deleted: %w", id, snapshot.ErrNotFound)
	}
	entry, err := s.store.Header(id)
	if err != nil {
		return err
	}
	added := make(map[snapshot.ID]uint64)
	for _, pack := range entry.Packs {
		if s.packs[pack] != nil {
			continue
		}
		fi, err := os.Stat(s.store.PackPath(pack))
		if err != nil {
			return fmt.Errorf("snapshot %v: %w", id, err)
		}
		added[pack] = uint64(fi.Size())
	}
	for pack, bytes := range added {
		s.packs[pack] = &storedPack{bytes: bytes}
		s.bytes += bytes
	}
	for _, pack := range entry.Packs {
		s.packs[pack].snapshots++
	}
	s.snapshots[id] = &storedSnapshot{users: 1, packs: entry.Packs, bytes: entry.ManifestBytes}
	s.bytes += entry.ManifestBytes
	return nil
}

// letGo notes that somebody needs a snapshot no more, and deletes it if nobody does. What can't be deleted is left for the next time
// that the directory is opened.
func (s *holdings) letGo(ctx context.Context, ids ...snapshot.ID) error {
	var errs []error
	for _, id := range ids {
		if s.lastUser(id) {
			errs = append(errs, s.store.DeleteKeeping(ctx, id, s.needed))
			s.deleted(id)
		}
	}
	return errors.Join(errs...)
}

// deleted notes that a snapshot is no longer being deleted.
func (s *holdings) deleted(id snapshot.ID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.doomed, id)
}

// lastUser forgets a user, and the snapshot with the last: the caller deletes it.
func (s *holdings) lastUser(id snapshot.ID) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	known := s.snapshots[id]
	if known == nil {
		return false
	}
	if known.users--; known.users > 0 {
		return false
	}
	delete(s.snapshots, id)
	s.doomed[id] = true
	s.bytes -= known.bytes
	for _, id := range known.packs {
		pack := s.packs[id]
		if pack.snapshots--; pack.snapshots == 0 {
			delete(s.packs, id)
			s.bytes -= pack.bytes
		}
	}
	return true
}

func (s *holdings) needed(pack snapshot.ID) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.cautious || s.packs[pack] != nil
}

// careful has packs be kept: some that are needed may not be known.
func (s *holdings) careful() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.cautious = true
}

func (s *holdings) has(id snapshot.ID) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.snapshots[id] != nil
}

// total is what all snapshots take on disk.
func (s *holdings) total() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.bytes
}
