package lifecycle

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/cryovisor/cryovisor/blockdev"
	"github.com/cryovisor/cryovisor/snapshot"
	"github.com/cryovisor/cryovisor/vmm"
)

// Disk is a copy-on-write disk that a machine is booted with. A pause stores what the machine has
// changed on it together with the memory, and a resume brings both back.
type Disk struct {
	// Name identifies the disk; the rule is that of vmm.Disk.Name.
	Name string
	// Image is a file that is never written: a raw image, a qcow2 image without a backing file, or a
	// block device; its first bytes say which. It must stay as it is for as long as there are snapshots
	// of the machine. Empty: the disk is blank.
	Image string
	// Overlay, in place of Image and Size, is a file that CreateOverlay or an earlier machine has made; the machine goes on
	// writing to it. When a pause has stored what is in it, the file is removed.
	Overlay string
	// Size of the disk in bytes, a multiple of 512; 0 means the image's. A disk may be larger than its image.
	Size int64
}

// Disks are the copy-on-write disks of a machine and where they live while it runs.
type Disks struct {
	// Dir is where the machine's changes to its disks are kept while it runs: in files named
	// after the disks, sparse and not encrypted. It also remembers the identities of images, which take
	// time to find out. It is made with mode 0700. Empty will do for a machine without such disks.
	Dir string
	// Boot are the disks of a machine that is booted; Resume looks into the snapshot instead.
	Boot []Disk
	// Images says where the images under a resumed machine's disks are, by the name of the disk. Those that are not
	// named are where they were.
	Images map[string]string
	// CacheBytes is how much of each disk of a snapshot is remembered in memory; 0 is blockdev.DefaultCacheBytes.
	CacheBytes int
	// OnError, if not nil, is told of every operation on a disk that failed; the guest learns only that one did. It is
	// called from several goroutines.
	OnError func(disk string, err error)
}

// machineDisk is a copy-on-write disk of a machine, and what is under it.
type machineDisk struct {
	info    DiskInfo
	base    image // closed after overlay; nil if there is none
	overlay *blockdev.Overlay
	// durable says that all that was in the overlay at a moment is in a snapshot as well, or was nothing, and writes is
	// Overlay.Writes of that moment.
	durable bool
	writes  uint64
}

// What overlays lie on: blockdev.Lower.Kind, which is empty for one on nothing.
const (
	LowerImage    = "image"
	LowerSnapshot = "snapshot" // its name is the snapshot's id, a slash and the disk's name
)

// bootDisk makes the disk of a machine that is booted.
func (d *Disks) bootDisk(ctx context.Context, want Disk) (*machineDisk, error) {
	if want.Overlay != "" {
		if want.Image != "" || want.Size != 0 {
			return nil, fmt.Errorf("%w: it is overlay %s, and has an image or a size besides", vmm.ErrConfig, want.Overlay)
		}
		return d.reopen(ctx, want)
	}
	m := &machineDisk{info: DiskInfo{Name: want.Name}}
	lower, err := m.openNew(ctx, want, d.Dir)
	if err != nil {
		return nil, err
	}
	return m, m.begin(d.Dir, lower, m.device())
}

// openNew opens the image under a new disk, if there is one, and finds out the disk's size.
func (m *machineDisk) openNew(ctx context.Context, want Disk, dir string) (blockdev.Lower, error) {
	m.info.Size = want.Size
	if want.Image == "" {
		return blockdev.Lower{}, nil
	}
	if err := m.openImage(ctx, want.Image, nil, dir); err != nil {
		return blockdev.Lower{}, err
	}
	m.info.Size = cmp.Or(want.Size, m.info.Base.Size)
	return blockdev.Lower{Kind: LowerImage, Name: m.info.Base.Path, Identity: m.info.Base.Identity()}, nil
}

// reopen goes on with an overlay that was made before.
func (d *Disks) reopen(ctx context.Context, want Disk) (*machineDisk, error) {
	info, err := blockdev.ReadOverlay(want.Overlay)
	if err != nil {
		return nil, err
	}
	m := &machineDisk{info: DiskInfo{Name: want.Name, Size: info.Size}}
	switch info.Lower.Kind {
	case "":
	case LowerImage:
		if err := m.openImage(ctx, info.Lower.Name, &info.Lower.Identity, d.Dir); err != nil {
			return nil, fmt.Errorf("the image under overlay %s: %w", want.Overlay, err)
		}
	default:
		return nil, fmt.Errorf("%w: %s holds what a machine changed after %s %s, whose memory it belongs to; its disk can be exported",
			blockdev.ErrNotDisk, want.Overlay, info.Lower.Kind, info.Lower.Name)
	}
	m.overlay, err = blockdev.OpenOverlay(want.Overlay, m.device())
	return m, err
}

