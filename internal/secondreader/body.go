package secondreader

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"strings"
)

const (
	bodyFixed   = 64
	packRecord  = 128
	chunkRecord = 24
	extRecord   = 20
	preamble    = 48 // of a pack's plaintext
	maxFile     = 1 << 60
	bech32      = "QPZRY9X8GF2TVDW0S3JN54KHCE6MUA7L"
)

type pack struct {
	id, origin id
	plain      uint64
	file       uint64
	key        string
}

type chunk struct {
	offset              uint64
	pack, length, pages uint32
	codec               uint32
}

type extent struct {
	page                uint64
	pages, chunk, first uint32
}

type section struct {
	name     string
	critical bool
	version  uint32
	data     []byte
}

type body struct {
	packs    []pack
	chunks   []chunk
	extents  []extent
	sections []section
}

// parseBody reads the plaintext of a manifest's body.
func parseBody(b []byte, h *header) (*body, error) {
	if len(b) < bodyFixed || string(b[:8]) != "CRYOBODY" {
		return nil, errors.New("body: wrong magic")
	}
	if [32]byte(b[8:40]) != h.checksum {
		return nil, errors.New("body: of another header")
	}
	le := binary.LittleEndian
	packs, chunks, extents, sections := le.Uint32(b[40:]), le.Uint32(b[44:]), le.Uint32(b[48:]), le.Uint32(b[52:])
	tables := uint64(packs)*packRecord + uint64(chunks)*chunkRecord + uint64(extents)*extRecord
	switch {
	case uint64(packs) != uint64(len(h.packs)):
		return nil, errors.New("body: number of packs")
	case extents == math.MaxUint32:
		return nil, errors.New("body: number of extents")
	case sections > 4096:
		return nil, errors.New("body: number of sections")
	case le.Uint64(b[56:]) != 0:
		return nil, errors.New("body: reserved bytes")
	case tables > uint64(len(b)-bodyFixed):
		return nil, errors.New("body: cut short")
	}
	m := &body{}
	b = b[bodyFixed:]
	for ; packs > 0; packs-- {
		p, err := parsePack(b[:packRecord])
		if err != nil {
			return nil, err
		}
		m.packs, b = append(m.packs, p), b[packRecord:]
	}
	for ; chunks > 0; chunks-- {
		m.chunks = append(m.chunks, chunk{
			offset: le.Uint64(b), pack: le.Uint32(b[8:]), length: le.Uint32(b[12:]),
			pages: le.Uint32(b[16:]), codec: le.Uint32(b[20:]),
		})
		b = b[chunkRecord:]
	}
	for ; extents > 0; extents-- {
		m.extents = append(m.extents, extent{
			page: le.Uint64(b), pages: le.Uint32(b[8:]), chunk: le.Uint32(b[12:]), first: le.Uint32(b[16:]),
		})
		b = b[extRecord:]
	}
	if err := m.parseSections(b, sections); err != nil {
		return nil, err
	}
	return m, m.check(h)
}

func parsePack(b []byte) (p pack, err error) {
	le := binary.LittleEndian
	p = pack{id: id(b[:16]), origin: id(b[16:32]), plain: le.Uint64(b[32:]), file: le.Uint64(b[40:]), key: string(b[48:122])}
	switch {
	case p.origin == id{}:
		return p, errors.New("pack table: no origin")
	case p.plain <= preamble || p.file <= p.plain || p.file > maxFile:
		return p, fmt.Errorf("pack table: sizes %d and %d", p.plain, p.file)
	case !strings.HasPrefix(p.key, "AGE-SECRET-KEY-1") || strings.Trim(p.key[16:], bech32) != "":
		return p, errors.New("pack table: not an age key")
	case [6]byte(b[122:]) != [6]byte{}:
		return p, errors.New("pack table: reserved bytes")
	}
	return p, nil
}

func (m *body) parseSections(b []byte, n uint32) error {
	for ; n > 0; n-- {
		if len(b) < 16 {
			return errors.New("sections: cut short")
		}
		name, flags, size := uint64(b[0]), b[1], binary.LittleEndian.Uint64(b[8:])
		if name < 1 || name > 64 || flags > 1 || b[2] != 0 || b[3] != 0 {
			return errors.New("sections: length of the name, flags or reserved bytes")
		}
		if rest := uint64(len(b) - 16); rest < name || rest-name < size {
			return errors.New("sections: cut short")
		}
		s := section{
			name: string(b[16 : 16+name]), critical: flags == 1,
			version: binary.LittleEndian.Uint32(b[4:]), data: b[16+name : 16+name+size],
		}
		if strings.Trim(s.name, "abcdefghijklmnopqrstuvwxyz0123456789.-_/") != "" {
			return fmt.Errorf("sections: name %q", s.name)
		}
		if k := len(m.sections); k > 0 && s.name <= m.sections[k-1].name {
			return errors.New("sections: not ascending")
		}
		m.sections, b = append(m.sections, s), b[16+name+size:]
	}
	if len(b) > 0 {
		return errors.New("body: bytes behind the last section")
	}
	return nil
}
