package snapshot

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
)

// testFiles is the file system of a store under test. It does everything to real files but wait for the disk, keeps a log of
// what changed, from which a crashModel can be made, and fails when it is told to.
type testFiles struct {
	base fileSystem
	root string // of the model

	mu    sync.Mutex
	log   []change
	trace []string // all steps, reads too
	fault *fault   // nil: none
	files int      // that were written, to number them
}

// change is a step that changed something, as the model does it.
type change struct {
	what  string
	apply func(*crashModel)
}

// fault is what goes wrong, once or from then on.
type fault struct {
	at      int // the step, from 1
	err     error
	how     faultKind
	forever bool

	hit    string // the step that failed
	looks  bool   // that changes nothing
	logged int    // how much was logged before
}

type faultKind int

const (
	failBefore faultKind = iota // nothing is done
	failAfter                   // it is done, and reported as failed
	failShort                   // half of it is done, for reads and writes; err may be nil then
	failWrong                   // a read delivers a wrong bit, and no error
)

// step counts a step, and says whether it fails.
func (f *testFiles) step(what string) *fault {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.trace = append(f.trace, what)
	x := f.fault
	if x == nil || len(f.trace) < x.at || len(f.trace) > x.at && !x.forever {
		return nil
	}
	if x.hit == "" {
		x.hit, x.logged = what, len(f.log)
	}
	x.looks = x.looks || what == "read"
	return x
}

func (f *testFiles) record(what string, apply func(*crashModel)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.log = append(f.log, change{what, apply})
}

// do is a step that changes something.
func (f *testFiles) do(what, path string, op func() error, apply func(*crashModel)) error {
	x := f.step(what)
	if x != nil && x.err == nil {
		x = nil // what can't be done by half
	}
	if x != nil && x.how != failAfter {
		return x.wrap(what, path)
	}
	err := op()
	if err == nil {
		f.record(what, apply)
	}
	if x != nil {
		return x.wrap(what, path)
	}
	return err
}

// wrap is the error as the operating system's file system returns it.
func (x *fault) wrap(what, path string) error {
	if x.err == nil {
		return nil
	}
	return &fs.PathError{Op: what, Path: path, Err: x.err}
}

// look is a step that changes nothing.
func look[T any](f *testFiles, what, path string, op func() (T, error)) (T, error) {
	if x := f.step(what); x != nil && x.err != nil && x.err != io.EOF { //nolint:errorlint // that is of reads
		f.mu.Lock()
		x.looks = true
		f.mu.Unlock()
		var zero T
		return zero, x.wrap(what, path)
	}
	return op()
}

// rel is a path as the model has it.
func (f *testFiles) rel(path string) string {
	rel, err := filepath.Rel(f.root, path)
	if err != nil {
		panic(err)
	}
	return filepath.ToSlash(rel)
}

func (f *testFiles) ReadDir(dir string) ([]fs.DirEntry, error) {
	return look(f, "read directory", dir, func() ([]fs.DirEntry, error) { return f.base.ReadDir(dir) })
}

func (f *testFiles) Stat(path string) (fs.FileInfo, error) {
	return look(f, "stat", path, func() (fs.FileInfo, error) { return f.base.Stat(path) })
}

func (f *testFiles) Open(path string) (Blob, error) {
	b, err := look(f, "open", path, func() (Blob, error) { return f.base.Open(path) })
	if err != nil {
		return nil, err
	}
	return &testBlob{b, f, path}, nil
}

type testBlob struct {
	Blob
	f    *testFiles
	path string
}

func (b *testBlob) ReadAt(p []byte, off int64) (int, error) {
	x := b.f.step("read")
	if x == nil {
		return b.Blob.ReadAt(p, off)
	}
	switch {
	case x.how == failShort && x.err == io.EOF: //nolint:errorlint // the file looks as if it ended there
		n, _ := b.Blob.ReadAt(p[:len(p)/2], off)
		return n, io.EOF
	case x.how == failShort:
		n, _ := b.Blob.ReadAt(p[:len(p)/2], off)
		return n, x.wrap("read", b.path)
	case x.how == failWrong:
		n, err := b.Blob.ReadAt(p, off)
		if n > 0 {
			p[x.at*7919%n] ^= 1 << (x.at % 8)
		}
		return n, err
	}
	return 0, x.wrap("read", b.path)
}

func (f *testFiles) Mkdir(dir string) error {
	return f.do("mkdir", dir, func() error { return f.base.Mkdir(dir) },
		func(m *crashModel) { m.add(f.rel(dir), newDirNode()) })
}

func (f *testFiles) Rename(from, to string) error {
	return f.do("rename", from, func() error { return f.base.Rename(from, to) },
		func(m *crashModel) { m.rename(f.rel(from), f.rel(to)) })
}

func (f *testFiles) Remove(path string) error {
	return f.do("remove", path, func() error { return f.base.Remove(path) },
		func(m *crashModel) { m.remove(f.rel(path)) })
}

func (f *testFiles) SyncDir(dir string) error {
	if strings.HasPrefix(f.rel(dir), "..") { // it was there before the model
		return nil
	}
	there := func() error { _, err := os.Stat(dir); return err }
	return f.do("sync directory", dir, there, func(m *crashModel) { m.syncDir(f.rel(dir)) })
}

