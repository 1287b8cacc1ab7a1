package snapshot

import (
	"context"
	"errors"
	"fmt"
	"io/fs"

	"filippo.io/age"
)

// The classes of errors, for errors.Is. Errors of the operating system (ENOSPC,
// EROFS, EACCES, fs.ErrNotExist and the like) are wrapped, never replaced, so
// errors.Is finds them too.
var (
	// ErrFormat: the bytes are not a snapshot, or break a rule of the format.
	ErrFormat = errors.New("not a valid snapshot")
	// ErrVersion: the snapshot needs a newer reader than this one.
	ErrVersion = errors.New("snapshot needs a newer version of this program")
	// ErrCorrupt: the bytes were a snapshot, and have been damaged, truncated,
	// swapped or removed since.
	ErrCorrupt = errors.New("snapshot is damaged")
	// ErrKey: none of the identities opens the snapshot.
	ErrKey = errors.New("no identity opens this snapshot")
	// ErrRecipients: nothing can be encrypted to these recipients, because age does not
	// allow them together or because one of them (a plugin) failed.
	ErrRecipients = errors.New("can't encrypt to these recipients")
	// ErrNotFound: the store has no such snapshot, or the snapshot no such section.
	ErrNotFound = errors.New("not found")
	// ErrExists: the store already has a file of that name.
	ErrExists = errors.New("already exists")
	// ErrInvalid: the caller passed something that can't be stored.
	ErrInvalid = errors.New("invalid argument")
	// ErrClosed: the Reader or Writer was closed, committed or aborted before.
	ErrClosed = errors.New("already closed")
)

// FileError says which file of a store an operation failed on, and where.
type FileError struct {
	Op     string // what was being done: "open", "read", "write", ...
	Path   string // the file
	Offset int64  // byte offset in the file or, in a pack, in its plaintext; -1 if unknown
	Err    error
}

// Error implements error.
func (e *FileError) Error() string {
	if e.Offset < 0 {
		return fmt.Sprintf("snapshot: %s %s: %v", e.Op, e.Path, e.Err)
	}
	return fmt.Sprintf("snapshot: %s %s at %d: %v", e.Op, e.Path, e.Offset, e.Err)
}

// Unwrap returns the cause.
func (e *FileError) Unwrap() error { return e.Err }

// Temporary reports whether the same call may succeed later: it was the storage that failed, and neither the data, the
// key nor the caller.
func (e *FileError) Temporary() bool {
	for _, final := range []error{
		ErrFormat, ErrVersion, ErrCorrupt, ErrKey, ErrRecipients, ErrNotFound, ErrExists, ErrInvalid, ErrClosed,
		fs.ErrNotExist, fs.ErrPermission, context.Canceled,
	} {
		if errors.Is(e.Err, final) {
			return false
		}
	}
	return true
}

// ParseError says which rule of the format some bytes break, and where.
type ParseError struct {
	Part   string // "header", "body", "pack" or "chunk"
	Offset int64  // of the field, from the start of the part
	Err    error  // wraps ErrFormat, ErrVersion or ErrCorrupt
}

// Error implements error.
func (e *ParseError) Error() string {
	return fmt.Sprintf("%s, byte %d: %v", e.Part, e.Offset, e.Err)
}

// Unwrap returns the cause.
func (e *ParseError) Unwrap() error { return e.Err }

// parseError makes a ParseError of a class with a formatted explanation.
func parseError(class error, part string, offset int, format string, args ...any) error {
	return &ParseError{
		Part:   part,
		Offset: int64(offset),
		Err:    fmt.Errorf("%w: %s", class, fmt.Sprintf(format, args...)),
	}
}

// decryptError gives an error of age the class that it deserves: the key, the
// storage, or the data.
func decryptError(err error) error {
	if nm := (*age.NoIdentityMatchError)(nil); errors.As(err, &nm) || errors.Is(err, age.ErrIncorrectIdentity) {
		return fmt.Errorf("%w: %w", ErrKey, err)
	}
	if ie := (*identityError)(nil); errors.As(err, &ie) {
		return fmt.Errorf("%w: %w", ErrKey, ie.error)
	}
	if isStorage(err) {
		return err
	}
	return fmt.Errorf("%w: %w", ErrCorrupt, err)
}

// storageError is an error of a Blob: nothing is known of the data.
type storageError struct{ error }

func (e *storageError) Unwrap() error { return e.error }

func isStorage(err error) bool {
	se := (*storageError)(nil)
	return errors.As(err, &se)
}

func isKey(err error) bool { return errors.Is(err, ErrKey) }

// identityError is an identity's failure to do its work (a plugin that does not
// run, a passphrase that costs too much to try), as opposed to not fitting.
type identityError struct{ error }

// markedIdentity tells its failures from those of the data.
type markedIdentity struct{ age.Identity }

func (m markedIdentity) Unwrap(stanzas []*age.Stanza) ([]byte, error) {
	key, err := m.Identity.Unwrap(stanzas)
	if err != nil && !errors.Is(err, age.ErrIncorrectIdentity) {
		err = &identityError{err}
	}
	return key, err
}

// markIdentities marks all but those that only compute: if they fail, the data
// is to blame, and age tries them first.
func markIdentities(identities []age.Identity) []age.Identity {
	out := make([]age.Identity, len(identities))
	for i, id := range identities {
		switch id.(type) {
		case *age.X25519Identity, *age.HybridIdentity:
			out[i] = id
		default:
			out[i] = markedIdentity{id}
		}
	}
	return out
}
