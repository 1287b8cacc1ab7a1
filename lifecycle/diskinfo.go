package lifecycle

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/cryovisor/cryovisor/blockdev"
	"github.com/cryovisor/cryovisor/snapshot"
	"github.com/cryovisor/cryovisor/vmm"
)

// DiskInfo says what a snapshot holds of a disk; docs/FORMAT.md, "Disks".
type DiskInfo struct {
	Name string    `json:"name"`
	Size int64     `json:"size"` // bytes
	Base *BaseInfo `json:"base,omitempty"`
}

// BaseInfo says what image is under a disk.
type BaseInfo struct {
	Path   string `json:"path"` // where it was
	Size   int64  `json:"size"` // of its contents, in bytes
	SHA256 string `json:"sha256"`
}

// Identity is the image's identity. SHA256 must be 64 digits, as it is in what this package returns.
func (b *BaseInfo) Identity() blockdev.Identity {
	id := blockdev.Identity{Size: b.Size}
	_, _ = hex.Decode(id.SHA256[:], []byte(b.SHA256)[:min(len(b.SHA256), 2*len(id.SHA256))])
	return id
}

// The section in which a snapshot says which disks it has.
const (
	disksSection = "disks"
	disksVersion = 1
)

// DisksOf returns the copy-on-write disks of a snapshot, in the order of their indices in it. An error wraps
// snapshot.ErrFormat, or snapshot.ErrVersion if they are described in a way that this program does not know.
func DisksOf(r *snapshot.Reader) ([]DiskInfo, error) {
	s, err := r.ReadSection(disksSection)
	if errors.Is(err, snapshot.ErrNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if s.Version != disksVersion {
		return nil, fmt.Errorf("%w: section %q is of version %d, this reader knows %d", snapshot.ErrVersion, disksSection, s.Version, disksVersion)
	}
	disks, err := parseDisks(s.Data)
	if err != nil {
		return nil, fmt.Errorf("%w: section %q: %w", snapshot.ErrFormat, disksSection, err)
	}
	return disks, nil
}

func parseDisks(data []byte) ([]DiskInfo, error) {
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	var disks []DiskInfo
	if err := dec.Decode(&disks); err != nil {
		return nil, err
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return nil, errors.New("something follows the disks")
	}
	if disks == nil { // of a null
		return nil, errors.New("it is no array")
	}
	if len(disks) > snapshot.MaxDisks {
		return nil, fmt.Errorf("%d disks", len(disks))
	}
	seen := map[string]bool{}
	for _, d := range disks {
		if err := d.check(); err != nil {
			return nil, fmt.Errorf("disk %q: %w", d.Name, err)
		}
		if seen[d.Name] {
			return nil, fmt.Errorf("two disks are %q", d.Name)
		}
		seen[d.Name] = true
	}
	return disks, nil
}

func (d *DiskInfo) check() error {
	if err := vmm.CheckDiskName(d.Name); err != nil {
		return err
	}
	if d.Size <= 0 || d.Size%blockdev.MinBlockSize != 0 || d.Size > snapshot.DiskStride {
		return fmt.Errorf("a size of %d bytes", d.Size)
	}
	if b := d.Base; b != nil {
		sum, err := hex.DecodeString(b.SHA256)
		if err != nil || hex.EncodeToString(sum) != b.SHA256 || len(sum) != len(blockdev.Identity{}.SHA256) {
			return fmt.Errorf("%q is not the identity of a base image", b.SHA256)
		}
		if b.Size <= 0 || b.Size > d.Size {
			return fmt.Errorf("a base image of %d bytes under a disk of %d", b.Size, d.Size)
		}
	}
	return nil
}

// section is the section that says which disks a machine has; there is none for a machine without.
func (m *Machine) diskSection() ([]snapshot.Section, error) {
	if len(m.disks) == 0 {
		return nil, nil
	}
	data, err := json.Marshal(m.Disks())
	return []snapshot.Section{{Name: disksSection, Version: disksVersion, Critical: true, Data: data}}, err
}

// Overlays are the files with what the machine has changed on its disks; Close says which of them it removes.
func (m *Machine) Overlays() []string {
	var out []string
	for _, d := range m.disks {
		out = append(out, d.overlay.Path())
	}
	return out
}

// Disks are the copy-on-write disks of the machine.
func (m *Machine) Disks() []DiskInfo {
	var out []DiskInfo
	for _, d := range m.disks {
		out = append(out, d.info)
	}
	return out
}
