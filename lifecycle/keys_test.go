package lifecycle_test

import (
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/cryovisor/cryovisor/lifecycle"
)

func openKeys(t *testing.T, path string) *lifecycle.LocalKeys {
	t.Helper()
	k, err := lifecycle.OpenLocalKeys(path)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// TestLocalKeys seals a secret, and opens it through a change of the master key.
func TestLocalKeys(t *testing.T) {
	path := filepath.Join(t.TempDir(), "keys", "master.txt")
	k := openKeys(t, path)
	sealed, err := k.Seal(t.Context(), "a", []byte("secret"))
	if err != nil || strings.Contains(string(sealed), "secret") {
		t.Fatalf("%q, %v", sealed, err)
	}
	wantOpen := func(what string, k *lifecycle.LocalKeys, sealed []byte) {
		t.Helper()
		if got, err := k.Open(t.Context(), "a", sealed); string(got) != "secret" || err != nil {
			t.Errorf("%s: %q, %v", what, got, err)
		}
	}
	wantOpen("at once", k, sealed)
	wantOpen("read from the file", openKeys(t, path), sealed)
	for _, id := range []string{"", "b", "aa"} {
		if _, err := k.Open(t.Context(), id, sealed); !errors.Is(err, lifecycle.ErrKey) {
			t.Errorf("sealed for a, opened for %q: %v", id, err)
		}
	}
	if err := k.Rotate(t.Context()); err != nil {
		t.Fatal(err)
	}
	wantOpen("after a rotation", k, sealed)
	wantOpen("after a rotation, from the file", openKeys(t, path), sealed)
	fresh, err := k.Seal(t.Context(), "a", []byte("secret"))
	if err != nil {
		t.Fatal(err)
	}
	if err := k.Retire(t.Context()); err != nil {
		t.Fatal(err)
	}
	for what, k := range map[string]*lifecycle.LocalKeys{"retired": k, "retired, from the file": openKeys(t, path)} {
		wantOpen(what, k, fresh)
		if _, err := k.Open(t.Context(), "a", sealed); !errors.Is(err, lifecycle.ErrKey) {
			t.Errorf("%s: what the old key sealed: %v", what, err)
		}
	}
	for _, damaged := range [][]byte{nil, sealed[:len(sealed)-1], append([]byte("x"), fresh...)} {
		if _, err := k.Open(t.Context(), "a", damaged); !errors.Is(err, lifecycle.ErrKey) {
			t.Errorf("damaged: %v", err)
		}
	}
}

// TestLocalKeysFile refuses files that are not to be trusted, and does not quote what is in them.
func TestLocalKeysFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "master.txt")
	openKeys(t, path)
	fi, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if runtime.GOOS != "windows" {
		if fi.Mode().Perm() != 0o600 {
			t.Errorf("mode %v", fi.Mode())
		}
		for _, mode := range []os.FileMode{0o640, 0o604, 0o660} {
			if err := os.Chmod(path, mode); err != nil {
				t.Fatal(err)
			}
			if _, err := lifecycle.OpenLocalKeys(path); !errors.Is(err, lifecycle.ErrKey) {
				t.Errorf("mode %v: %v", mode, err)
			}
		}
	}
	secret := "AGE-SECRET-KEY-1BROKEN"
	if err := os.WriteFile(path+"2", []byte(secret), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := lifecycle.OpenLocalKeys(path + "2"); !errors.Is(err, lifecycle.ErrKey) || strings.Contains(err.Error(), secret) {
		t.Errorf("a broken file: %v", err)
	}
}
