package lifecycle

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strings"

	"filippo.io/age"

	"github.com/cryovisor/cryovisor/blockdev"
	"github.com/cryovisor/cryovisor/snapshot"
)

// OpenedDisk is a disk that no machine has: of a snapshot, or of what a machine has left. It must be closed, and not be written.
type OpenedDisk struct {
	blockdev.Device
	Info DiskInfo

	parts  machineDisk
	reader *snapshot.Reader // closed with it, if not nil
}

// Close gives everything back.
func (d *OpenedDisk) Close() error {
	err := d.parts.close()
	if d.reader != nil {
		err = errors.Join(err, d.reader.Close())
	}
	return err
}

// OpenDiskOptions are the choices of OpenDisk and OpenOverlay.
type OpenDiskOptions struct {
	// Image is where the image under the disk is; empty: where it was.
	Image string
	// Dir remembers the identities of images, as Disks.Dir does; it may be empty.
	Dir string
	// Store and Identities open the snapshot that an overlay lies on. OpenDisk does not need them.
	Store      *snapshot.Store
	Identities []age.Identity
}

// OpenDisk opens a disk of a snapshot, which must stay open for as long as it is. Errors: snapshot.ErrNotFound if there is no disk of
// that name, and those of Resume about images.
func OpenDisk(ctx context.Context, r *snapshot.Reader, name string, opts OpenDiskOptions) (*OpenedDisk, error) {
	infos, err := DisksOf(r)
	if err != nil {
		return nil, err
	}
	for i, info := range infos {
		if info.Name != name {
			continue
		}
		d := &OpenedDisk{Info: info, parts: machineDisk{info: info}}
		if d.Device, err = d.parts.openLayer(ctx, r, i, opts.Image, opts.Dir, 0); err != nil {
			return nil, errors.Join(err, d.Close())
		}
		return d, nil
	}
	return nil, fmt.Errorf("disk %q of snapshot %v: %w", name, r.Header().ID, snapshot.ErrNotFound)
}

// OpenOverlay opens the disk of which a file holds the changes: one that CreateOverlay has made, or that a machine has left
// which ended without a pause. It must not be in use.
func OpenOverlay(ctx context.Context, path string, opts OpenDiskOptions) (*OpenedDisk, error) {
	info, err := blockdev.ReadOverlay(path)
	if err != nil {
		return nil, err
	}
	d, err := openLower(ctx, info, opts)
	if err == nil {
		d.parts.overlay, err = blockdev.OpenOverlay(path, d.Device)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("disk of overlay %s: %w", path, err), d.Close())
	}
	d.Device = d.parts.overlay
	return d, nil
}

// openLower opens what an overlay lies on. It returns what it has opened also with an error.
func openLower(ctx context.Context, info blockdev.OverlayInfo, opts OpenDiskOptions) (*OpenedDisk, error) {
	d := &OpenedDisk{Info: DiskInfo{Size: info.Size}}
	switch info.Lower.Kind {
	case "":
		return d, nil
	case LowerImage:
		err := d.parts.openImage(ctx, cmp.Or(opts.Image, info.Lower.Name), &info.Lower.Identity, opts.Dir)
		d.Device, d.Info.Base = d.parts.device(), d.parts.info.Base
		return d, err
	case LowerSnapshot:
	default:
		return d, fmt.Errorf("%w: it lies on a %q, which is not known here", blockdev.ErrVersion, info.Lower.Kind)
	}
	text, name, _ := strings.Cut(info.Lower.Name, "/")
	id, err := snapshot.ParseID(text)
	if err != nil || opts.Store == nil {
		return d, fmt.Errorf("%w: it lies on snapshot %q, which needs a store", blockdev.ErrOverlay, info.Lower.Name)
	}
	r, err := opts.Store.Open(ctx, id, opts.Identities...)
	if err != nil {
		return d, err
	}
	d.reader = r
	lower, err := OpenDisk(ctx, r, name, opts)
	if err != nil {
		return d, err
	}
	d.Device, d.Info, d.parts.base = lower.Device, lower.Info, lower.parts.base
	if d.Info.Size != info.Size {
		return d, fmt.Errorf("%w: it has %d bytes, the disk under it %d", blockdev.ErrOverlay, info.Size, d.Info.Size)
	}
	return d, nil
}
