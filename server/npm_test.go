//go:build linux && amd64

package server_test

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// installed returns a directory whose node_modules has the clients that testdata/npm/package-lock.json names. It is a cache of the user's.
func installed(t *testing.T) string {
	t.Helper()
	if _, err := exec.LookPath("npm"); err != nil {
		t.Skipf("%v: install Node.js 20.19 or later", err)
	}
	// The clients load an ES module by require.
	version, err := exec.CommandContext(t.Context(), "node", "--version").Output()
	if err != nil || !newEnough(string(version)) {
		t.Skipf("node --version says %q (error: %v): install Node.js 20.19 or later", version, err)
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		t.Skip(err)
	}
	lock, err := os.ReadFile("testdata/npm/package-lock.json")
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(lock)
	dir := filepath.Join(cache, "cryovisor", "npm", hex.EncodeToString(sum[:8]))
	if _, err := os.Stat(dir); err == nil {
		return dir
	}
	// The directory appears whole or not at all.
	temp := dir + ".tmp-" + strconv.Itoa(os.Getpid())
	t.Cleanup(func() { _ = os.RemoveAll(temp) })
	if err := os.CopyFS(temp, os.DirFS("testdata/npm")); err != nil {
		t.Fatal(err)
	}
	npm := exec.CommandContext(t.Context(), "npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund")
	npm.Dir = temp
	if out, err := npm.CombinedOutput(); err != nil {
		t.Fatalf("npm ci: %v\n%s", err, out)
	}
	if err := os.Rename(temp, dir); err != nil && !errors.Is(err, os.ErrExist) {
		t.Fatal(err)
	}
	return dir
}

func newEnough(version string) bool {
	var major, minor int
	_, err := fmt.Sscanf(version, "v%d.%d", &major, &minor)
	return err == nil && (major > 20 || major == 20 && minor >= 19)
}

// script runs a script with the clients, and returns what it prints.
func (f *fixture) script(path string) string {
	f.t.Helper()
	modules := filepath.Join(installed(f.t), "node_modules")
	dir := f.t.TempDir()
	f.must(os.Symlink(modules, filepath.Join(dir, "node_modules")))
	b, err := os.ReadFile(path)
	f.must(err)
	f.must(os.WriteFile(filepath.Join(dir, "script.mjs"), b, 0o600))
	clock := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		n, err := strconv.Atoi(r.URL.Query().Get("seconds"))
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		f.clock.advance(time.Duration(n) * time.Second)
	}))
	defer clock.Close()
	node := exec.CommandContext(f.t.Context(), "node", "script.mjs")
	node.Dir = dir
	node.Env = append(os.Environ(), "E2B_API_URL="+f.url, "E2B_SANDBOX_URL="+f.url, "E2B_API_KEY="+f.key, "TEST_CLOCK="+clock.URL, "E2B_DEBUG=")
	out, err := node.CombinedOutput()
	if err != nil {
		f.t.Fatalf("%s: %v\n%s", path, err, out)
	}
	return string(out)
}

// TestPublishedClient drives the server with the client as it is published: the newest, and one of the first generation of routes.
func TestPublishedClient(t *testing.T) {
	for _, name := range []string{"current", "old"} {
		t.Run(name, func(t *testing.T) {
			f := newFixture(t, nil)
			if out := f.script("testdata/npm/" + name + ".mjs"); out != "ok\n" {
				t.Errorf("it says %q", out)
			}
		})
	}
}

// TestNPMStory runs the example.
func TestNPMStory(t *testing.T) {
	f := newFixture(t, nil)
	out := f.script("../examples/npm/story.mjs")
	for _, want := range []string{"started: running", "paused: true and again: false", "paused: [ true ]", "id: running", "by itself", "killed: true true and again: false", "gone: true"} {
		if !strings.Contains(out, want) {
			t.Errorf("it lacks %q:\n%s", want, out)
		}
	}
}
