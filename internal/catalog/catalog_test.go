package catalog

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func openTest(t *testing.T, path string) *Catalog {
	t.Helper()
	c, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return c
}

func full() (Sandbox, Template) {
	at := time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC)
	s := Sandbox{
		ID: "s1", Template: "t1", Owner: "o", Running: true, Snapshot: "abc", Created: at, Started: at.Add(1), Paused: at.Add(2),
		Timeout: time.Minute, IdleTimeout: time.Second, OnTimeout: "pause", AutoResume: true,
		Metadata: map[string]string{"k'\"": "v\x00ü"}, VCPUs: 2, MemoryBytes: 1 << 40, DiskBytes: 1 << 41, StoredBytes: 7, Pauses: 3,
		LastError: "broken",
	}
	t := Template{
		ID: "t1", Name: "base", Owner: "o", Source: "s1", Snapshot: "def", Created: at, VCPUs: 1, MemoryBytes: 5, DiskBytes: 6, StoredBytes: 7,
		Labels: map[string]string{"a": "b"}, WorkingSet: []byte{0, 1, 2},
	}
	return s, t
}

// TestRecords writes every column, and finds the same after the file has been closed and opened.
func TestRecords(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a %3f #b?c", "catalog.db")
	if err := os.Mkdir(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	c, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	s, tpl := full()
	plain := Sandbox{ID: "s0", Created: s.Created.Add(-1)}
	for _, put := range []func() error{
		func() error { return c.PutSandbox(t.Context(), s, []byte("secret")) },
		func() error { return c.PutSandbox(t.Context(), plain, nil) },
		func() error { return c.PutTemplate(t.Context(), tpl, []byte("other")) },
		func() error { s.Pauses++; return c.PutSandbox(t.Context(), s, nil) },
		c.Close,
	} {
		if err := put(); err != nil {
			t.Fatal(err)
		}
	}
	c = openTest(t, path)
	sandboxes, err := c.Sandboxes(t.Context())
	if diff := cmp.Diff([]Sandbox{plain, s}, sandboxes); diff != "" || err != nil {
		t.Errorf("sandboxes: %v %s", err, diff)
	}
	templates, err := c.Templates(t.Context())
	if diff := cmp.Diff([]Template{tpl}, templates); diff != "" || err != nil {
		t.Errorf("templates: %v %s", err, diff)
	}
	if b, err := c.Secret(t.Context(), "s1"); string(b) != "secret" || err != nil {
		t.Errorf("the secret is %q, %v", b, err)
	}
	if fi, err := os.Stat(path); err != nil || runtime.GOOS != "windows" && fi.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", fi.Mode(), err)
	}
	if err := c.Check(t.Context()); err != nil {
		t.Error(err)
	}
}

// TestDeleted looks for the bytes of a deleted key in the files.
func TestDeleted(t *testing.T) {
	dir := t.TempDir()
	c := openTest(t, filepath.Join(dir, "catalog.db"))
	s, tpl := full()
	secret := bytes.Repeat([]byte("a key of 32 bytes and some more."), 4)
	if err := c.PutSandbox(t.Context(), s, secret); err != nil {
		t.Fatal(err)
	}
	if err := c.PutTemplate(t.Context(), tpl, []byte("kept")); err != nil {
		t.Fatal(err)
	}
	if !found(t, dir, secret) {
		t.Fatal("this test can't see a key that is there")
	}
	if err := c.DeleteSandbox(t.Context(), s.ID); err != nil {
		t.Fatal(err)
	}
	if err := c.Forget(t.Context()); err != nil {
		t.Fatal(err)
	}
	if found(t, dir, secret) {
		t.Error("the deleted key is still in a file")
	}
	if b, err := c.Secret(t.Context(), s.ID); b != nil || err != nil {
		t.Errorf("a deleted secret is %q, %v", b, err)
	}
	if b, err := c.Secret(t.Context(), tpl.ID); string(b) != "kept" || err != nil {
		t.Errorf("another's secret is %q, %v", b, err)
	}
	if err := c.DeleteSandbox(t.Context(), s.ID); err != nil {
		t.Errorf("once more: %v", err)
	}
}

func found(t *testing.T, dir string, what []byte) bool {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		if bytes.Contains(b, what) {
			return true
		}
	}
	return false
}

// TestReseal replaces all keys or none.
func TestReseal(t *testing.T) {
	c := openTest(t, filepath.Join(t.TempDir(), "catalog.db"))
	for _, id := range []string{"a", "b", "c"} {
		if err := c.PutSandbox(t.Context(), Sandbox{ID: id}, []byte(id)); err != nil {
			t.Fatal(err)
		}
	}
	broken := errors.New("broken")
	calls := 0
	err := c.Reseal(t.Context(), func(_ string, sealed []byte) ([]byte, error) {
		if calls++; calls == 3 {
			return nil, broken
		}
		return append(sealed, '!'), nil
	})
	if !errors.Is(err, broken) {
		t.Fatal(err)
	}
	check := func(suffix string) {
		for _, id := range []string{"a", "b", "c"} {
			if b, err := c.Secret(t.Context(), id); string(b) != id+suffix || err != nil {
				t.Errorf("secret %s is %q, %v", id, b, err)
			}
		}
	}
	check("")
	err = c.Reseal(t.Context(), func(_ string, sealed []byte) ([]byte, error) { return append(sealed, '!'), nil })
	if err != nil {
		t.Fatal(err)
	}
	check("!")
}

func TestPruneSecrets(t *testing.T) {
	c := openTest(t, filepath.Join(t.TempDir(), "catalog.db"))
	s, tpl := full()
	if err := errors.Join(c.PutSandbox(t.Context(), s, []byte("x")), c.PutTemplate(t.Context(), tpl, []byte("x"))); err != nil {
		t.Fatal(err)
	}
	if _, err := c.db.Exec("INSERT INTO secrets VALUES ('nobody', 'x')"); err == nil {
		t.Fatal("a text was taken for a blob")
	}
	if _, err := c.db.Exec("INSERT INTO secrets VALUES ('nobody', x'00')"); err != nil {
		t.Fatal(err)
	}
	if n, err := c.PruneSecrets(t.Context()); n != 1 || err != nil {
		t.Errorf("%d pruned, %v; want 1", n, err)
	}
}

func TestNewerVersion(t *testing.T) {
	path := filepath.Join(t.TempDir(), "catalog.db")
	c := openTest(t, path)
	if _, err := c.db.Exec("PRAGMA user_version = 2"); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(path); !errors.Is(err, ErrVersion) {
		t.Errorf("a newer catalog: %v", err)
	}
}

// TestNotADatabase gives Open other files.
func TestNotADatabase(t *testing.T) {
	path := filepath.Join(t.TempDir(), "catalog.db")
	if err := os.WriteFile(path, bytes.Repeat([]byte("not a database. "), 1000), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(path); err == nil {
		t.Error("a text was opened as a database")
	}
}
