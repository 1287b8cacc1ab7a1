package snapshot

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"filippo.io/age"

	"github.com/cryovisor/cryovisor/internal/secondreader"
)

func (l *lab) rekey(id ID, from age.Identity, to ...age.Recipient) error {
	return l.Rekey(context.Background(), id, []age.Identity{from}, to)
}

func (l *lab) mustRekey(id ID, from age.Identity, to ...age.Recipient) {
	l.t.Helper()
	if err := l.rekey(id, from, to...); err != nil {
		l.t.Fatal(err)
	}
}

// mustOpen verifies the snapshot with one identity, which fits.
func (l *lab) mustOpen(id ID, key age.Identity) {
	l.t.Helper()
	r, err := l.Open(context.Background(), id, key)
	if err != nil {
		l.t.Fatal(err)
	}
	defer r.Close()
	if rep, err := r.Verify(context.Background(), nil); err != nil || rep.Err() != nil {
		l.t.Fatal(err, rep.Err())
	}
}

// mustNotOpen tries an identity that doesn't fit.
func (l *lab) mustNotOpen(id ID, key age.Identity) {
	l.t.Helper()
	r, err := l.Open(context.Background(), id, key)
	if err == nil {
		r.Close()
	}
	mustBe(l.t, err, ErrKey)
}

// contents are the parts of a manifest that a rekey must keep.
func (l *lab) contents(id ID, key age.Identity) (header, body []byte) {
	l.t.Helper()
	f, err := l.source().openManifest(manifestName(id))
	if err != nil {
		l.t.Fatal(err)
	}
	defer f.Close()
	m, err := readManifest(f, id, []age.Identity{key})
	if err != nil {
		l.t.Fatal(err)
	}
	return m.rawHeader, m.rawBody
}

// TestRekey gives the snapshot in the middle of a chain to somebody else.
func TestRekey(t *testing.T) {
	l, g, rnd := newLab(t), newGuest(1<<20), testRand(t)
	for p := range g.size / PageSize {
		g.set(p, page(rnd))
	}
	root := l.open(l.mustWrite(g, g.layout(), l.options()).ID)
	opts := l.options()
	opts.Parent = root
	g = g.clone()
	g.set(3, bytes.Repeat([]byte{7}, PageSize))
	middle := l.open(l.mustWrite(g, g.layout(), opts).ID)
	id := middle.header.ID
	opts.Parent = middle
	leaf := l.mustWrite(g, nil, opts).ID
	header, body := l.contents(id, l.key)
	files := strings.Join(l.files(), "\n")
	other := newKey(t)

	l.mustRekey(id, l.key, other.Recipient())
	l.mustNotOpen(id, l.key)
	r, err := l.Open(context.Background(), id, other)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	l.check(r, g)
	if h, b := l.contents(id, other); !bytes.Equal(h, header) || !bytes.Equal(b, body) {
		t.Error("the manifest says something else now")
	}
	if now := strings.Join(l.files(), "\n"); now != files {
		t.Errorf("left\n%s\nwere\n%s", now, files)
	}
	l.check(middle.reopen(), g) // who has it open keeps it
	for _, relative := range []ID{root.header.ID, leaf} {
		l.mustOpen(relative, l.key)
	}
	if err := l.Delete(context.Background(), root.header.ID); err != nil {
		t.Fatal(err)
	}
	l.mustOpen(id, other)
	if _, err := secondreader.Open(l.Dir(), id.String(), other); err != nil {
		t.Errorf("the second reader: %v", err)
	}
	l.mustRekey(id, other, l.key.Recipient(), other.Recipient())
	l.mustOpen(id, l.key)
	l.mustOpen(id, other)
}

