package lifecycle

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"

	"filippo.io/age"

	"github.com/cryovisor/cryovisor/internal/catalog"
)

// KeyProvider guards the keys of snapshots. Each sandbox and template has an age identity of its own, to which its snapshots are encrypted; what the
// catalog has of it is sealed by the KeyProvider. Its methods may be called from several goroutines.
type KeyProvider interface {
	// Seal encrypts a secret. It is bound to id: Open with another must fail.
	Seal(ctx context.Context, id string, secret []byte) (sealed []byte, err error)
	// Open is its inverse. It opens what was sealed before a Rotate too, until Retire.
	Open(ctx context.Context, id string, sealed []byte) (secret []byte, err error)
	// Rotate makes a new master key, which Seal uses from then on.
	Rotate(ctx context.Context) error
	// Retire forgets, for good, the master keys from before the last Rotate: nothing is sealed with them any more.
	Retire(ctx context.Context) error
}

// ErrKey says that a master key is missing, is not to be trusted, or does not fit.
var ErrKey = errors.New("master key")

// errNoSecret says that nothing was sealed for a sandbox or template.
var errNoSecret = errors.New("the catalog has no key")

// LocalKeys is a KeyProvider with a file of age identities: the first seals, each opens.
type LocalKeys struct {
	path string

	mu         sync.RWMutex
	identities []*age.X25519Identity
}

// OpenLocalKeys reads the identity file at path, and makes one, with mode 0600, if there is none. A file that others can read is refused. Keep a copy of
// it: without it no snapshot can be opened. Errors: ErrKey.
func OpenLocalKeys(path string) (*LocalKeys, error) {
	k := &LocalKeys{path: path}
	err := k.read()
	if errors.Is(err, fs.ErrNotExist) {
		if err = os.MkdirAll(filepath.Dir(path), 0o700); err == nil {
			err = k.Rotate(context.Background())
		}
	}
	if err != nil {
		return nil, fmt.Errorf("%w %s: %w", ErrKey, path, err)
	}
	return k, nil
}

func (k *LocalKeys) read() error {
	f, err := os.Open(k.path)
	if err != nil {
		return err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return err
	}
	if runtime.GOOS != "windows" && fi.Mode().Perm()&0o077 != 0 {
		return fmt.Errorf("it can be read by others (mode %v); run 'chmod 600' on it, and change the key if others may have", fi.Mode().Perm())
	}
	identities, err := age.ParseIdentities(io.LimitReader(f, 1<<20))
	if err != nil {
		return errors.New("it is not an age identity file") // age's error may quote it
	}
	for _, id := range identities {
		x, ok := id.(*age.X25519Identity)
		if !ok {
			return fmt.Errorf("it holds a %T; only X25519 identities are supported", id)
		}
		k.identities = append(k.identities, x)
	}
	return nil
}