func (f *testFiles) Lock(path string, exclusive bool) (io.Closer, error) {
	_, missing := os.Stat(path)
	c, err := look(f, "lock", path, func() (io.Closer, error) { return f.base.Lock(path, exclusive) })
	if err == nil && errors.Is(missing, fs.ErrNotExist) {
		f.record("make lock", func(m *crashModel) { m.add(f.rel(path), &node{}) })
	}
	return c, err
}

// number gives the file a number that is being written.
func (f *testFiles) number() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.files++
	return f.files
}

func (f *testFiles) Stage(dir string) (stagedFile, error) {
	file, err := look(f, "stage", dir, func() (stagedFile, error) { return f.base.Stage(dir) })
	if err != nil {
		return nil, err
	}
	s := &testStaged{stagedFile: file, f: f, id: f.number()}
	named, ok := file.(*namedFile)
	if ok {
		s.temp = named.Name()
	}
	f.record("stage", func(m *crashModel) {
		m.open[s.id] = &node{}
		if s.temp != "" {
			m.add(f.rel(s.temp), m.open[s.id])
		}
	})
	return s, nil
}

// testStaged is a file being written. temp is its name, if it has one.
type testStaged struct {
	stagedFile
	f    *testFiles
	id   int
	temp string
	at   int
	done bool
}

func (s *testStaged) Write(p []byte) (int, error) {
	x := s.f.step("write")
	part := p
	if x != nil {
		part = p[:len(p)/2]
		if x.how == failBefore {
			part = nil
		}
	}
	n, err := s.stagedFile.Write(part)
	at, data := s.at, append([]byte{}, part[:n]...)
	s.at += n
	s.f.record("write", func(m *crashModel) { m.open[s.id].write(at, data) })
	if x != nil {
		err = x.wrap("write", s.temp)
	}
	return n, err
}

func (s *testStaged) Sync() error { return s.f.syncFile(s.id, s.temp) }

// syncFile syncs a file in the model alone. If that fails, the kernel may have dropped what it could not write.
func (f *testFiles) syncFile(id int, path string) error {
	err := f.do("sync", path, func() error { return nil }, func(m *crashModel) { m.open[id].sync() })
	if err != nil {
		f.record("failed sync", func(m *crashModel) { m.open[id].failed = true })
	}
	return err
}

func (s *testStaged) Publish(path string) error { return s.name("publish", path, s.stagedFile.Publish) }

func (s *testStaged) Replace(path string) error { return s.name("replace", path, s.stagedFile.Replace) }

// name gives the file its name, which in the model takes it from another.
func (s *testStaged) name(what, path string, give func(path string) error) error {
	return s.f.do(what, path, func() error {
		err := give(path)
		s.done = s.done || err == nil
		return err
	}, func(m *crashModel) {
		if s.temp != "" {
			m.rename(s.f.rel(s.temp), s.f.rel(path))
		} else {
			m.add(s.f.rel(path), m.open[s.id])
		}
	})
}

// Discard closes the file even if the rest fails, as the operating system would.
func (s *testStaged) Discard() error {
	if s.done {
		return s.stagedFile.Discard()
	}
	s.done = true
	if s.temp == "" {
		return s.stagedFile.Discard()
	}
	if x := s.f.step("discard"); x != nil && x.err != nil {
		s.stagedFile.(*namedFile).Close()
		return x.wrap("remove", s.temp)
	}
	s.f.record("discard", func(m *crashModel) { m.remove(s.f.rel(s.temp)) })
	return s.stagedFile.Discard()
}

func (f *testFiles) Overwrite(path string) (overwrittenFile, error) {
	file, err := look(f, "open to overwrite", path, func() (overwrittenFile, error) { return f.base.Overwrite(path) })
	if err != nil {
		return nil, err
	}
	o := &testOverwritten{file, f, f.number(), path}
	f.record("open to overwrite", func(m *crashModel) { m.open[o.id] = m.lookup(f.rel(path)) })
	return o, nil
}

type testOverwritten struct {
	overwrittenFile
	f    *testFiles
	id   int
	path string
}

func (o *testOverwritten) ReadAt(p []byte, off int64) (int, error) {
	return (&testBlob{o.overwrittenFile, o.f, o.path}).ReadAt(p, off)
}

func (o *testOverwritten) WriteAt(p []byte, off int64) (int, error) {
	x := o.f.step("overwrite")
	part := p
	if x != nil && x.err == nil {
		x = nil
	}
	if x != nil {
		part = p[:len(p)/2]
		if x.how == failBefore {
			part = nil
		}
	}
	n, err := o.overwrittenFile.WriteAt(part, off)
	data := append([]byte{}, part[:n]...)
	o.f.record("overwrite", func(m *crashModel) { m.open[o.id].write(int(off), data) })
	if x != nil {
		err = x.wrap("overwrite", o.path)
	}
	return n, err
}

func (o *testOverwritten) Sync() error { return o.f.syncFile(o.id, o.path) }
