//go:build linux && amd64

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/cryovisor/cryovisor/lifecycle"
	"github.com/cryovisor/cryovisor/server"
	"github.com/cryovisor/cryovisor/server/client"
	"github.com/cryovisor/cryovisor/vmm"
)

// serveIn runs 'serve' on a directory, with more flags, confined in a process of its own, until end is called or the test is over, and has the verbs talk to it.
func serveIn(t *testing.T, dir string, flags ...string) (out string, end func()) {
	t.Helper()
	if _, err := vmm.Probe(); errors.Is(err, vmm.ErrNoKVM) || errors.Is(err, vmm.ErrPermission) {
		t.Skip(err)
	}
	cmd := process(append([]string{"serve", "--data", dir, "--listen", "127.0.0.1:0"}, flags...)...)
	r, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	end = sync.OnceFunc(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM) // it may have ended
		if err := cmd.Wait(); err != nil {
			t.Errorf("serve: %v", err)
		}
	})
	t.Cleanup(end)
	var said strings.Builder
	address := regexp.MustCompile(`on (https?://\S+)`)
	for buffer := make([]byte, 1024); ; {
		n, err := r.Read(buffer)
		said.Write(buffer[:n])
		if m := address.FindStringSubmatch(said.String()); m != nil {
			t.Setenv("CRYOVISOR_URL", m[1])
			checkConfined(t, cmd.Process.Pid)
			return said.String(), end
		}
		if err != nil {
			t.Fatalf("serve ended: %s", said.String())
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
	var usage []used
	if err := json.Unmarshal([]byte(succeed(t, "top", "--json")), &usage); err != nil || len(usage) != 2 || usage[0].Usage == nil {
		t.Errorf("top: %+v, %v", usage, err)
	}
	for said := ""; !strings.Contains(said, `"ready"`) && !t.Failed(); {
		said = succeed(t, "logs", id, "--json")
		if !strings.HasPrefix(said, "[") {
			t.Errorf("logs: %q", said)
		}
	}
	var outcomes []outcome
	out, err = command(t, "kill", fork, "nobody", "--json")
	if json.Unmarshal([]byte(out), &outcomes) != nil || err == nil || len(outcomes) != 2 || outcomes[0] != (outcome{ID: fork}) || outcomes[1].Error == "" {
		t.Errorf("kill: %s, %v", out, err)
	}
	if _, err := command(t, "kill", "nobody"); !errors.Is(err, lifecycle.ErrNotFound) {
		t.Errorf("kill nobody: %v", err)
	}
	if _, err := command(t, "ls", "--data", dir); !errors.Is(err, lifecycle.ErrLocked) || !strings.Contains(err.Error(), "--url") {
		t.Errorf("beside the server: %v", err)
	}
	end()
	var listed []client.Sandbox
	if err := json.Unmarshal([]byte(succeed(t, "ls", "--data", dir, "--json")), &listed); err != nil || len(listed) != 1 || listed[0].State != "paused" ||
		listed[0].Alias != "base" {
		t.Errorf("after the server: %+v, %v", listed, err)
	}
	if got := succeed(t, "template", "ls", "--data", dir); !strings.Contains(got, `"base"`) {
		t.Errorf("templates: %s", got)
	}
	for _, args := range [][]string{{"pause", id}, {"connect", id}, {"fork", id}, {"logs", id}, {"create"}, {"top"}} {
		if _, err := command(t, append(args, "--data", dir)...); err == nil || !strings.Contains(err.Error(), "cryovisor serve") {
			t.Errorf("%v without a server: %v", args, err)
		}
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
	// What confines itself does so for good, and needs a process of its own.
	out, err := process(append(args, "R", "--vsock")...).Output()
	if err != nil {
		t.Fatal(err)
	}
	id := strings.TrimSpace(string(out))
	args = append([]string{"template", "create", "--confine=false"}, args[2:]...)
	if _, err := command(t, append(args, "R")...); !errors.Is(err, lifecycle.ErrExists) {
		t.Errorf("a name twice: %v", err)
	}
	args[3] = "never"
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

// past is a clock of long ago.
type past struct{ lifecycle.SystemClock }

func (past) Now() time.Time { return time.Now().Add(-40 * 24 * time.Hour) }

// TestLooking lists a directory whose server keeps what is paused for longer than others do: that is there afterwards too.
func TestLooking(t *testing.T) {
	if _, err := vmm.Probe(); errors.Is(err, vmm.ErrNoKVM) || errors.Is(err, vmm.ErrPermission) {
		t.Skip(err)
	}
	dir := filepath.Join(t.TempDir(), "data")
	m, err := lifecycle.OpenManager(t.Context(), dir, lifecycle.ManagerOptions{Clock: past{}, Retention: 60 * 24 * time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	if err := server.EnsureBase(t.Context(), m); err != nil {
		t.Fatal(err)
	}
	s, err := m.Create(t.Context(), lifecycle.CreateOptions{Template: server.BaseTemplate})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Pause(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := m.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if got := strings.TrimSpace(succeed(t, "ls", "-q", "--data", dir)); got != s.ID() {
			t.Errorf("a sandbox that its server would have kept: %q", got)
		}
	}
	if got := succeed(t, "template", "ls", "-q", "--data", dir); strings.Count(got, "\n") != 1 {
		t.Errorf("templates: %q", got)
	}
	if out := succeed(t, "kill", s.ID(), "--data", dir, "--json"); !strings.Contains(out, s.ID()) || succeed(t, "ls", "-q", "--data", dir) != "" {
		t.Errorf("killed: %s", out)
	}
}

// TestMistyped names a directory that is not there, which must not come into being.
func TestMistyped(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "data")
	for _, args := range [][]string{{"ls"}, {"kill", "x"}, {"template", "ls"}, {"template", "rm", "x"}} {
		if _, err := command(t, append(args, "--data", dir)...); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%v: %v", args, err)
		}
	}
	if _, err := command(t, "ls", "--data", dir, "--state", "asleep"); err == nil || !strings.Contains(err.Error(), "asleep") {
		t.Errorf("a state that there is not: %v", err)
	}
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("it was made: %v", err)
	}
}

// TestTop asks a server that has had enough: sandboxes are shown even so.
func TestTop(t *testing.T) {
	asked := 0
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !strings.HasSuffix(r.URL.Path, "/metrics") {
			_ = json.NewEncoder(w).Encode(slices.Repeat([]client.Sandbox{{ID: "one", Metadata: map[string]string{}}}, 30))
			return
		}
		asked++
		w.WriteHeader(http.StatusTooManyRequests)
	}))
	defer s.Close()
	t.Setenv("CRYOVISOR_URL", s.URL)
	t.Setenv("CRYOVISOR_API_KEY", "key")
	if got := succeed(t, "top", "--once"); strings.Count(got, "one ") != 30 || asked != maxUsages {
		t.Errorf("%d questions: %s", asked, got)
	}
}

