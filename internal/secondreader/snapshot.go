package secondreader

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"filippo.io/age"
	"github.com/pierrec/lz4/v4"
)

// Snapshot is one whose manifest keeps to the document.
type Snapshot struct {
	dir    string
	header *header
	body   *body
}

// Open reads and checks the manifest of a snapshot, whose packs are read by Pages and Disk.
func Open(dir, name string, identities ...age.Identity) (*Snapshot, error) {
	if raw, err := hex.DecodeString(name); err != nil || len(raw) != 16 || hex.EncodeToString(raw) != name {
		return nil, fmt.Errorf("%q is no id", name)
	}
	b, err := os.ReadFile(filepath.Join(dir, "snapshots", name+".cryo"))
	if err != nil {
		return nil, err
	}
	h, err := parseHeader(b)
	if err != nil {
		return nil, err
	}
	if h.id.String() != name {
		return nil, errors.New("the manifest of another snapshot")
	}
	r, err := age.Decrypt(bytes.NewReader(b[h.size:]), identities...)
	if err != nil {
		return nil, fmt.Errorf("body: %w", err)
	}
	plain, err := io.ReadAll(r)
	if err != nil {
		return nil, fmt.Errorf("body: %w", err)
	}
	m, err := parseBody(plain, h)
	if err != nil {
		return nil, err
	}
	return &Snapshot{dir: dir, header: h, body: m}, nil
}

// Check says whether a manifest is right that consists of this header and of a body with this plaintext.
func Check(header, body []byte) error {
	h, err := parseHeader(header)
	if err != nil {
		return err
	}
	_, err = parseBody(body, h)
	return err
}

// CanRestore says whether a reader that knows these critical sections besides disks, all of version 1, may restore a
// machine from the snapshot.
func (s *Snapshot) CanRestore(known ...string) error {
	version := map[string]uint32{"disks": 1}
	for _, name := range known {
		version[name] = 1
	}
	for _, sec := range s.body.sections {
		if sec.critical && (version[sec.name] == 0 || version[sec.name] != sec.version) {
			return fmt.Errorf("critical section %q, version %d: %w", sec.name, sec.version, ErrNewer)
		}
	}
	return nil
}

// Memory calls yield with each page of memory that the page map names, in ascending order.
func (s *Snapshot) Memory(yield func(page uint64, data []byte) error) error {
	return s.pages(0, yield)
}

// pages yields the mapped pages of memory, which is part 0, or of disk part-1.
func (s *Snapshot) pages(part uint64, yield func(page uint64, data []byte) error) error {
	packs := make([]io.ReaderAt, len(s.body.packs))
	for _, e := range s.body.extents {
		if e.page/diskPages != part {
			continue
		}
		c := s.body.chunks[e.chunk]
		if packs[c.pack] == nil {
			var err error
			if packs[c.pack], err = s.openPack(s.body.packs[c.pack]); err != nil {
				return err
			}
		}
		data, err := c.decode(packs[c.pack])
		if err != nil {
			return fmt.Errorf("chunk %d: %w", e.chunk, err)
		}
		for i := range uint64(e.pages) {
			from := 4096 * (uint64(e.first) + i)
			if err := yield(e.page%diskPages+i, data[from:from+4096]); err != nil {
				return err
			}
		}
	}
	return nil
}

func (s *Snapshot) openPack(p pack) (io.ReaderAt, error) {
	b, err := os.ReadFile(filepath.Join(s.dir, "packs", p.id.String()+".pack"))
	if err != nil {
		return nil, err
	}
	if uint64(len(b)) != p.file {
		return nil, fmt.Errorf("pack %v: size of the file", p.id)
	}
	identity, err := age.ParseX25519Identity(p.key)
	if err != nil {
		return nil, fmt.Errorf("pack %v: its key is none", p.id) // without the error, which might quote it
	}
	r, size, err := age.DecryptReaderAt(bytes.NewReader(b), int64(len(b)), identity)
	if err != nil {
		return nil, fmt.Errorf("pack %v: %w", p.id, err)
	}
	if uint64(size) != p.plain {
		return nil, fmt.Errorf("pack %v: size of the plaintext", p.id)
	}
	var pre [preamble]byte
	if _, err := r.ReadAt(pre[:], 0); err != nil {
		return nil, fmt.Errorf("pack %v: %w", p.id, err)
	}
	want := binary.LittleEndian.AppendUint32([]byte("CRYOPACK"), 1)
	want = append(want, 0, 0, 0, 0)
	want = append(append(want, p.origin[:]...), p.id[:]...)
	if !bytes.Equal(pre[:], want) {
		return nil, fmt.Errorf("pack %v: preamble", p.id)
	}
	return r, nil
}

func (c chunk) decode(pack io.ReaderAt) ([]byte, error) {
	stored := make([]byte, c.length)
	if _, err := pack.ReadAt(stored, int64(c.offset)); err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	if c.codec == 1 {
		return stored, nil
	}
	data := make([]byte, 4096*c.pages)
	n, err := lz4.UncompressBlock(stored, data)
	if err != nil || n != len(data) {
		return nil, fmt.Errorf("LZ4: %d of %d bytes (%w)", n, len(data), err)
	}
	return data, nil
}
