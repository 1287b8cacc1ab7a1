//go:build linux && amd64

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"

	"github.com/cryovisor/cryovisor/lifecycle"
	"github.com/cryovisor/cryovisor/server/client"
	"github.com/cryovisor/cryovisor/vmm"
)

// command runs a verb, and returns what it prints to standard output.
func command(t *testing.T, args ...string) (string, error) {
	t.Helper()
	var out, failed bytes.Buffer
	cmd := newRootCommand()
	cmd.SetArgs(args)
	cmd.SetOut(&out)
	cmd.SetErr(&failed)
	err := cmd.ExecuteContext(t.Context())
	if failed.Len() > 0 {
		t.Logf("%v: %s", args, failed.String())
	}
	return out.String(), err
}

func succeed(t *testing.T, args ...string) string {
	t.Helper()
	out, err := command(t, args...)
	if err != nil {
		t.Fatalf("%v: %v", args, err)
	}
	return out
}

// serveIn runs 'serve' on a directory, until end is called or the test is over, and has the verbs talk to it.
func serveIn(t *testing.T, dir string) (out string, end func()) {
	t.Helper()
	if _, err := vmm.Probe(); errors.Is(err, vmm.ErrNoKVM) || errors.Is(err, vmm.ErrPermission) {
		t.Skip(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	r, w := io.Pipe()
	cmd := newRootCommand()
	cmd.SetArgs([]string{"serve", "--data", dir, "--listen", "127.0.0.1:0"})
	cmd.SetOut(w)
	cmd.SetErr(io.Discard)
	ended := make(chan error, 1)
	go func() {
		ended <- cmd.ExecuteContext(ctx)
		w.Close()
	}()
	end = sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("serve: %v", err)
		}
	})
	t.Cleanup(end)
	var said strings.Builder
	address := regexp.MustCompile(`on (http://\S+)`)
	for buffer := make([]byte, 1024); ; {
		n, err := r.Read(buffer)
		said.Write(buffer[:n])
		if m := address.FindStringSubmatch(said.String()); m != nil {
			t.Setenv("CRYOVISOR_URL", m[1])
			return said.String(), end
		}
		if err != nil {
			t.Fatalf("serve ended: %v; %s", <-ended, said.String())
		}
	}
}

// TestServe takes a sandbox through the verbs, the server through an end and a new beginning, and its directory through those that need no server.
func TestServe(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "data")
	out, end := serveIn(t, dir)
	keyFile := filepath.Join(dir, "api-key")
	key, err := os.ReadFile(keyFile)
	if err != nil || !strings.Contains(out, strings.TrimSpace(string(key))) {
		t.Fatalf("the key was not shown: %v", err)
	}
	if fi, err := os.Stat(keyFile); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", fi.Mode(), err)
	}
	t.Setenv("AGENTBOX_API_KEY", strings.TrimSpace(string(key)))
	id := strings.TrimSpace(succeed(t, "create", "--metadata", "user=ada", "--timeout", "1h", "--pause"))
	fork := strings.TrimSpace(succeed(t, "fork", id))
	succeed(t, "pause", id)
	succeed(t, "pause", id)
	if got := strings.Fields(succeed(t, "ls", "-q", "--state", "paused", "--metadata", "user=ada")); len(got) != 1 || got[0] != id {
		t.Errorf("paused: %v", got)
	}
	if table := succeed(t, "ls"); !strings.Contains(table, id) || !strings.Contains(table, `"user"="ada"`) || strings.Count(table, "\n") != 3 {
		t.Errorf("a table: %s", table)
	}
	if got := succeed(t, "connect", id, "--api-key-file", keyFile); strings.TrimSpace(got) != id {
		t.Errorf("connect: %q", got)
	}
	if got := succeed(t, "top"); !strings.Contains(got, id) || !strings.Contains(got, fork) {
		t.Errorf("top: %s", got)
	}
	succeed(t, "logs", id)
	if _, err := command(t, "kill", fork, "nobody"); err == nil {
		t.Error("nobody was killed")
	}
	if _, err := command(t, "kill", "nobody"); !errors.Is(err, lifecycle.ErrNotFound) {
		t.Errorf("kill nobody: %v", err)
	}
	if _, err := command(t, "ls", "--data", dir); !errors.Is(err, lifecycle.ErrLocked) {
		t.Errorf("beside the server: %v", err)
	}
	end()
	var listed []client.Sandbox
	if err := json.Unmarshal([]byte(succeed(t, "ls", "--data", dir, "--json")), &listed); err != nil || len(listed) != 1 || listed[0].State != "paused" {
		t.Errorf("after the server: %+v, %v", listed, err)
	}
	if got := succeed(t, "template", "ls", "--data", dir); !strings.Contains(got, `"base"`) {
		t.Errorf("templates: %s", got)
	}

	second := strings.TrimSpace(succeed(t, "apikey", "create", "second", "--data", dir))
	if out, _ = serveIn(t, dir); strings.Contains(out, "API key") {
		t.Errorf("a second first key: %s", out)
	}
	if got := strings.TrimSpace(succeed(t, "ls", "-q")); got != id {
		t.Errorf("after a new beginning: %q", got)
	}
	t.Setenv("CRYOVISOR_API_KEY", second)
	if got := succeed(t, "ls", "-q"); got != "" {
		t.Errorf("another key sees %q", got)
	}
	keys := succeed(t, "apikey", "list", "--data", dir)
	succeed(t, "apikey", "revoke", regexp.MustCompile(`(key_\w+)\s+"second"`).FindStringSubmatch(keys)[1], "--data", dir)
	if _, err := command(t, "ls"); !errors.Is(err, client.ErrKey) {
		t.Errorf("with a key that was revoked: %v", err)
	}
}

