package secondreader

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
)

type disk struct {
	Name string `json:"name"`
	Size uint64 `json:"size"`
	Base *struct {
		Path   string `json:"path"`
		Size   uint64 `json:"size"`
		SHA256 string `json:"sha256"`
	} `json:"base"`
}

func (m *body) parseDisks() (disks []disk, err error) {
	data := []byte("[]") // without the section there are none
	for _, s := range m.sections {
		if s.name != "disks" {
			continue
		}
		if s.version != 1 {
			return nil, fmt.Errorf("disks: version %d: %w", s.version, ErrNewer)
		}
		data = s.data
	}
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	if err := d.Decode(&disks); err != nil {
		return nil, fmt.Errorf("disks: %w", err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) || disks == nil || len(disks) > 15 {
		return nil, errors.New("disks: not one array of at most 15")
	}
	names := map[string]bool{}
	for _, d := range disks {
		if names[d.Name] || !validName(d.Name) || d.Size == 0 || d.Size%512 != 0 || d.Size > 1<<48 {
			return nil, errors.New("disks: name or size")
		}
		names[d.Name] = true
		if d.Base == nil {
			continue
		}
		sum, err := hex.DecodeString(d.Base.SHA256)
		if err != nil || len(sum) != 32 || hex.EncodeToString(sum) != d.Base.SHA256 || d.Base.Size == 0 || d.Base.Size > d.Size {
			return nil, errors.New("disks: base")
		}
	}
	return disks, nil
}

// Disk returns the contents of disk i; base is the contents of its base image, nil if it has none.
func (s *Snapshot) Disk(i int, base []byte) ([]byte, error) {
	disks, err := s.body.parseDisks()
	if err != nil || i >= len(disks) {
		return nil, fmt.Errorf("disk %d of %d: %w", i, len(disks), err)
	}
	d := disks[i]
	if (d.Base == nil) != (base == nil) {
		return nil, fmt.Errorf("disk %d: with or without a base image?", i)
	}
	if d.Base != nil && (uint64(len(base)) != d.Base.Size || identity(base) != d.Base.SHA256) {
		return nil, fmt.Errorf("disk %d: not its base image", i)
	}
	blocks := (d.Size + 4095) / 4096
	data := make([]byte, 4096*blocks)
	copy(data, base)
	err = s.pages(uint64(i)+1, func(block uint64, b []byte) error {
		if block < blocks {
			copy(data[4096*block:], b)
		}
		return nil
	})
	return data[:d.Size], err
}

func validName(s string) bool {
	const allowed = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_."
	return s != "" && len(s) <= 32 && strings.Trim(s, allowed) == ""
}

// identity is that of a base image.
func identity(image []byte) string {
	h, n := sha256.New(), uint64(len(image))
	for len(image) > 0 {
		piece := image[:min(len(image), 1<<20)]
		sum := sha256.Sum256(piece)
		h.Write(sum[:])
		image = image[len(piece):]
	}
	h.Write(binary.LittleEndian.AppendUint64(nil, n))
	return hex.EncodeToString(h.Sum(nil))
}
