//go:build amd64

package lifecycle_test

import (
	"context"
	"encoding/binary"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"filippo.io/age"
	"golang.org/x/sys/unix"

	"github.com/cryovisor/cryovisor/internal/testvm"
	"github.com/cryovisor/cryovisor/lifecycle"
	"github.com/cryovisor/cryovisor/snapshot"
	"github.com/cryovisor/cryovisor/vmm"
)

// mountTmpfs mounts a file system of the given options on a new directory. It
// skips the test where that is not permitted.
func mountTmpfs(t *testing.T, options string) string {
	t.Helper()
	dir := t.TempDir()
	err := unix.Mount("tmpfs", dir, "tmpfs", 0, options)
	if errors.Is(err, fs.ErrPermission) {
		t.Skip("mounting a small tmpfs needs root: ", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	return dir
}

func files(t *testing.T, dir string) (names []string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			names = append(names, path)
		}
		return err
	})
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	return names
}

// TestPauseFails: whatever makes a pause fail, the machine runs on, nothing is
// left behind, and the next pause is exact.
func TestPauseFails(t *testing.T) {
	g := newGuest(t, testvm.WorkerConfig{Memory: 64 << 20, VCPUs: 2})
	checkLeaks(t)
	m := g.boot(t, testvm.NoLimit)
	full, readOnly := mountTmpfs(t, "size=8m"), mountTmpfs(t, "size=8m,ro")
	cancelled, cancel := context.WithCancel(t.Context())
	for _, c := range []struct {
		name string
		ctx  context.Context
		dir  string
		opts lifecycle.PauseOptions
		want error
	}{
		{"full disk", t.Context(), full, lifecycle.PauseOptions{}, unix.ENOSPC},
		{"read-only directory", t.Context(), readOnly, lifecycle.PauseOptions{}, unix.EROFS},
		{"cancelled at half", cancelled, t.TempDir(), lifecycle.PauseOptions{Progress: func(done, total uint64) {
			if done > total/2 {
				cancel()
			}
		}}, context.Canceled},
		{"cancelled before", cancelled, t.TempDir(), lifecycle.PauseOptions{}, context.Canceled},
		{"extra section fails", t.Context(), t.TempDir(), lifecycle.PauseOptions{
			Extra: func() ([]snapshot.Section, error) { return nil, fs.ErrInvalid },
		}, fs.ErrInvalid},
	} {
		t.Run(c.name, func(t *testing.T) {
			g.work(t, m, 10)
			store, err := snapshot.OpenStore(c.dir)
			if err != nil {
				t.Fatal(err)
			}
			c.opts.Recipients = []age.Recipient{g.key.Recipient()}
			if _, err := m.Pause(c.ctx, store, c.opts); !errors.Is(err, c.want) {
				t.Fatalf("error %v, want %v", err, c.want)
			}
			if left := files(t, c.dir); len(left) > 1 { // the store's lock file may be there
				t.Errorf("left behind: %v", left)
			}
			g.work(t, m, 10)
		})
	}
	p := g.pause(t, m)
	closeMachine(t, m)
	m = g.resume(t, p.ID, false, testvm.NoLimit)
	g.work(t, m, 10)
	g.compare(t, m)
}

// TestResumeDamaged: a snapshot that is damaged in any of these ways does not
// run, or ends before the guest sees wrong data.
func TestResumeDamaged(t *testing.T) {
	g := newGuest(t, testvm.WorkerConfig{Memory: 32 << 20})
	checkLeaks(t)
	m := g.boot(t, testvm.NoLimit)
	g.work(t, m, 10)
	p := g.pause(t, m)
	closeMachine(t, m)
	manifest := g.store.ManifestPath(p.ID)
	packs := files(t, filepath.Join(g.store.Dir(), "packs"))
	if len(packs) == 0 {
		t.Fatal("the snapshot has no packs")
	}

	flip := func(path string, at float64) func(*testing.T) {
		return func(t *testing.T) {
			edit(t, path, func(b []byte) []byte { b[int(at*float64(len(b)-1))] ^= 0x10; return b })
		}
	}
	cut := func(path string, n int) func(*testing.T) {
		return func(t *testing.T) { edit(t, path, func(b []byte) []byte { return b[:len(b)-n] }) }
	}
	all := func(f func(string) func(*testing.T)) func(*testing.T) {
		return func(t *testing.T) {
			for _, p := range packs {
				f(p)(t)
			}
		}
	}
	for _, c := range []struct {
		name string
		harm func(*testing.T)
		want error
	}{
		{"manifest flipped at the end", flip(manifest, 1), snapshot.ErrCorrupt},
		{"manifest flipped in the body", flip(manifest, 0.7), snapshot.ErrCorrupt},
		{"manifest truncated", cut(manifest, 1), snapshot.ErrCorrupt},
		{"manifest emptied", func(t *testing.T) { edit(t, manifest, func([]byte) []byte { return nil }) }, snapshot.ErrFormat},
		{"packs flipped", all(func(p string) func(*testing.T) {
			return func(t *testing.T) { // every segment of 64 KiB
				edit(t, p, func(b []byte) []byte {
					for i := 300; i < len(b); i += 32 << 10 {
						b[i] ^= 1
					}
					return b
				})
			}
		}), snapshot.ErrCorrupt},
		{"packs truncated", all(func(p string) func(*testing.T) { return cut(p, 100) }), snapshot.ErrCorrupt},
		{"packs swapped", func(t *testing.T) { swap(t, packs[0], packs[len(packs)-1]) }, snapshot.ErrCorrupt},
		{"packs gone", all(func(p string) func(*testing.T) {
			return func(t *testing.T) {
				if err := os.Remove(p); err != nil {
					t.Fatal(err)
				}
			}
		}), fs.ErrNotExist},
	} {
		if c.name == "packs swapped" && len(packs) < 2 {
			continue // one worker writes one pack
		}
		t.Run(c.name, func(t *testing.T) {
			keep(t, append(slices.Clone(packs), manifest))
			c.harm(t)
			for _, eager := range []bool{true, false} {
				if err := g.runToEnd(t, p.ID, eager); !errors.Is(err, c.want) {
					t.Errorf("eager %v: error %v, want %v", eager, err, c.want)
				}
			}
		})
	}
	// Unharmed, after all that, it still runs.
	m = g.resume(t, p.ID, false, testvm.NoLimit)
	g.work(t, m, 5)
	g.compare(t, m)
}