// TestRekeyKeepsTheUnknown: flags that a reader may ignore, as a later version may set them. (Sections are unknown to this
// package anyway.)
func TestRekeyKeepsTheUnknown(t *testing.T) {
	l, _, info := small(t)
	f, err := l.source().openManifest(manifestName(info.ID))
	if err != nil {
		t.Fatal(err)
	}
	m, err := readManifest(f, info.ID, []age.Identity{l.key})
	f.Close()
	if err != nil {
		t.Fatal(err)
	}
	m.header.Flags = 1<<16 | 1<<31
	header := m.header.marshal()
	copy(m.rawBody[len(bodyMagic):], headerDigest(header))
	staged, _, err := l.stageManifest(header, m.rawBody, l.options().Recipients)
	if err != nil {
		t.Fatal(err)
	}
	if err := staged.Replace(l.ManifestPath(info.ID)); err != nil {
		t.Fatal(err)
	}
	other := newKey(t)
	l.mustRekey(info.ID, l.key, other.Recipient())
	l.mustOpen(info.ID, other)
	if h, b := l.contents(info.ID, other); !bytes.Equal(h, header) || !bytes.Equal(b, m.rawBody) {
		t.Error("not what it was")
	}
}

func TestRekeyRefuses(t *testing.T) {
	l, _, info := small(t)
	path := l.ManifestPath(info.ID)
	good := readFile(t, path)
	to := newKey(t).Recipient()
	mustBe(t, l.rekey(info.ID, newKey(t), to), ErrKey)
	mustBe(t, l.rekey(info.ID, l.key), ErrInvalid)
	mustBe(t, l.Rekey(context.Background(), info.ID, nil, []age.Recipient{to}), ErrKey)
	mustBe(t, l.rekey(NewID(), l.key, to), ErrNotFound, os.ErrNotExist)
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	mustBe(t, l.Rekey(ctx, info.ID, []age.Identity{l.key}, []age.Recipient{to}), context.Canceled)
	if !bytes.Equal(readFile(t, path), good) {
		t.Fatal("refused, and changed")
	}
	// Damage is not encrypted anew, as if it were none: neither in the body nor in the header.
	for _, at := range []int{len(good) - 1, headerPrefix + 40} {
		bad := bytes.Clone(good)
		bad[at] ^= 1
		writeFile(t, path, bad)
		mustBe(t, l.rekey(info.ID, l.key, to), ErrCorrupt)
		if !bytes.Equal(readFile(t, path), bad) {
			t.Fatal("refused, and changed")
		}
	}
	// A header of somebody's making.
	h, raw, err := readHeader(bytes.NewReader(good))
	if err != nil {
		t.Fatal(err)
	}
	h.Parent = NewID()
	forged := append(h.marshal(), good[len(raw):]...)
	if sum := sha256.Sum256(forged[:len(raw)-digestBytes]); !bytes.Equal(sum[:], forged[len(raw)-digestBytes:len(raw)]) {
		t.Fatal("the forgery is no good")
	}
	writeFile(t, path, forged)
	mustBe(t, l.rekey(info.ID, l.key, to), ErrCorrupt)
}

// TestRekeyFaults lets each step of a rekey fail in turn. Whatever fails, there is one manifest, whole, and the error says
// whose; and what a crash could bring back is whole too, until nothing can.
func TestRekeyFaults(t *testing.T) {
	for name, base := range bases {
		t.Run(name, func(t *testing.T) { rekeyFaults(t, base) })
	}
}

func rekeyFaults(t *testing.T, base fileSystem) {
	l, _, info := small(t)
	path, before := l.ManifestPath(info.ID), strings.Join(l.files(), "\n")
	from, to := l.key, newKey(t)
	for step := 1; ; step++ {
		link := filepath.Join(t.TempDir(), "link")
		if err := os.Link(path, link); err != nil {
			t.Skipf("no hard links here: %v", err)
		}
		was := readFile(t, path)
		x := fault{at: step, err: syscall.ENOSPC, how: failBefore}
		files := &testFiles{base: base, root: l.Dir(), fault: &x}
		l.Store.files = files
		err := l.rekey(info.ID, from, to.Recipient())
		l.Store.files = base
		if now := strings.Join(l.files(), "\n"); now != before {
			t.Fatalf("step %d: left\n%s\nwere\n%s", step, now, before)
		}
		if x.hit == "" { // there are no more steps
			if err != nil {
				t.Fatal(err)
			}
			overwritten(t, was, readFile(t, link))
			checkSteps(t, files.log)
			break
		}
		mustBe(t, err, syscall.ENOSPC)
		if errors.Is(err, ErrRecipients) {
			t.Errorf("step %d: the recipients are blamed: %v", step, err)
		}
		fe := (*FileError)(nil)
		if !errors.As(err, &fe) {
			t.Fatalf("step %d: %v names no file", step, err)
		}
		if done := fe.Op == "overwrite" && x.hit == "sync"; bytes.Equal(readFile(t, link), was) == done {
			t.Fatalf("step %d, %v: is the old manifest overwritten? %v", step, x.hit, !done)
		}
		if fe.Op == "sync" || fe.Op == "overwrite" {
			from, to = to, from
		}
		l.mustOpen(info.ID, from)
		l.mustNotOpen(info.ID, to)
	}
	l.mustOpen(info.ID, to)
}

