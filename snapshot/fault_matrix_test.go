package snapshot

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"syscall"
	"testing"
)

// bases are the file systems that a store finds: with files that have no name while they are written, and without.
var bases = map[string]fileSystem{"unnamed": osFiles{}, "named": namedFiles{}}

// namedFiles is the file system of an operating system without unnamed files.
type namedFiles struct{ osFiles }

func (namedFiles) Stage(dir string) (stagedFile, error) { return stageNamed(dir) }

var errInjected = errors.New("injected")

func isNotFound(err error) bool { return errors.Is(err, ErrNotFound) }

// faults are what goes wrong at each step.
var faults = []fault{
	{err: syscall.ENOSPC, how: failShort},
	{err: syscall.EIO, how: failBefore},
	{err: syscall.EIO, how: failAfter},
	{err: syscall.EINTR, how: failBefore},
	{err: nil, how: failShort},
	{err: syscall.EROFS, how: failBefore, forever: true},
}

func (x fault) String() string {
	return fmt.Sprintf("%v, kind %d, forever %v", x.err, x.how, x.forever)
}

// TestFaults lets each step of everything that is done to a store fail, in several ways. The error must come through, nothing
// may stay open, what was there must be whole, and a second attempt must succeed, after which Collect leaves nothing.
func TestFaults(t *testing.T) {
	for name, base := range bases {
		for _, op := range chosen(name) {
			t.Run(name+"/"+op.name, func(t *testing.T) {
				w, n := newWorld(t), 0
				steps := w.steps(t, base, &op)
				for _, x := range faults {
					for x.at = 1; ; x.at++ {
						if x.at <= len(steps) && alike(steps[x.at-1], x.at) {
							continue
						}
						if w.fail(t, base, &op, x) == "" {
							break
						}
						n++
					}
				}
				t.Logf("%d faults at %d steps", n, len(steps))
			})
		}
	}
}

// steps are those of an operation, as far as they are the same each time.
func (w *world) steps(t *testing.T, base fileSystem, op *operation) []string {
	t.Helper()
	c := newCrashes(t, w, base, op)
	if _, err := op.do(w, c.lab); err != nil {
		t.Fatal(err)
	}
	return c.files.trace
}

// alike says whether a step can be left out, as others are like it.
func alike(step string, at int) bool {
	return (step == "write" || step == "read") && at%4 != 0 && !thorough()
}

// fail does an operation of which a step fails, and returns which; "" if there is no such step.
func (w *world) fail(t *testing.T, base fileSystem, op *operation, x fault) string {
	t.Helper()
	c := newCrashes(t, w, base, op)
	before, open := c.lab.storeFiles(), openFiles(t)
	c.files.fault = &x
	made, err := op.do(w, c.lab)
	c.files.fault = nil
	if x.hit == "" {
		if err != nil {
			t.Fatalf("%s: %v", op.name, err)
		}
		return ""
	}
	fatal := func(what string, err error) {
		t.Helper()
		if err != nil {
			t.Fatalf("%v at step %d, %s: %s: %v", x, x.at, x.hit, what, err)
		}
	}
	if now := openFiles(t); now != open {
		fatal("leak", fmt.Errorf("%d files are open, were %d", now, open))
	}
	fatal("error", x.reported(err))
	e := w.during(op)
	switch {
	case err == nil:
		e = w.after(op, made)
	case op.removes == nil && !x.forever:
		e = w.before(op)
	}
	fatal("after it", w.check(c.lab, e))
	if now := c.lab.storeFiles(); err != nil && w.clearsAway(op, &x) && !slices.Equal(before, now) {
		fatal("after it", fmt.Errorf("there are %v, were %v", now, before))
	}
	if err != nil {
		again, err := op.do(w, c.lab)
		if op.removes != nil && isNotFound(err) {
			err = nil
		}
		fatal("second attempt", err)
		if op.removes != nil { // the keys are in it
			if _, err := osFiles.Stat(osFiles{}, c.lab.deletedPath(op.removes(w))); err == nil {
				fatal("after the second attempt", errors.New("the manifest is still there"))
			}
		}
		after := w.after(op, again)
		if x.forever && op.removes == nil {
			after.may[ID{}] = true
		}
		fatal("after the second attempt", w.check(c.lab, after))
	}
	fatal("in the end", w.checkCollect(c.lab))
	return x.hit
}

// reported says what is wrong with the error of an operation that met the fault.
func (x *fault) reported(err error) error {
	want := []error{x.err}
	if x.err == nil { // short, in a step that can be
		if !slices.Contains([]string{"write", "read"}, x.hit) {
			return err
		}
		want = []error{io.ErrShortWrite, io.ErrUnexpectedEOF}
	}
	// What nobody needs is left for Collect; and half of a read may be enough.
	if err == nil && (x.hit == "discard" || x.hit == "read" && x.how == failShort) {
		return nil
	}
	if !slices.ContainsFunc(want, func(w error) bool { return errors.Is(err, w) }) {
		return fmt.Errorf("it is %w, want one of %v", err, want)
	}
	return nil
}

