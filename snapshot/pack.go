package snapshot

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"

	"filippo.io/age"
)

const (
	packMagic     = "CRYOPACK"
	preambleBytes = 48
)

// preamble returns what a pack's plaintext starts with. All packs of a snapshot
// have one key, and to age one file for that key is as good as another: the
// preamble tells them apart.
func preamble(origin, id ID) []byte {
	b := make([]byte, 0, preambleBytes)
	b = append(b, packMagic...)
	b = binary.LittleEndian.AppendUint32(b, Version)
	b = binary.LittleEndian.AppendUint32(b, 0) // reserved
	b = append(b, origin[:]...)
	return append(b, id[:]...)
}

// checkPreamble checks the first preambleBytes of a pack's plaintext.
func checkPreamble(b []byte, origin, id ID) error {
	if len(b) < preambleBytes || string(b[:8]) != packMagic {
		return parseError(ErrFormat, "pack", 0, "does not start with the magic number, or is too short")
	}
	if v := binary.LittleEndian.Uint32(b[8:]); v == 0 || binary.LittleEndian.Uint32(b[12:]) != 0 {
		return parseError(ErrFormat, "pack", 8, "version is 0, or reserved bytes are not")
	} else if v > Version {
		return parseError(ErrVersion, "pack", 8, "version %d, this reader knows 1 to %d", v, Version)
	}
	if have := ID(b[16:32]); have != origin {
		return parseError(ErrCorrupt, "pack", 16, "belongs to snapshot %v, not %v", have, origin)
	}
	if have := ID(b[32:48]); have != id {
		return parseError(ErrCorrupt, "pack", 32, "is pack %v, not %v", have, id)
	}
	return nil
}

// packWriter writes one pack; it belongs to one goroutine at a time.
type packWriter struct {
	id     ID
	file   stagedFile
	sink   countingWriter
	sealer io.WriteCloser // age
	offset uint64         // of the next chunk in the plaintext
}

type countingWriter struct {
	w io.Writer
	n uint64
}

func (c *countingWriter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += uint64(n)
	return n, err
}

// newPackWriter starts a pack in file, which it owns from now on, and discards
// if it fails.
func newPackWriter(file stagedFile, origin ID, to age.Recipient) (*packWriter, error) {
	p := &packWriter{id: NewID(), file: file}
	p.sink.w = file
	var err error
	if p.sealer, err = age.Encrypt(&p.sink, to); err != nil {
		return nil, errors.Join(err, file.Discard())
	}
	if _, err := p.append(preamble(origin, p.id)); err != nil {
		return nil, errors.Join(err, file.Discard())
	}
	return p, nil
}

// append adds a chunk's stored bytes and returns their offset.
func (p *packWriter) append(b []byte) (uint64, error) {
	at := p.offset
	n, err := p.sealer.Write(b)
	p.offset += uint64(n)
	return at, err
}

// finish ends the age file and waits until it is on stable storage.
func (p *packWriter) finish() error {
	if err := p.sealer.Close(); err != nil {
		return err
	}
	return p.file.Sync()
}

// packReader opens a pack when it is first needed, and once.
type packReader struct {
	rec  packRecord
	path string

	mu    sync.Mutex
	file  *os.File
	plain io.ReaderAt
}

// open returns the pack's plaintext. An error is not kept: what failed for a
// lack of descriptors may work the next time.
func (p *packReader) open() (io.ReaderAt, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.plain != nil {
		return p.plain, nil
	}
	file, err := os.Open(p.path)
	if err != nil {
		if os.IsNotExist(err) {
			err = fmt.Errorf("%w: a pack is missing: %w", ErrCorrupt, err)
		}
		return nil, &FileError{Op: "open pack", Path: p.path, Offset: -1, Err: err}
	}
	plain, err := p.unseal(file)
	if err != nil {
		file.Close()
		return nil, &FileError{Op: "open pack", Path: p.path, Offset: -1, Err: err}
	}
	p.file, p.plain = file, plain
	return plain, nil
}

// unseal checks that file is the pack it should be and returns its plaintext.
func (p *packReader) unseal(file *os.File) (io.ReaderAt, error) {
	fi, err := file.Stat()
	if err != nil {
		return nil, err
	}
	if uint64(fi.Size()) != p.rec.fileSize {
		return nil, fmt.Errorf("%w: pack has %d bytes, not %d", ErrCorrupt, fi.Size(), p.rec.fileSize)
	}
	key, err := age.ParseX25519Identity(p.rec.identity)
	if err != nil {
		return nil, fmt.Errorf("%w: key of the pack: %w", ErrFormat, err)
	}
	plain, size, err := age.DecryptReaderAt(file, fi.Size(), key)
	if err != nil {
		return nil, packError(err)
	}
	if uint64(size) != p.rec.plainSize {
		return nil, fmt.Errorf("%w: pack has %d bytes of plaintext, not %d", ErrCorrupt, size, p.rec.plainSize)
	}
	b := make([]byte, preambleBytes)
	if _, err := io.ReadFull(io.NewSectionReader(plain, 0, preambleBytes), b); err != nil {
		return nil, packError(err)
	}
	return plain, checkPreamble(b, p.rec.origin, p.rec.id)
}

// readAt fills b from the pack's plaintext.
func (p *packReader) readAt(b []byte, off uint64) error {
	plain, err := p.open()
	if err != nil {
		return err
	}
	n, err := plain.ReadAt(b, int64(off))
	if n == len(b) {
		return nil // an io.ReaderAt may return io.EOF together with the last byte
	}
	return &FileError{Op: "read pack", Path: p.path, Offset: int64(off), Err: packError(err)}
}

func (p *packReader) close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.file == nil {
		return nil
	}
	err := p.file.Close()
	p.file, p.plain = nil, nil
	return err
}

// packError classes an error of age on a pack. The key comes from the manifest,
// so a pack that it does not open is a foreign or a damaged one.
func packError(err error) error {
	err = decryptError(err)
	if isKey(err) {
		return fmt.Errorf("%w: the pack was not written with the key in the manifest", ErrCorrupt)
	}
	return err
}