// checkSteps checks in which order a rekey changes things.
func checkSteps(t *testing.T, log []change) {
	t.Helper()
	var got []string
	for _, c := range log {
		got = append(got, c.what)
	}
	want := []string{"open to overwrite", "stage", "write", "sync", "replace", "sync directory", "overwrite", "sync"}
	if got = slices.Compact(got); !slices.Equal(got, want) {
		t.Errorf("the steps are %q, not %q", got, want)
	}
}

// overwritten checks what is left of an old manifest: the header, which anybody may read.
func overwritten(t *testing.T, was, now []byte) {
	t.Helper()
	_, raw, err := readHeader(bytes.NewReader(was))
	if err != nil {
		t.Fatal(err)
	}
	same := 0
	for i := range now[len(raw):] {
		if now[len(raw)+i] == was[len(raw)+i] {
			same++
		}
	}
	if !bytes.HasPrefix(now, raw) || same > len(was)/50 {
		t.Errorf("%d of %d bytes survive", same, len(was))
	}
}

// hook is an identity or a recipient at whose first use something else happens.
type hook struct {
	age.Identity
	age.Recipient
	do sync.Once
	f  func()
}

func (h *hook) Unwrap(s []*age.Stanza) ([]byte, error) {
	h.do.Do(h.f)
	return h.Identity.Unwrap(s)
}

func (h *hook) Wrap(key []byte) ([]*age.Stanza, error) {
	h.do.Do(h.f)
	return h.Recipient.Wrap(key)
}

// TestRekeyMeanwhile: between the reading of an age header and that of the rest, and between reading and replacing,
// somebody else rekeys or deletes.
func TestRekeyMeanwhile(t *testing.T) {
	ctx := context.Background()
	a, b := newKey(t), newKey(t)
	for name, try := range map[string]func(l *lab, id ID, meanwhile func()) error{
		"open": func(l *lab, id ID, meanwhile func()) error {
			r, err := l.Open(ctx, id, &hook{Identity: l.key, f: meanwhile}, a)
			if err == nil {
				r.Close()
			}
			return err
		},
		"rekey, reading": func(l *lab, id ID, meanwhile func()) error {
			return l.Rekey(ctx, id, []age.Identity{&hook{Identity: l.key, f: meanwhile}, a}, []age.Recipient{b.Recipient()})
		},
		"rekey, writing": func(l *lab, id ID, meanwhile func()) error {
			return l.Rekey(ctx, id, []age.Identity{l.key, a}, []age.Recipient{&hook{Recipient: b.Recipient(), f: meanwhile}})
		},
	} {
		t.Run(name, func(t *testing.T) {
			l, _, info := small(t)
			if err := try(l, info.ID, func() { l.mustRekey(info.ID, l.key, a.Recipient()) }); err != nil {
				t.Fatal(err)
			}
			l.mustNotOpen(info.ID, l.key)
			if name == "open" {
				l.mustOpen(info.ID, a)
			} else {
				l.mustOpen(info.ID, b)
				l.mustNotOpen(info.ID, a)
			}
			l, _, info = small(t)
			mustBe(t, try(l, info.ID, func() {
				if err := l.Delete(ctx, info.ID); err != nil {
					t.Error(err)
				}
			}), ErrNotFound)
			if left := l.files(); len(left) != 0 {
				t.Errorf("left %v", left)
			}
		})
	}
	// A key that is taken away meanwhile fits no more, even if the manifest was read by then.
	l, _, info := small(t)
	mustBe(t, l.rekey(info.ID, &hook{Identity: l.key, f: func() { l.mustRekey(info.ID, l.key, a.Recipient()) }}, b.Recipient()), ErrKey)
	l.mustOpen(info.ID, a)
	l, _, info = small(t)
	mustBe(t, l.rekey(info.ID, l.key, &hook{Recipient: b.Recipient(), f: func() { l.mustRekey(info.ID, l.key, a.Recipient()) }}), ErrKey)
	l.mustOpen(info.ID, a)
}