// clearsAway says whether an operation that fails must leave no files.
func (w *world) clearsAway(op *operation, x *fault) bool {
	return op.removes == nil && op.name != "collect" && !x.forever && x.hit != "discard"
}

// storeFiles are the files of the store, which need not be there.
func (l *lab) storeFiles() []string {
	if _, err := osFiles.Stat(osFiles{}, l.Dir()); err != nil {
		return nil
	}
	return l.files()
}

// readFaults are what goes wrong when a snapshot is read, and what it must be called.
var readFaults = []struct {
	fault
	want []error
}{
	{fault{err: syscall.EIO, how: failBefore}, []error{syscall.EIO}},
	{fault{err: syscall.EINTR, how: failShort}, []error{syscall.EINTR}},
	{fault{err: nil, how: failShort}, []error{io.ErrUnexpectedEOF}},
	{fault{err: io.EOF, how: failShort}, []error{ErrCorrupt, ErrFormat, io.EOF}},
	{fault{err: nil, how: failWrong}, []error{ErrCorrupt, ErrFormat, ErrVersion, ErrKey}},
}

// TestFaultyReads lets each step of reading a snapshot fail, deliver too little or something wrong, with and without a cache
// between. Nothing wrong may come of it, and what the error says must be so: the storage's faults may pass, and damage does not.
func TestFaultyReads(t *testing.T) {
	w := newWorld(t)
	dir := fastDir(t)
	writeTree(t, dir, w.tree)
	for _, opts := range []OpenOptions{{BlockSize: -1}, {BlockSize: 8 << 10, CacheBytes: 16 << 10}, {}} {
		for how, read := range map[string]func(*world, *Reader) error{"chunks": readChunks, "batch": readBatch, "verify": readVerify} {
			t.Run(fmt.Sprintf("block=%d/%s", opts.BlockSize, how), func(t *testing.T) {
				n := 0
				for _, x := range readFaults {
					for x.at = 1; ; x.at++ {
						f := &testFiles{base: osFiles{}, root: dir, fault: &x.fault}
						x.hit = ""
						err := w.readFrom(w.lab(t, dir, f), opts, read)
						if x.hit == "" {
							if err != nil {
								t.Fatal(err)
							}
							break
						}
						n++
						if err := x.judge(err, x.want, opts.BlockSize >= 0); err != nil {
							t.Fatalf("%v at step %d, %s: %v", x.fault, x.at, x.hit, err)
						}
					}
				}
				t.Logf("%d faults", n)
			})
		}
	}
}

// judge says what is wrong with what came of reading in spite of a fault. err may be nil where nothing was looked at that was
// harmed, or a cache had asked in advance and asked again: what is read is compared in any case.
func (x *fault) judge(err error, want []error, cached bool) error {
	if err == nil && (x.how != failBefore || cached && x.hit == "read") {
		return nil
	}
	if !slices.ContainsFunc(want, func(w error) bool { return errors.Is(err, w) }) {
		return fmt.Errorf("error %w, want %v", err, want)
	}
	fe := (*FileError)(nil)
	if !errors.As(err, &fe) {
		return fmt.Errorf("error %w names no file", err)
	}
	if damage := x.how == failWrong || x.err == io.EOF; fe.Temporary() == damage { //nolint:errorlint // as above
		return fmt.Errorf("error %w is temporary: %v", err, fe.Temporary())
	}
	return nil
}

func (w *world) readFrom(l *lab, opts OpenOptions, read func(*world, *Reader) error) error {
	r, err := OpenFrom(context.Background(), dirBlobs{l.Dir(), l.Store.files}, w.c, opts, w.key)
	if err != nil {
		return err
	}
	return errors.Join(read(w, r), r.Close())
}

func readChunks(w *world, r *Reader) error { return sameBytes(r, w.holds[w.c]) }

func readBatch(w *world, r *Reader) error {
	return r.FetchBatch(context.Background(), r.all(), func(gpa uint64, pages []byte) error {
		for at := 0; at < len(pages); at += PageSize {
			if p := (gpa + uint64(at)) / PageSize; !bytes.Equal(pages[at:at+PageSize], w.holds[w.c].g.pages[p]) {
				return fmt.Errorf("page %d differs", p)
			}
		}
		return nil
	})
}

func readVerify(_ *world, r *Reader) error {
	rep, err := r.Verify(context.Background(), nil)
	if err != nil {
		return err
	}
	return rep.Err()
}