// Seal implements KeyProvider.
func (k *LocalKeys) Seal(_ context.Context, id string, secret []byte) ([]byte, error) {
	k.mu.RLock()
	defer k.mu.RUnlock()
	var sealed bytes.Buffer
	w, err := age.Encrypt(&sealed, k.identities[0].Recipient())
	if err != nil {
		return nil, err
	}
	// The id and its length come first, as what is sealed for one sandbox is not to be passed off as another's.
	plain := binary.LittleEndian.AppendUint32(nil, uint32(len(id)))
	if _, err := w.Write(append(append(plain, id...), secret...)); err != nil {
		return nil, err
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return sealed.Bytes(), nil
}

// Open implements KeyProvider.
func (k *LocalKeys) Open(_ context.Context, id string, sealed []byte) ([]byte, error) {
	k.mu.RLock()
	defer k.mu.RUnlock()
	all := make([]age.Identity, len(k.identities))
	for i, x := range k.identities {
		all[i] = x
	}
	r, err := age.Decrypt(bytes.NewReader(sealed), all...)
	if err != nil {
		return nil, fmt.Errorf("%w %s does not open the key of %s: %w", ErrKey, k.path, id, err)
	}
	plain, err := io.ReadAll(r)
	if err != nil {
		return nil, fmt.Errorf("%w %s: key of %s: %w", ErrKey, k.path, id, err)
	}
	prefix := append(binary.LittleEndian.AppendUint32(nil, uint32(len(id))), id...)
	secret, ok := bytes.CutPrefix(plain, prefix)
	if !ok {
		return nil, fmt.Errorf("%w %s: what is there for %s was sealed for another", ErrKey, k.path, id)
	}
	return secret, nil
}

// Rotate implements KeyProvider. The new identity is on stable storage when it returns.
func (k *LocalKeys) Rotate(context.Context) error {
	fresh, err := age.GenerateX25519Identity()
	if err != nil {
		return err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.write(append([]*age.X25519Identity{fresh}, k.identities...))
}

// Retire implements KeyProvider.
func (k *LocalKeys) Retire(context.Context) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.write(k.identities[:1])
}

// write replaces the file, so that at each moment there is a whole one, and overwrites the old one.
func (k *LocalKeys) write(identities []*age.X25519Identity) error {
	var text strings.Builder
	text.WriteString("# Master keys of a data directory: the first is in use. Keep a copy.\n")
	for _, id := range identities {
		fmt.Fprintf(&text, "# public key: %s\n%s\n", id.Recipient(), id)
	}
	old, err := os.OpenFile(k.path, os.O_WRONLY, 0)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := writeDurably(k.path, []byte(text.String())); err != nil {
		if old != nil {
			_ = old.Close()
		}
		return err
	}
	k.identities = identities
	if old == nil {
		return nil
	}
	return shred(old)
}

// writeDurably makes or replaces a file of mode 0600.
func writeDurably(path string, contents []byte) error {
	f, err := os.CreateTemp(filepath.Dir(path), ".tmp-")
	if err != nil {
		return err
	}
	_, err = f.Write(contents)
	if err = errors.Join(err, f.Sync(), f.Close()); err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	return syncDir(filepath.Dir(path))
}

func syncDir(path string) error {
	dir, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

// shred overwrites a file that has no name any more, and closes it.
func shred(f *os.File) error {
	fi, err := f.Stat()
	if err == nil {
		_, err = f.WriteAt(make([]byte, fi.Size()), 0)
	}
	return errors.Join(err, f.Sync(), f.Close())
}

// identity returns the key of a sandbox's or template's snapshots.
func (m *Manager) identity(ctx context.Context, id string) (*age.X25519Identity, error) {
	sealed, err := m.catalog.Secret(ctx, id)
	if err != nil {
		return nil, err
	}
	if sealed == nil {
		return nil, fmt.Errorf("%w: %w for %s: its snapshots can't be opened", ErrKey, errNoSecret, id)
	}
	secret, err := m.keys.Open(ctx, id, sealed)
	if err != nil {
		return nil, err
	}
	identity, err := age.ParseX25519Identity(string(secret))
	if err != nil {
		return nil, fmt.Errorf("%w: what was sealed for %s is no identity", ErrKey, id)
	}
	return identity, nil
}

// withSealed calls put with a sealed key, between which two no other master key comes.
func (m *Manager) withSealed(ctx context.Context, id string, identity *age.X25519Identity, put func(sealed []byte) error) error {
	m.sealing.RLock()
	defer m.sealing.RUnlock()
	sealed, err := m.keys.Seal(ctx, id, []byte(identity.String()))
	if err != nil {
		return fmt.Errorf("seal the key of %s: %w", id, err)
	}
	return put(sealed)
}

// rotate seals all keys with a new master key. Whatever ends it in between, each key can be opened.
func rotate(ctx context.Context, keys KeyProvider, c *catalog.Catalog) error {
	if err := keys.Rotate(ctx); err != nil {
		return err
	}
	err := c.Reseal(ctx, func(id string, sealed []byte) ([]byte, error) {
		secret, err := keys.Open(ctx, id, sealed)
		if err != nil {
			return nil, err
		}
		return keys.Seal(ctx, id, secret)
	})
	if err != nil {
		return err
	}
	return keys.Retire(ctx)
}
