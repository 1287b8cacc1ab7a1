package snapshot

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"filippo.io/age"
)

const (
	manifestDir = "snapshots"
	manifestExt = ".cryo"
	packDir     = "packs"
	packExt     = ".pack"
	lockName    = "lock"
)

// Store is a directory of snapshots:
//
//	DIR/snapshots/<id>.cryo   a manifest for each snapshot
//	DIR/packs/<id>.pack       the packs that they share
//	DIR/lock                  held while packs are published or removed
//
// Its methods may be called from any number of goroutines, and several processes
// may use one directory. (Where flock(2) does not exist, such as on Windows, only
// one process at a time may write to or delete from it.) The directories are
// made with mode 0700 and the files with 0600.
type Store struct {
	dir   string
	files fileSystem
	local sync.RWMutex // what the lock file is between processes
}

// OpenStore returns the store in the directory dir. It touches nothing: the
// directory is made by the first [Store.Create], so that looking for a snapshot
// in the wrong place leaves nothing behind.
func OpenStore(dir string) (*Store, error) {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	switch fi, err := os.Stat(abs); {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return nil, err
	case !fi.IsDir():
		return nil, fmt.Errorf("%w: store %s is not a directory", ErrInvalid, abs)
	}
	return &Store{dir: abs, files: osFiles{}}, nil
}

// Dir returns the store's directory, as an absolute path.
func (s *Store) Dir() string { return s.dir }

func (s *Store) manifests() string { return filepath.Join(s.dir, manifestDir) }
func (s *Store) packs() string     { return filepath.Join(s.dir, packDir) }

// PackPath returns the name of pack id, which need not exist.
func (s *Store) PackPath(id ID) string { return inDir(s.dir, packName(id)) }

// ManifestPath returns the name of the manifest of snapshot id, which need not exist.
func (s *Store) ManifestPath(id ID) string { return inDir(s.dir, manifestName(id)) }

// packName and manifestName are the names of files in a store, with forward slashes.
func packName(id ID) string     { return packDir + "/" + id.String() + packExt }
func manifestName(id ID) string { return manifestDir + "/" + id.String() + manifestExt }

// source is how a Reader reads the store.
func (s *Store) source() *source { return &source{blobs: dirBlobs{s.dir, s.files}} }

// Open opens a snapshot with the first of the identities that fits, and
// authenticates its manifest. Packs are opened when they are needed.
//
// Errors: ErrNotFound, ErrKey, ErrCorrupt, ErrFormat, ErrVersion, or what the
// operating system says. The caller must Close the Reader.
func (s *Store) Open(ctx context.Context, id ID, identities ...age.Identity) (*Reader, error) {
	for {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		before, err := s.files.Stat(s.ManifestPath(id))
		if err != nil {
			return nil, fileError("open", s.ManifestPath(id), notFound(err))
		}
		r, err := s.source().openReader(id, identities)
		// What Rekey or Delete is overwriting is not damaged: there is another manifest, or none.
		if err == nil || !s.replaced(id, before) {
			return r, err
		}
	}
}

// fileError wraps err in a FileError, with the offset that a ParseError knows.
func fileError(op, path string, err error) error {
	off := int64(-1)
	if pe := (*ParseError)(nil); errors.As(err, &pe) && pe.Part == "header" {
		off = pe.Offset
	}
	return &FileError{Op: op, Path: path, Offset: off, Err: err}
}

// Entry is a snapshot as it lies in a store.
type Entry struct {
	Header
	Path          string `json:"path"`           // of the manifest
	ManifestBytes uint64 `json:"manifest_bytes"` // its size
}

// StoredBytes is what the snapshot itself takes on disk, without its ancestors' packs.
func (e Entry) StoredBytes() uint64 { return e.ManifestBytes + e.PackBytes }

// Header returns what anybody may know of a snapshot, without a key and
// therefore unauthenticated. Errors: ErrNotFound, ErrCorrupt, ErrFormat, ErrVersion.
func (s *Store) Header(id ID) (Entry, error) {
	return s.headerAt(s.ManifestPath(id), id)
}

// headerAt is Header of a manifest that may have another name.
func (s *Store) headerAt(path string, id ID) (Entry, error) {
	f, err := s.source().openManifest(manifestDir + "/" + filepath.Base(path))
	if err != nil {
		return Entry{}, err
	}
	defer f.Close()
	h, _, err := readHeader(f)
	if err == nil && h.ID != id {
		err = parseError(ErrCorrupt, "header", 20, "is that of snapshot %v", h.ID)
	}
	if err != nil {
		return Entry{}, fileError("read", path, err)
	}
	return Entry{Header: *h, Path: path, ManifestBytes: uint64(f.Size())}, nil
}