// TestFollow interrupts logs -f, which is how it ends.
func TestFollow(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Query().Get("cursor") == "0" {
			_, _ = io.WriteString(w, `{"logs":[{"message":"a\u001b[2Jb","fields":{"cursor":"7"}}]}`)
			return
		}
		cancel()
	}))
	defer s.Close()
	t.Setenv("CRYOVISOR_API_KEY", "key")
	var out bytes.Buffer
	cmd := newRootCommand()
	cmd.SetArgs([]string{"logs", "-f", "one", "--url", s.URL})
	cmd.SetOut(&out)
	if err := cmd.ExecuteContext(ctx); err != nil || out.String() != "a[2Jb\n" {
		t.Errorf("%q, %v", out.String(), err)
	}
}

// TestEach has errors said once, by whoever is told of them last.
func TestEach(t *testing.T) {
	fail := func(id string) error { return errors.New("no " + id) }
	for want, ids := range map[string][]string{"": {"a"}, "cryovisor: no a\ncryovisor: no b\n": {"a", "b"}} {
		var failed bytes.Buffer
		cmd := newRootCommand()
		cmd.SetErr(&failed)
		if err := each(cmd, ids, false, fail); err == nil || failed.String() != want {
			t.Errorf("%v: %q, %v", ids, failed.String(), err)
		}
	}
}

func TestShow(t *testing.T) {
	metadata := map[string]string{"b": "2", "a": "1", "d": "4\x1b", "c": "3"}
	for range 20 {
		var out bytes.Buffer
		if err := new(remoteFlags).show(&out, []client.Sandbox{{Metadata: metadata}}); err != nil || !strings.HasSuffix(out.String(), `"a"="1" "b"="2" "c"="3" "d"="4\x1b"`+"\n") {
			t.Fatalf("%s %v", out.String(), err)
		}
	}
	for d, want := range map[time.Duration]string{0: "0s", 119 * time.Second: "119s", 2 * time.Minute: "2m", 2 * time.Hour: "2h", 47 * time.Hour: "47h", 48 * time.Hour: "2d"} {
		if got := short(d); got != want {
			t.Errorf("%v: %s", d, got)
		}
	}
}

func TestServeRefuses(t *testing.T) {
	for _, args := range [][]string{{"--listen", "0.0.0.0:0"}, {"--listen", ":0"}, {"--tls-cert", "x"}, {"--listen", "x"}, {"--on-close", "leave"}, {"--rate", "-1"}, {"--pool", "-1"}} {
		if _, err := command(t, append([]string{"serve", "--confine=false", "--data", t.TempDir()}, args...)...); err == nil {
			t.Errorf("%v was accepted", args)
		}
	}
}

func TestPrintable(t *testing.T) {
	if got := printable("a\x1b[31mb\tc\u009bd\x07é"); got != "a[31mb\tcdé" {
		t.Errorf("%q", got)
	}
}
