//go:build linux && amd64

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/dustin/go-humanize"
	"golang.org/x/sync/errgroup"
)

// pieceBytes is how much memory is compared at once.
const pieceBytes = 1 << 20

// errDiffers says that what was loaded is not what was stored, so that its figures mean nothing.
var errDiffers = errors.New("memory was not loaded as it was stored")

// session is what is compared, and the figures so far.
type session struct {
	ram     uint64
	dir     string
	guest   *guest
	memory  *os.File // the guest's memory, as QEMU has it
	version string   // of QEMU

	stores, loads []*row
}

// newSession boots the guest, and copies its memory to the file that is QEMU's machine's.
func newSession(ctx context.Context, ram uint64, dir string) (s *session, err error) {
	s = &session{ram: ram, dir: dir}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.close())
		}
	}()
	if s.guest, err = bootGuest(ctx, ram, filepath.Join(dir, "store")); err != nil {
		return s, err
	}
	if s.memory, err = os.Create(filepath.Join(dir, "memory")); err != nil {
		return s, err
	}
	_, err = io.Copy(s.memory, io.NewSectionReader(s.guest.memory(), 0, int64(ram)))
	return s, err
}

func (s *session) close() error {
	var errs []error
	if s.memory != nil {
		errs = append(errs, s.memory.Close())
	}
	if s.guest != nil {
		errs = append(errs, s.guest.close())
	}
	return errors.Join(errs...)
}

// round measures everything once. What one has stored is removed before the next begins.
func (s *session) round(ctx context.Context) error {
	if err := s.measureOurs(ctx); err != nil {
		return fmt.Errorf("cryovisor: %w", err)
	}
	for _, p := range peers() {
		if err := s.measurePeer(ctx, p); err != nil {
			return fmt.Errorf("%s: %w", p.name, err)
		}
	}
	return nil
}

func (s *session) measureOurs(ctx context.Context) error {
	p, took, err := s.guest.pause(ctx)
	if err != nil {
		return err
	}
	note(&s.stores, ours, took, int64(p.StoredBytes))
	for _, eager := range []bool{true, false} {
		r, took, err := s.guest.resume(ctx, p.ID, eager)
		if err != nil {
			return err
		}
		note(&s.loads, map[bool]string{true: oursEager, false: oursLazy}[eager], took, 0)
		err = s.compare(ctx, flatRAM{r.VM.Memory()})
		if err := errors.Join(err, r.Close()); err != nil {
			return err
		}
	}
	return s.guest.store.Delete(ctx, p.ID)
}

// measurePeer stores the machine of one QEMU, and loads it into another that is ready and waits.
func (s *session) measurePeer(ctx context.Context, p peer) (err error) {
	dir := filepath.Join(s.dir, "stored")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	if p.prepare != nil {
		if err := p.prepare(ctx, dir); err != nil {
			return err
		}
	}
	// The machine's memory is mapped beforehand, as that of a machine that has run is.
	source := machine{ram: s.ram, memory: s.memory.Name(), mapped: true, drive: p.drive(dir)}
	err = source.run(ctx, func(q *qemu) error {
		began := time.Now()
		if err := p.store(ctx, q, dir); err != nil {
			return err
		}
		if err := syncFiles(dir); err != nil {
			return err
		}
		took := time.Since(began)
		s.version = q.version
		size, err := sizeOf(dir)
		note(&s.stores, p.name, took, size)
		return err
	})
	if err != nil {
		return fmt.Errorf("store: %w", err)
	}
	if err := s.load(ctx, p, dir); err != nil {
		return fmt.Errorf("load: %w", err)
	}
	return nil
}

// load loads what was stored into memory that nobody has touched. A machine that waits for its state lets nobody use
// snapshots in its drive.
func (s *session) load(ctx context.Context, p peer, dir string) (err error) {
	target := machine{ram: s.ram, memory: filepath.Join(s.dir, "loaded"), incoming: p.image == "", drive: p.drive(dir)}
	f, err := os.Create(target.memory)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close(), os.Remove(f.Name())) }()
	if err := f.Truncate(int64(s.ram)); err != nil {
		return err
	}
	err = target.run(ctx, func(q *qemu) error {
		began := time.Now()
		err := p.load(ctx, q, dir)
		note(&s.loads, p.name, time.Since(began), 0)
		return err
	})
	if err != nil {
		return err
	}
	return s.compare(ctx, f)
}

// compare compares all of what was loaded with what was stored.
func (s *session) compare(ctx context.Context, loaded io.ReaderAt) error {
	want, got := make([]byte, pieceBytes), make([]byte, pieceBytes)
	for off := int64(0); off < int64(s.ram); off += pieceBytes {
		if err := ctx.Err(); err != nil {
			return err
		}
		if _, err := s.memory.ReadAt(want, off); err != nil {
			return err
		}
		if _, err := loaded.ReadAt(got, off); err != nil {
			return err
		}
		if !bytes.Equal(got, want) {
			return fmt.Errorf("%w: the MiB at %#x differs", errDiffers, off)
		}
	}
	return nil
}

// syncFiles makes the files of a directory durable, and their names.
func syncFiles(dir string) error {
	files, err := storedFiles(dir)
	if err != nil {
		return err
	}
	var g errgroup.Group
	for _, path := range append(files, dir) {
		g.Go(func() error {
			f, err := os.Open(path)
			if err != nil {
				return err
			}
			return errors.Join(f.Sync(), f.Close())
		})
	}
	return g.Wait()
}

// sizeOf is the size of the files of a directory.
func sizeOf(dir string) (int64, error) {
	files, err := storedFiles(dir)
	sum := int64(0)
	for _, path := range files {
		info, err := os.Stat(path)
		if err != nil {
			return 0, err
		}
		sum += info.Size()
	}
	return sum, err
}

// storedFiles are the files of a directory that hold something; it may have sockets and pipes too.
func storedFiles(dir string) (files []string, err error) {
	entries, err := os.ReadDir(dir)
	for _, e := range entries {
		if e.Type().IsRegular() {
			files = append(files, filepath.Join(dir, e.Name()))
		}
	}
	return files, err
}

func (s *session) print(out io.Writer, o options) error {
	ram := humanize.IBytes(s.ram)
	_, err := fmt.Fprintf(out, `%s of RAM, in %s; n = %d, in turn; QEMU %s.

Pause, until durable:

%s
Resume, by QEMU into a process that is ready and waits, by Cryovisor from opening the snapshot until the guest is entered:

%s`,
		ram, o.dir, o.n, s.version, storeTable(s.stores), loadTable(s.loads))
	return err
}