// List returns all snapshots, in the order of their ids. Manifests whose header
// can't be read are left out of the list and joined into the error, so that both
// results are of use together.
func (s *Store) List() ([]Entry, error) {
	ids, err := s.listIDs(s.manifests(), manifestExt)
	if err != nil {
		return nil, err
	}
	var entries []Entry
	var errs []error
	for _, id := range ids {
		e, err := s.Header(id)
		if errors.Is(err, ErrNotFound) {
			continue // deleted meanwhile
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		entries = append(entries, e)
	}
	return entries, errors.Join(errs...)
}

// listIDs returns the ids of the files in dir that are named by id and ext, ascending.
func (s *Store) listIDs(dir, ext string) ([]ID, error) {
	names, err := s.files.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var ids []ID
	for _, n := range names { // sorted by name, hence by id
		base, ok := strings.CutSuffix(n.Name(), ext)
		if !ok {
			continue
		}
		if id, err := ParseID(base); err == nil {
			ids = append(ids, id)
		}
	}
	return ids, nil
}

// Make makes the store's directories, durably, as the first [Store.Create] does: for a process that may not make any later.
func (s *Store) Make() error { return s.makeDirs() }

// makeDirs makes the store's directories, durably. That they are there says nothing: who made them may have died, or have been
// told that the disk had failed, before that was synced. A snapshot says that somebody has succeeded.
func (s *Store) makeDirs() error {
	missing := false
	for _, dir := range []string{s.packs(), s.manifests()} {
		_, err := s.files.Stat(dir)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fileError("make", dir, err)
		}
		missing = missing || err != nil
	}
	if !missing {
		ids, err := s.listIDs(s.manifests(), manifestExt)
		if err != nil {
			return fileError("make", s.manifests(), err)
		}
		if len(ids) > 0 {
			return nil
		}
	}
	for _, dir := range []string{s.packs(), s.manifests()} {
		if err := s.makeDir(dir); err != nil {
			return err
		}
	}
	return s.syncNames()
}

// makeDir makes a directory, and those above it that are not there.
func (s *Store) makeDir(dir string) error {
	err := s.files.Mkdir(dir)
	if parent := filepath.Dir(dir); errors.Is(err, fs.ErrNotExist) && parent != dir {
		if err := s.makeDir(parent); err != nil {
			return err
		}
		err = s.files.Mkdir(dir)
	}
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return fileError("make", dir, err)
	}
	return nil
}

// syncNames makes the names of the store's directories durable, and those of all that they are in.
func (s *Store) syncNames() error {
	for dir, last := s.dir, ""; dir != last; dir, last = filepath.Dir(dir), dir {
		err := s.files.SyncDir(dir)
		// Who may not read a directory has hardly made one in it; and some file systems have nothing to sync.
		if errors.Is(err, fs.ErrPermission) || errors.Is(err, errors.ErrUnsupported) {
			continue
		}
		if err != nil {
			return fileError("sync", dir, err)
		}
	}
	return nil
}

// lock takes the store's lock: shared while a Writer publishes packs and the
// manifest that names them, exclusive while packs are removed.
func (s *Store) lock(exclusive bool) (unlock func(), err error) {
	path := filepath.Join(s.dir, lockName)
	release := s.local.RUnlock
	if exclusive {
		s.local.Lock()
		release = s.local.Unlock
	} else {
		s.local.RLock()
	}
	f, err := s.files.Lock(path, exclusive)
	if err != nil {
		release()
		return nil, fileError("lock", path, err)
	}
	return func() {
		f.Close()
		release()
	}, nil
}

// Find returns the one snapshot whose id starts with prefix. Errors: ErrNotFound,
// or ErrInvalid if there are several.
func (s *Store) Find(prefix string) (ID, error) {
	ids, err := s.listIDs(s.manifests(), manifestExt)
	if err != nil {
		return ID{}, err
	}
	var found []ID
	for _, id := range ids {
		if strings.HasPrefix(id.String(), prefix) {
			found = append(found, id)
		}
	}
	switch len(found) {
	case 0:
		return ID{}, fmt.Errorf("snapshot %q in %s: %w", prefix, s.dir, ErrNotFound)
	case 1:
		return found[0], nil
	default:
		return ID{}, fmt.Errorf("%w: %d snapshots start with %q", ErrInvalid, len(found), prefix)
	}
}