// TestTemplateVerbs makes a template of a flat image that halts, and deletes it.
func TestTemplateVerbs(t *testing.T) {
	if _, err := vmm.Probe(); errors.Is(err, vmm.ErrNoKVM) || errors.Is(err, vmm.ErrPermission) {
		t.Skip(err)
	}
	dir := t.TempDir()
	image := filepath.Join(dir, "image")
	// mov dx, 0x3f8; mov al, 'R'; out dx, al; then for ever: hlt; jmp -3
	if err := os.WriteFile(image, []byte{0x66, 0xba, 0xf8, 0x03, 0xb0, 'R', 0xee, 0xf4, 0xeb, 0xfd}, 0o600); err != nil {
		t.Fatal(err)
	}
	data := filepath.Join(dir, "data")
	args := []string{"template", "create", "tiny", "--data", data, "--flat", image, "--memory", "4MiB", "--ready-text"}
	id := strings.TrimSpace(succeed(t, append(args, "R", "--vsock")...))
	if _, err := command(t, append(args, "R")...); !errors.Is(err, lifecycle.ErrExists) {
		t.Errorf("a name twice: %v", err)
	}
	args[2] = "never"
	if _, err := command(t, append(args, "never said", "--ready-timeout", "50ms")...); err == nil {
		t.Error("a template that is never ready was kept")
	}
	var all []lifecycle.TemplateInfo
	if err := json.Unmarshal([]byte(succeed(t, "template", "ls", "--data", data, "--json")), &all); err != nil || len(all) != 1 || all[0].ID != id ||
		all[0].Labels["vsock"] != "3" {
		t.Errorf("%+v, %v", all, err)
	}
	succeed(t, "template", "rm", "tiny", "--data", data)
	if _, err := command(t, "template", "rm", "tiny", "--data", data); !errors.Is(err, lifecycle.ErrNotFound) {
		t.Errorf("deleted twice: %v", err)
	}
}

func TestServeRefuses(t *testing.T) {
	for _, args := range [][]string{{"--listen", "0.0.0.0:0"}, {"--listen", ":0"}, {"--tls-cert", "x"}, {"--listen", "x"}} {
		if _, err := command(t, append([]string{"serve", "--data", t.TempDir()}, args...)...); err == nil {
			t.Errorf("%v was accepted", args)
		}
	}
}

func TestPrintable(t *testing.T) {
	if got := printable("a\x1b[31mb\tc\u009bd\x07é"); got != "a[31mb\tcdé" {
		t.Errorf("%q", got)
	}
}