// runToEnd resumes a snapshot that is bound to fail, and returns how.
func (g *guest) runToEnd(t *testing.T, id snapshot.ID, eager bool) error {
	t.Helper()
	before := g.reports.Load()
	m, err := lifecycle.Resume(t.Context(), g.store, id, lifecycle.ResumeOptions{
		Identities: []age.Identity{g.key}, Hardware: g.hardware(testvm.NoLimit), Eager: eager,
	})
	if err != nil {
		return err
	}
	defer closeMachine(t, m)
	if err := m.VM.Resume(); err != nil {
		return err
	}
	err = m.VM.Wait(t.Context())
	if !errors.Is(err, vmm.ErrGuestMemory) {
		t.Errorf("the guest ended with %v, want %v", err, vmm.ErrGuestMemory)
	}
	if n := g.reports.Load() - before; n != 0 {
		t.Errorf("the guest made %d reports with damaged memory", n)
	}
	return err
}

func edit(t *testing.T, path string, f func([]byte) []byte) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err == nil {
		err = os.WriteFile(path, f(b), 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func swap(t *testing.T, a, b string) {
	t.Helper()
	for _, r := range [][2]string{{a, a + "~"}, {b, a}, {a + "~", b}} {
		if err := os.Rename(r[0], r[1]); err != nil {
			t.Fatal(err)
		}
	}
}

// keep puts files back as they are now when the test ends.
func keep(t *testing.T, paths []string) {
	t.Helper()
	for _, path := range paths {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := os.WriteFile(path, b, 0o600); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestResumeRefused(t *testing.T) {
	g := newGuest(t, testvm.WorkerConfig{Memory: 16 << 20})
	checkLeaks(t)
	m := g.boot(t, testvm.NoLimit)
	g.work(t, m, 5)
	p := g.pause(t, m)
	closeMachine(t, m)
	other, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	refused := func(name string, id snapshot.ID, key age.Identity, want error) {
		t.Helper()
		t.Run(name, func(t *testing.T) {
			m, err := lifecycle.Resume(t.Context(), g.store, id, lifecycle.ResumeOptions{
				Identities: []age.Identity{key}, Hardware: g.hardware(testvm.NoLimit), Eager: true,
			})
			if err == nil {
				closeMachine(t, m)
			}
			if !errors.Is(err, want) {
				t.Errorf("error %v, want %v", err, want)
			}
		})
	}
	refused("wrong key", p.ID, other, snapshot.ErrKey)
	refused("no such snapshot", snapshot.NewID(), g.key, snapshot.ErrNotFound)
	refused("more memory than the host", g.forge(t, p.ID, func(s *vmm.State) { s.Machine.MemoryBytes = 1 << 39 }), g.key, vmm.ErrHostMemory)
	refused("a CPU that the host lacks", g.forge(t, p.ID, func(s *vmm.State) {
		for i, e := range s.VCPUs[0].CPUID {
			if e.Function == 7 && e.Index == 0 {
				s.VCPUs[0].CPUID[i].EBX = ^uint32(0)
			}
		}
	}), g.key, vmm.ErrCPU)
	refused("another vendor", g.forge(t, p.ID, func(s *vmm.State) { s.VCPUs[0].CPUID[0].EBX ^= 1 }), g.key, vmm.ErrCPU)
	edit(t, g.store.ManifestPath(p.ID), func(b []byte) []byte {
		// The format version follows the magic (docs/FORMAT.md, "Header").
		at := slices.Index(b[:32], 1)
		binary.LittleEndian.PutUint32(b[at:], 99)
		return b
	})
	refused("a newer version", p.ID, g.key, snapshot.ErrVersion)
}

// forge copies a snapshot with another machine state.
func (g *guest) forge(t *testing.T, id snapshot.ID, change func(*vmm.State)) snapshot.ID {
	t.Helper()
	r, err := g.store.Open(t.Context(), id, g.key)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	var sections []vmm.Section
	for _, s := range r.Sections() {
		sections = append(sections, vmm.Section{Name: s.Name, Version: s.Version, Data: s.Data})
	}
	state, err := vmm.ParseState(sections)
	if err != nil {
		t.Fatal(err)
	}
	change(state)
	w, err := g.store.Create(t.Context(), snapshot.Options{Parent: r, Recipients: []age.Recipient{g.key.Recipient()}})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Abort()
	for _, s := range state.Sections() {
		if err := w.AddSection(snapshot.Section{Name: s.Name, Version: s.Version, Critical: true, Data: s.Data}); err != nil {
			t.Fatal(err)
		}
	}
	view := func(uint64, int) ([]byte, error) { return nil, errors.New("nothing is to be written") }
	if err := w.WriteMemory(t.Context(), r.Header().RAMBytes, nil, view); err != nil {
		t.Fatal(err)
	}
	info, err := w.Commit(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return info.ID
}
