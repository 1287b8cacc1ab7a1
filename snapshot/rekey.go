package snapshot

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime"

	"filippo.io/age"
)

// Rekey changes who can open a snapshot: with the first of the identities that
// fits it opens the manifest, authenticates it, and puts another in its place
// that holds the same and is encrypted to the recipients, and to nobody else.
// Nothing but the manifest is read or written, whatever the snapshot's size.
//
// It is one snapshot's manifest. Each holds the keys of all packs that its
// snapshot needs, so ancestors and descendants open as they did before, with their own
// recipients, and they share packs: to take a history from somebody, rekey all of it.
//
// It takes nothing from who could open the snapshot before and has kept a copy of
// the old manifest, or of the packs' keys that are in it: the packs are not encrypted
// anew. Store.Flatten copies a snapshot to packs with a key of their own. The old
// manifest is overwritten after it was replaced, which destroys it
// (under other names that it may have, by hard links, too) where the file system writes
// in place; see [Store.Delete]. On Windows, it is not overwritten.
//
// At any instant the snapshot has one manifest, whole, the old or the new; after a crash, too. A
// Reader that is open stays as it is; an OpenFrom that is just reading the old manifest
// from this directory may report damage, and succeeds when it is tried again. Rekey may be called while others open,
// write, delete, collect or rekey: it is as if they had come one after another.
// While it replaces the manifest, it holds the lock that keeps Writers from
// committing; not while identities and recipients, which may ask a human, are at work.
//
// Errors: those of Open; ErrInvalid without recipients; ErrRecipients; or what the operating
// system says. With one of these the old manifest is in place, unless the error is a
// *FileError whose Op is "sync" (the new one is, but a crash could bring the old one back)
// or "overwrite" (the new one is, durably, and remains of the old one may be on the disk).
func (s *Store) Rekey(ctx context.Context, id ID, identities []age.Identity, recipients []age.Recipient) error {
	if err := checkRecipients(recipients); err != nil {
		return err
	}
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		// Another Rekey may come first. Then what was read no longer matters.
		done, err := s.rekey(ctx, id, identities, recipients)
		if done || err != nil {
			return err
		}
	}
}

// rekey is an attempt at Rekey. It is not done if another manifest has taken the place of the one that it read.
func (s *Store) rekey(ctx context.Context, id ID, identities []age.Identity, recipients []age.Recipient) (done bool, err error) {
	path := s.ManifestPath(id)
	old, err := s.files.Overwrite(path)
	if err != nil {
		return false, fileError("open", path, notFound(err))
	}
	defer old.Close()
	fi, err := old.Stat()
	if err != nil {
		return false, fileError("open", path, err)
	}
	m, err := readManifest(&sourceBlob{Blob: old}, id, identities)
	if err != nil && s.replaced(id, fi) {
		return false, nil
	}
	if err != nil {
		return false, fileError("open", path, err)
	}
	staged, _, err := s.stageManifest(m.rawHeader, m.rawBody, recipients)
	if err != nil {
		return false, fileError("write manifest", path, err)
	}
	defer staged.Discard() //nolint:errcheck // does nothing after Replace
	if err := ctx.Err(); err != nil {
		return false, err
	}
	return s.replaceManifest(id, old, int64(len(m.rawHeader)), staged)
}

// replaceManifest puts a new manifest into the place of the old one, unless that has lost it already.
func (s *Store) replaceManifest(id ID, old overwrittenFile, headerBytes int64, staged stagedFile) (done bool, err error) {
	path := s.ManifestPath(id)
	was, err := old.Stat()
	if err != nil {
		return false, fileError("open", path, err)
	}
	unlock, err := s.lock(true)
	if err != nil {
		return false, err
	}
	defer unlock()
	now, err := s.files.Stat(path)
	if err != nil {
		return false, fileError("replace", path, notFound(err))
	}
	if !os.SameFile(was, now) { // old is open: nobody else can have its number
		return false, nil
	}
	if runtime.GOOS == "windows" {
		old.Close() // what is open can't be replaced there
	}
	if err := staged.Replace(path); err != nil {
		return false, fileError("replace", path, err)
	}
	// Before this the old manifest must stay whole: a crash could bring it back.
	if err := s.files.SyncDir(s.manifests()); err != nil {
		return false, fileError("sync", s.manifests(), err)
	}
	if runtime.GOOS == "windows" {
		return true, nil
	}
	// Who is just reading the header finds what is in the new manifest as well.
	if err := overwrite(old, headerBytes); err != nil {
		return false, fileError("overwrite", path, err)
	}
	return true, nil
}

// replaced reports whether the manifest of a snapshot has become another file than it was, or none.
func (s *Store) replaced(id ID, was fs.FileInfo) bool {
	now, err := s.files.Stat(s.ManifestPath(id))
	if err != nil {
		return errors.Is(err, fs.ErrNotExist)
	}
	// A new file may have got the number of one that is gone.
	return !os.SameFile(was, now) || !was.ModTime().Equal(now.ModTime())
}

// notFound makes an error of opening a manifest ErrNotFound if there is none.
func notFound(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("snapshot %w: %w", ErrNotFound, err)
	}
	return err
}
