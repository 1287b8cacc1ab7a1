package main

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"

	"golang.org/x/sys/unix"
)

// content is n bytes that depend on a job and a step alone.
func content(job, step uint64, n int) []byte {
	var seed [32]byte
	seed[0], seed[1], seed[8], seed[9], seed[10] = byte(job), byte(job>>8), byte(step), byte(step>>8), byte(step>>16)
	b := make([]byte, n)
	_, _ = rand.NewChaCha8(seed).Read(b) // it never fails
	return b
}

const (
	fileCount = 16
	fileSize  = 128 << 10
)

// files writes files in turn, and hashes the one that comes next before it is replaced.
type files struct {
	sums [fileCount][sha256.Size]byte
}

func newFiles() (job, error) {
	f := &files{}
	if err := os.Mkdir("/tmp/files", 0o755); err != nil {
		return nil, err
	}
	for i := range uint64(fileCount) {
		if err := f.write(i, i); err != nil {
			return nil, err
		}
	}
	return f, nil
}

func (f *files) name(i uint64) string { return fmt.Sprintf("/tmp/files/%d", i%fileCount) }

func (f *files) write(i, version uint64) error {
	b := content(1, version, fileSize)
	f.sums[i%fileCount] = sha256.Sum256(b)
	return os.WriteFile(f.name(i), b, 0o644)
}

func (f *files) check(i uint64) error {
	b, err := os.ReadFile(f.name(i))
	if err != nil {
		return err
	}
	if sum := sha256.Sum256(b); sum != f.sums[i%fileCount] {
		return fmt.Errorf("%s: hash %x, want %x", f.name(i), sum[:4], f.sums[i%fileCount][:4])
	}
	return nil
}

func (f *files) step(n uint64) (string, error) {
	if err := f.check(n); err != nil {
		return "", err
	}
	return fmt.Sprintf("sha256=%x", f.sums[n%fileCount][:8]), f.write(n, n+fileCount)
}

func (f *files) finish() error {
	var errs []error
	for i := range uint64(fileCount) {
		errs = append(errs, f.check(i))
	}
	return errors.Join(errs...)
}

const (
	recordSize = 8 << 10
	records    = 64
)

// unlinked appends to a file that has no name any more, and starts over when it is full.
type unlinked struct {
	f     *os.File
	first uint64 // the step that the file begins with
	count uint64
}

func newUnlinked() (job, error) {
	f, err := os.Create("/tmp/unlinked")
	if err != nil {
		return nil, err
	}
	return &unlinked{f: f}, os.Remove(f.Name())
}

func (u *unlinked) step(n uint64) (string, error) {
	if u.count == records {
		if err := u.f.Truncate(0); err != nil {
			return "", err
		}
		u.first, u.count = n, 0
	}
	if _, err := u.f.WriteAt(content(2, n, recordSize), int64(u.count)*recordSize); err != nil {
		return "", err
	}
	u.count++
	return fmt.Sprintf("records=%d", u.count), u.check()
}

func (u *unlinked) check() error {
	got := make([]byte, recordSize)
	for i := range u.count {
		if _, err := u.f.ReadAt(got, int64(i)*recordSize); err != nil {
			return err
		}
		if !bytes.Equal(got, content(2, u.first+i, recordSize)) {
			return fmt.Errorf("record %d of the unlinked file is wrong", u.first+i)
		}
	}
	return nil
}

func (u *unlinked) finish() error { return errors.Join(u.check(), u.f.Close()) }

const mapSize = 1 << 20

// mapped writes a file through one mapping and checks it through another and through read.
type mapped struct {
	f             *os.File
	write, verify []byte
	last          [mapSize / recordSize]uint64 // step + 1 that wrote a record last
}

func newMapped() (job, error) {
	f, err := os.Create("/tmp/mapped")
	if err != nil {
		return nil, err
	}
	m := &mapped{f: f}
	if err := f.Truncate(mapSize); err != nil {
		return nil, err
	}
	if m.write, err = unix.Mmap(int(f.Fd()), 0, mapSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err != nil {
		return nil, os.NewSyscallError("mmap", err)
	}
	if m.verify, err = unix.Mmap(int(f.Fd()), 0, mapSize, unix.PROT_READ, unix.MAP_SHARED); err != nil {
		return nil, os.NewSyscallError("mmap", err)
	}
	return m, nil
}

func (m *mapped) step(n uint64) (string, error) {
	// Far apart, so that many pages get written.
	i := n * 37 % uint64(len(m.last))
	copy(m.write[i*recordSize:], content(3, n, recordSize))
	m.last[i] = n + 1
	return fmt.Sprintf("record=%d", i), m.check()
}

func (m *mapped) check() error {
	read := make([]byte, recordSize)
	for i, last := range m.last {
		if _, err := m.f.ReadAt(read, int64(i)*recordSize); err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		want := make([]byte, recordSize)
		if last > 0 {
			want = content(3, last-1, recordSize)
		}
		if !bytes.Equal(read, want) || !bytes.Equal(m.verify[i*recordSize:(i+1)*recordSize], want) {
			return fmt.Errorf("record %d of the mapped file is wrong", i)
		}
	}
	return nil
}

func (m *mapped) finish() error {
	return errors.Join(m.check(), unix.Munmap(m.write), unix.Munmap(m.verify), m.f.Close())
}

const (
	blockSize = 256 << 10
	maxBlocks = 96
)

// heap holds ever more memory of its own, checks a block of it at each step, and lets most go when it has grown enough.
type heap struct {
	blocks [][]byte
	steps  []uint64
}

func newHeap() (job, error) { return &heap{}, nil }

func (h *heap) step(n uint64) (string, error) {
	if len(h.blocks) == maxBlocks {
		keep := maxBlocks / 4
		clear(h.blocks[keep:])
		h.blocks, h.steps = h.blocks[:keep], h.steps[:keep]
	}
	h.blocks, h.steps = append(h.blocks, content(4, n, blockSize)), append(h.steps, n)
	return fmt.Sprintf("blocks=%d", len(h.blocks)), h.check(int(n * 31 % uint64(len(h.blocks))))
}

func (h *heap) check(i int) error {
	if !bytes.Equal(h.blocks[i], content(4, h.steps[i], blockSize)) {
		return fmt.Errorf("block %d of the heap is wrong", h.steps[i])
	}
	return nil
}

func (h *heap) finish() error {
	var errs []error
	for i := range h.blocks {
		errs = append(errs, h.check(i))
	}
	return errors.Join(errs...)
}
