package lifecycle

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/cryovisor/cryovisor/blockdev"
	"github.com/cryovisor/cryovisor/blockdev/qcow2"
)

// image is a base image that is open.
type image interface {
	blockdev.Device
	io.Closer
}

// openImageFile opens a raw or a qcow2 image, or a block device, for reading. Which of them it is, its first bytes say.
func openImageFile(path string) (image, error) {
	is, err := qcow2.Is(path)
	if err != nil {
		return nil, err
	}
	if is {
		return qcow2.Open(path)
	}
	return blockdev.OpenFile(path, blockdev.Options{ReadOnly: true})
}

// openImage opens the base image of a disk. If want is not nil, it must be that one: the error is a *blockdev.BaseError then.
func (m *machineDisk) openImage(ctx context.Context, path string, want *blockdev.Identity, dir string) error {
	abs, err := filepath.Abs(path)
	if err != nil {
		return err
	}
	base, err := openImageFile(abs)
	if err != nil {
		return err
	}
	have := blockdev.Identity{Size: base.Size()}
	if want == nil || have.Size == want.Size {
		have, err = identify(ctx, abs, base, dir)
	}
	if err == nil && want != nil && have != *want {
		err = &blockdev.BaseError{Path: abs, Want: *want, Have: have}
	}
	if err != nil {
		return errors.Join(err, base.Close())
	}
	m.base = base
	m.info.Base = &BaseInfo{Path: abs, Size: have.Size, SHA256: hex.EncodeToString(have.SHA256[:])}
	return nil
}

// restTime is for how long a file must have been left alone for its times to say that it is unchanged: two changes within one tick of
// a file system's clock look like one. Ticks are some milliseconds, or 2 s on FAT.
const restTime = 3 * time.Second

// identify finds out the identity of an image. To read a large image takes seconds; so what was found is kept in dir, if that is
// not empty, by what the host says of the file: its device and inode, its size, and the times of its last changes.
func identify(ctx context.Context, path string, d blockdev.Device, dir string) (blockdev.Identity, error) {
	key, changed, err := fileKey(path)
	if err != nil {
		return blockdev.Identity{}, fmt.Errorf("identity of %s: %w", path, err)
	}
	keep := dir != "" && key != "" && time.Since(changed) > restTime
	file := ""
	if keep {
		sum := sha256.Sum256([]byte(key))
		file = filepath.Join(dir, "identity-"+hex.EncodeToString(sum[:16]))
		id := blockdev.Identity{Size: d.Size()}
		if b, err := os.ReadFile(file); err == nil && len(b) == len(id.SHA256) {
			copy(id.SHA256[:], b)
			return id, nil
		}
	}
	id, err := blockdev.Identify(ctx, d)
	if err != nil {
		return id, fmt.Errorf("identity of %s: %w", path, err)
	}
	if again, _, err := fileKey(path); keep && err == nil && again == key {
		// Without it, the next one only takes longer.
		_ = writeWhole(file, id.SHA256[:])
	}
	return id, nil
}

// writeWhole makes a file, with all that is to be in it or not at all.
func writeWhole(path string, b []byte) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(path), ".tmp-")
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err = errors.Join(err, f.Sync(), f.Close()); err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	return nil
}
