package snapshot

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
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

// countingWriter counts bytes, and keeps the error that writing failed with.
type countingWriter struct {
	w   io.Writer
	n   uint64
	err error
}

func (c *countingWriter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += uint64(n)
	if n < len(p) && err == nil {
		err = io.ErrShortWrite // age does not look
	}
	if err != nil {
		c.err = err
	}
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
	rec    packRecord
	source *source
	name   string // in the source
	path   string // the same for messages

	mu     sync.Mutex
	opened *openPack
}

type openPack struct {
	blob  *sourceBlob
	plain io.ReaderAt // what age makes of it
}

func newPackReader(s *source, rec packRecord) *packReader {
	name := packName(rec.id)
	return &packReader{rec: rec, source: s, name: name, path: s.path(name)}
}

// open opens the pack. An error is not kept: what failed for a lack of descriptors may work the next time.
func (p *packReader) open() (*openPack, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.opened != nil {
		return p.opened, nil
	}
	blob, err := p.source.open(p.name)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			err = fmt.Errorf("%w: a pack is missing: %w", ErrCorrupt, err)
		}
		return nil, &FileError{Op: "open pack", Path: p.path, Offset: -1, Err: err}
	}
	plain, err := p.unseal(blob)
	if err != nil {
		blob.Close()
		return nil, &FileError{Op: "open pack", Path: p.path, Offset: -1, Err: err}
	}
	p.opened = &openPack{blob, plain}
	return p.opened, nil
}

// unseal checks that a blob is the pack it should be and returns its plaintext.
func (p *packReader) unseal(blob *sourceBlob) (io.ReaderAt, error) {
	if uint64(blob.Size()) != p.rec.fileSize {
		return nil, fmt.Errorf("%w: pack has %d bytes, not %d", ErrCorrupt, blob.Size(), p.rec.fileSize)
	}
	key, err := age.ParseX25519Identity(p.rec.identity)
	if err != nil {
		return nil, fmt.Errorf("%w: key of the pack: %w", ErrFormat, err)
	}
	// What is needed here is at both ends.
	first, last := p.rec.sealed(0, preambleBytes), p.rec.sealed(p.rec.plainSize-1, p.rec.plainSize)
	defer blob.release(blob.ask(fileRange{0, first.to}, last))
	plain, size, err := age.DecryptReaderAt(blob, blob.Size(), key)
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

// The segments of age, each of which is encrypted by itself.
const (
	segmentBytes = 64 << 10
	segmentTag   = 16 // that follows each in the file
)

// sealed is where the segments lie in the pack's file that hold [from, to) of its plaintext, if the record is right.
func (p *packRecord) sealed(from, to uint64) fileRange {
	count := (p.plainSize + segmentBytes - 1) / segmentBytes
	start := p.fileSize - p.plainSize - count*segmentTag
	end := start + (to+segmentBytes-1)/segmentBytes*(segmentBytes+segmentTag)
	return fileRange{
		from: int64(start + from/segmentBytes*(segmentBytes+segmentTag)),
		to:   int64(min(end, p.fileSize)),
	}
}

// ask has what holds [from, to) of the plaintext read ahead. The result ends that. Errors come when it is read.
func (p *packReader) ask(from, to uint64) (release func()) {
	o, err := p.open()
	if err != nil {
		return func() {}
	}
	windows := o.blob.ask(p.rec.sealed(from, to))
	return func() { o.blob.release(windows) }
}

// readAt fills b from the pack's plaintext.
func (p *packReader) readAt(b []byte, off uint64) error {
	o, err := p.open()
	if err != nil {
		return err
	}
	// age reads one segment after the other.
	defer o.blob.release(o.blob.askAround(p.rec.sealed(off, off+uint64(len(b)))))
	n, err := o.plain.ReadAt(b, int64(off))
	if n == len(b) {
		return nil // an io.ReaderAt may return io.EOF together with the last byte
	}
	return &FileError{Op: "read pack", Path: p.path, Offset: int64(off), Err: packError(err)}
}

func (p *packReader) close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.opened == nil {
		return nil
	}
	err := p.opened.blob.Close()
	p.opened = nil
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