// resumeDisk makes the disk of a machine that goes on from a snapshot, in which it has an index.
func (d *Disks) resumeDisk(ctx context.Context, r *snapshot.Reader, index int, info DiskInfo) (*machineDisk, error) {
	m := &machineDisk{info: info}
	layer, err := m.openLayer(ctx, r, index, d.Images[info.Name], d.Dir, d.CacheBytes)
	if err != nil {
		return m, err
	}
	return m, m.begin(d.Dir, snapshotLower(r.Header().ID, info), layer)
}

// snapshotLower names the disk of a snapshot as what is under an overlay.
func snapshotLower(id snapshot.ID, info DiskInfo) blockdev.Lower {
	return blockdev.Lower{
		Kind: LowerSnapshot, Name: id.String() + "/" + info.Name, Identity: blockdev.Identity{Size: info.Size},
	}
}

// openLayer opens the disk of a snapshot for reading, with the image under it, which is at path if that is not empty.
func (m *machineDisk) openLayer(
	ctx context.Context, r *snapshot.Reader, index int, path, dir string, cacheBytes int,
) (*blockdev.Layer, error) {
	if want := m.info.Base; want != nil {
		identity := want.Identity()
		if err := m.openImage(ctx, cmp.Or(path, want.Path), &identity, dir); err != nil {
			return nil, fmt.Errorf("the image under disk %q (if it has moved, say where it is): %w", m.info.Name, err)
		}
	} else if path != "" {
		return nil, fmt.Errorf("%w: disk %q has no image under it, and %s was given", blockdev.ErrNotDisk, m.info.Name, path)
	}
	return blockdev.NewLayer(r.Disk(index), m.device(), m.info.Size, cacheBytes), nil
}

// device is what is under the snapshot's blocks: nil if there is nothing.
func (m *machineDisk) device() blockdev.Device {
	if m.base == nil {
		return nil
	}
	return m.base
}

// begin makes the overlay.
func (m *machineDisk) begin(dir string, lower blockdev.Lower, below blockdev.Device) error {
	if dir == "" {
		return fmt.Errorf("%w: disk %q needs a directory for what the machine writes; set Disks.Dir", vmm.ErrConfig, m.info.Name)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("directory for disks: %w", err)
	}
	path := filepath.Join(dir, m.info.Name+"-"+rand.Text()+overlayExt)
	var err error
	m.overlay, err = blockdev.CreateOverlay(path, below, blockdev.OverlayOptions{Size: m.info.Size, Lower: lower})
	m.durable = true
	return err
}

// overlayExt ends the names of the files of overlays.
const overlayExt = ".overlay"

// CreateOverlay makes a file for Disk.Overlay: a disk that is as an image is, or blank, and that machines may be booted with one
// after another. identities is a directory that remembers the identities of images, as Disks.Dir does; it may be empty.
func CreateOverlay(ctx context.Context, path string, disk Disk, identities string) error {
	m := &machineDisk{}
	lower, err := m.openNew(ctx, disk, identities)
	if err != nil {
		return err
	}
	o, err := blockdev.CreateOverlay(path, m.device(), blockdev.OverlayOptions{Size: m.info.Size, Lower: lower})
	if err == nil {
		err = o.Close()
	}
	return errors.Join(err, m.closeBase())
}

func (m *machineDisk) closeBase() error {
	if m.base == nil {
		return nil
	}
	return m.base.Close()
}

// close gives the disk back. The overlay's file is removed if a snapshot has all that is in it, or there is nothing.
func (m *machineDisk) close() error {
	if m.overlay == nil || m.durable && m.writes == m.overlay.Writes() {
		return m.remove()
	}
	return errors.Join(m.overlay.Close(), m.closeBase())
}

// remove gives the disk back, and removes the overlay's file.
func (m *machineDisk) remove() error {
	if m.overlay == nil {
		return m.closeBase()
	}
	return errors.Join(m.overlay.Remove(), m.closeBase())
}

// hardware adds the disks to those of the embedder's, before them, without changing the embedder's.
func (m *Machine) hardware(hw vmm.Hardware, onError func(disk string, err error)) vmm.Hardware {
	var disks []vmm.Disk
	for _, d := range m.disks {
		disk := vmm.Disk{Name: d.info.Name, Device: d.overlay, Captured: true}
		if onError != nil {
			disk.OnError = func(err error) { onError(d.info.Name, err) }
		}
		disks = append(disks, disk)
	}
	hw.Disks = slices.Concat(disks, hw.Disks)
	return hw
}