// watchedFiles looks whether the store's lock is held while a manifest is replaced.
type watchedFiles struct {
	fileSystem
	l    *lab
	seen *[]string
}

func (f watchedFiles) look(what string) {
	*f.seen = append(*f.seen, what)
	if f.l.local.TryRLock() {
		f.l.local.RUnlock()
		f.l.t.Errorf("%s without the lock, or with a share of it", what)
	}
}

func (f watchedFiles) Stage(dir string) (stagedFile, error) {
	file, err := f.fileSystem.Stage(dir)
	return watchedFile{file, f}, err
}

func (f watchedFiles) Overwrite(path string) (overwrittenFile, error) {
	file, err := f.fileSystem.Overwrite(path)
	return watchedOld{file, f}, err
}

type watchedOld struct {
	overwrittenFile
	f watchedFiles
}

func (w watchedOld) WriteAt(p []byte, at int64) (int, error) {
	w.f.look("overwrite")
	return w.overwrittenFile.WriteAt(p, at)
}

type watchedFile struct {
	stagedFile
	f watchedFiles
}

func (w watchedFile) Replace(path string) error {
	w.f.look("replace")
	return w.stagedFile.Replace(path)
}

// TestRekeyLocks: nobody else replaces or deletes meanwhile, nor commits a child.
func TestRekeyLocks(t *testing.T) {
	l, _, info := small(t)
	var seen []string
	l.Store.files = watchedFiles{osFiles{}, l, &seen}
	l.mustRekey(info.ID, l.key, newKey(t).Recipient())
	if !slices.Equal(seen, []string{"replace", "overwrite"}) {
		t.Errorf("saw %q", seen)
	}
}

// TestRekeyBesideOthers: several users of a store, as in several processes, rekey one snapshot while others open it, write
// diffs of it and collect. It must be open to one of the keys at any time.
func TestRekeyBesideOthers(t *testing.T) {
	l, g := newLab(t), newGuest(64*PageSize)
	g.set(1, bytes.Repeat([]byte{1}, PageSize))
	base := l.open(l.mustWrite(g, g.layout(), l.options()).ID)
	id, keys := base.header.ID, []age.Identity{l.key, newKey(t)}
	var stop atomic.Bool
	var rekeyers, others sync.WaitGroup
	user := func(wg *sync.WaitGroup, f func(s *Store) error) {
		s, err := OpenStore(l.Dir())
		if err != nil {
			t.Fatal(err)
		}
		wg.Go(func() {
			if err := f(s); err != nil {
				t.Error(err)
			}
		})
	}
	for n := range 2 {
		user(&rekeyers, func(s *Store) error {
			for i := range 12 {
				to := keys[(n+i)%2].(*age.X25519Identity).Recipient()
				if err := s.Rekey(context.Background(), id, keys, []age.Recipient{to}); err != nil {
					return err
				}
			}
			return nil
		})
	}
	loop := func(f func(s *Store) error) {
		user(&others, func(s *Store) error {
			for !stop.Load() {
				if err := f(s); err != nil {
					return err
				}
			}
			return nil
		})
	}
	loop(func(s *Store) error {
		r, err := s.Open(context.Background(), id, keys...)
		if err != nil {
			return err
		}
		return r.Close()
	})
	loop(func(s *Store) error {
		_, err := s.Collect(context.Background())
		return err
	})
	user(&rekeyers, func(*Store) error { return writeAndDelete(l, base, 1) })
	rekeyers.Wait()
	stop.Store(true)
	others.Wait()
	r, err := l.Open(context.Background(), id, keys...)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	l.check(r, g)
	entries, err := l.List()
	if err != nil || len(entries) != 2 {
		t.Fatalf("%d snapshots, %v", len(entries), err)
	}
	if left := l.files(); len(left) != 2+len(entries[0].Packs)+len(entries[1].Packs) {
		t.Errorf("left %v", left)
	}
}
