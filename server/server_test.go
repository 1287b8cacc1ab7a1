//go:build linux && amd64

package server_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/getkin/kin-openapi/openapi3"
	"github.com/getkin/kin-openapi/openapi3filter"
	"github.com/getkin/kin-openapi/routers"
	"github.com/getkin/kin-openapi/routers/gorillamux"

	"github.com/cryovisor/cryovisor/internal/testvm"
	"github.com/cryovisor/cryovisor/lifecycle"
	"github.com/cryovisor/cryovisor/server"
	"github.com/cryovisor/cryovisor/vmm"
)

func init() { // kinds of answers that are text to the test
	for _, kind := range []string{"text/html", "text/javascript", "text/css"} {
		openapi3filter.RegisterBodyDecoder(kind, openapi3filter.FileBodyDecoder)
	}
}

// fixture is a server with the template "base", and two API keys. Each answer is held against the description that it serves.
type fixture struct {
	t          *testing.T
	url        string
	server     *server.Server
	manager    *lifecycle.Manager
	keys       *server.Keys
	clock      *clock
	key, other string
	router     routers.Router
	log        record
}

// record is what the server has logged.
type record struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (r *record) Write(b []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.text.Write(b)
}

func (r *record) String() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.text.String()
}

// clock is the system's, and as much ahead as a test wants.
type clock struct {
	mu    sync.Mutex
	ahead time.Duration
	moved chan struct{}
}

func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return time.Now().Add(c.ahead)
}

func (c *clock) advance(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ahead += d
	close(c.moved)
	c.moved = make(chan struct{})
}

func (c *clock) NewTimer(t time.Time) (<-chan time.Time, func()) {
	rings, stop := make(chan time.Time, 1), make(chan struct{})
	go func() {
		for {
			c.mu.Lock()
			moved, left := c.moved, time.Until(t)-c.ahead
			c.mu.Unlock()
			timer := time.NewTimer(left)
			select {
			case now := <-timer.C:
				rings <- now
				return
			case <-moved:
			case <-stop:
				return
			}
		}
	}()
	return rings, sync.OnceFunc(func() { close(stop) })
}

func newFixture(t *testing.T, change func(*server.Config)) *fixture {
	t.Helper()
	if _, err := vmm.Probe(); errors.Is(err, vmm.ErrNoKVM) || errors.Is(err, vmm.ErrPermission) {
		t.Skip(err)
	}
	f := &fixture{t: t, clock: &clock{moved: make(chan struct{})}}
	dir := t.TempDir()
	var err error
	f.manager, err = lifecycle.OpenManager(t.Context(), dir, lifecycle.ManagerOptions{Clock: f.clock, PrepareAhead: -1, OnClose: lifecycle.ActionKill})
	f.must(err)
	t.Cleanup(func() { f.must(f.manager.Close(context.Background())) })
	guest, err := testvm.Timer(testvm.TimerConfig{Memory: 4 << 20, Period: 100e6, Every: 1 << 40})
	f.must(err)
	_, err = f.manager.CreateTemplate(t.Context(), lifecycle.TemplateConfig{
		Name: server.BaseTemplate, VM: vmm.Config{MemoryBytes: 4 << 20, Boot: guest.Program()},
	})
	f.must(err)
	f.keys, err = server.OpenKeys(t.Context(), dir)
	f.must(err)
	t.Cleanup(func() { f.must(f.keys.Close()) })
	_, f.key, err = f.keys.Create(t.Context(), "mine")
	f.must(err)
	_, f.other, err = f.keys.Create(t.Context(), "other")
	f.must(err)
	cfg := server.Config{Manager: f.manager, Keys: f.keys, Rate: 1e6, Burst: 1e6, Logger: slog.New(slog.NewTextHandler(&f.log, nil))}
	if change != nil {
		change(&cfg)
	}
	f.server, err = server.New(cfg)
	f.must(err)
	t.Cleanup(f.server.Close)
	listening := httptest.NewServer(f.server)
	t.Cleanup(listening.Close)
	f.url = listening.URL
	f.router = f.describe()
	return f
}

func (f *fixture) must(err error) {
	f.t.Helper()
	if err != nil {
		f.t.Fatal(err)
	}
}

// describe reads the description that the server serves.
func (f *fixture) describe() routers.Router {
	f.t.Helper()
	answer, err := http.Get(f.url + "/openapi.json")
	f.must(err)
	defer answer.Body.Close()
	b, err := io.ReadAll(answer.Body)
	f.must(err)
	doc, err := openapi3.NewLoader().LoadFromData(b)
	f.must(err)
	f.must(doc.Validate(f.t.Context()))
	router, err := gorillamux.NewRouter(doc)
	f.must(err)
	return router
}

// reply is an answer.
type reply struct {
	status int
	header http.Header
	body   []byte
}

func (r reply) decode(t *testing.T, into any) {
	t.Helper()
	if err := json.Unmarshal(r.body, into); err != nil {
		t.Fatalf("%v: %s", err, r.body)
	}
}

func (f *fixture) do(method, path, body string) reply { return f.as(f.key, method, path, body) }

// as makes a request with an API key, and holds what happens against the description.
func (f *fixture) as(key, method, path, body string) reply {
	f.t.Helper()
	request, err := http.NewRequestWithContext(f.t.Context(), method, f.url+path, strings.NewReader(body))
	f.must(err)
	request.Header.Set("X-API-KEY", key)
	if body != "" {
		request.Header.Set("Content-Type", "application/json")
	}
	answer, err := http.DefaultClient.Do(request)
	f.must(err)
	defer answer.Body.Close()
	r := reply{status: answer.StatusCode, header: answer.Header}
	r.body, err = io.ReadAll(answer.Body)
	f.must(err)
	f.check(request, body, r)
	return r
}

func (f *fixture) check(request *http.Request, body string, r reply) {
	f.t.Helper()
	route, params, err := f.router.FindRoute(request)
	if err != nil {
		if r.status != http.StatusNotFound && r.status != http.StatusMethodNotAllowed {
			f.t.Errorf("%s %s is not described, and answered with %d: %v", request.Method, request.URL.Path, r.status, err)
		}
		return
	}
	request.Body = io.NopCloser(strings.NewReader(body))
	input := &openapi3filter.RequestValidationInput{
		Request: request, PathParams: params, Route: route,
		Options: &openapi3filter.Options{AuthenticationFunc: openapi3filter.NoopAuthenticationFunc, IncludeResponseStatus: true},
	}
	if err := openapi3filter.ValidateRequest(f.t.Context(), input); err != nil && r.status < 400 {
		f.t.Errorf("%s %s %s is not as described, and answered with %d: %v", request.Method, request.URL, body, r.status, err)
	}
	err = openapi3filter.ValidateResponse(f.t.Context(), &openapi3filter.ResponseValidationInput{
		RequestValidationInput: input, Status: r.status, Header: r.header, Body: io.NopCloser(bytes.NewReader(r.body)), Options: input.Options,
	})
	if err != nil {
		f.t.Errorf("%s %s: the answer %d %s is not as described: %v", request.Method, request.URL, r.status, r.body, err)
	}
}

func (f *fixture) want(r reply, status int) reply {
	f.t.Helper()
	if r.status != status {
		f.t.Errorf("answered with %d %s, want %d", r.status, r.body, status)
	}
	if status >= 400 {
		var said struct {
			Code    int
			Message string
		}
		r.decode(f.t, &said)
		if said.Code != r.status || said.Message == "" {
			f.t.Errorf("the body says %+v, the status is %d", said, r.status)
		}
	}
	return r
}

func (f *fixture) create(body string) (id string) {
	f.t.Helper()
	var said struct{ SandboxID, TemplateID, EnvdVersion string }
	f.want(f.do("POST", "/v2/sandboxes", body), http.StatusCreated).decode(f.t, &said)
	if said.EnvdVersion < "0.1.0" || said.TemplateID == "" {
		f.t.Errorf("created %+v", said)
	}
	return said.SandboxID
}

// listed is a sandbox as it is described.
type listed struct {
	SandboxID, State string
	StartedAt, EndAt time.Time
	Metadata         map[string]string
	Lifecycle        struct {
		OnTimeout  string
		AutoResume bool
	}
}

func (f *fixture) get(id string) (l listed) {
	f.t.Helper()
	f.want(f.do("GET", "/sandboxes/"+id, ""), http.StatusOK).decode(f.t, &l)
	return l
}

// TestLife takes a sandbox through all routes of both generations.
func TestLife(t *testing.T) {
	f := newFixture(t, nil)
	id := f.create(`{"templateID":"base","metadata":{"a":"b"},"timeout":60,"autoPause":true,"autoResume":{"enabled":true},"unknown":[1]}`)
	l := f.get(id)
	if l.State != "running" || l.Metadata["a"] != "b" || l.Lifecycle.OnTimeout != "pause" || !l.Lifecycle.AutoResume {
		t.Errorf("%+v", l)
	}
	if left := time.Until(l.EndAt); left < 50*time.Second || left > time.Minute {
		t.Errorf("it ends in %v", left)
	}
	path := "/sandboxes/" + id
	f.want(f.do("POST", path+"/timeout", `{"timeout":3600}`), http.StatusNoContent)
	f.want(f.do("POST", path+"/connect", `{"timeout":5}`), http.StatusOK)
	f.want(f.do("POST", path+"/refreshes", `{"duration":7200}`), http.StatusNoContent)
	if left := time.Until(f.get(id).EndAt); left < 119*time.Minute {
		t.Errorf("it ends in %v", left)
	}
	f.want(f.do("POST", path+"/resume", `{}`), http.StatusConflict)
	var metrics []struct{ CPUCount int }
	f.want(f.do("GET", path+"/metrics", ""), http.StatusOK).decode(t, &metrics)
	if len(metrics) != 1 || metrics[0].CPUCount != 1 {
		t.Errorf("%+v", metrics)
	}
	for _, body := range []string{"", "{}", `{"memory":true}`} {
		f.want(f.do("POST", path+"/pause", body), http.StatusNoContent)
		f.want(f.do("POST", path+"/pause", ""), http.StatusConflict)
		f.want(f.do("POST", path+"/timeout", `{"timeout":60}`), http.StatusNotFound)
		f.want(f.do("POST", path+"/refreshes", `{}`), http.StatusNotFound)
		f.want(f.do("GET", path+"/metrics", ""), http.StatusOK)
		f.want(f.do("GET", "/v2"+path+"/logs?cursor=0&limit=10", ""), http.StatusOK)
		if l := f.get(id); l.State != "paused" || l.EndAt.After(time.Now().Add(time.Second)) {
			t.Errorf("%+v", l)
		}
		f.want(f.do("POST", "/v2"+path+"/connect", `{"timeout":60}`), http.StatusCreated)
	}
	f.want(f.do("POST", path+"/pause", ""), http.StatusNoContent)
	f.want(f.do("POST", path+"/resume", `{"timeout":60}`), http.StatusCreated)
	f.want(f.do("GET", path+"/logs", ""), http.StatusOK)
	f.want(f.do("DELETE", path, ""), http.StatusNoContent)
	for _, r := range []reply{
		f.do("DELETE", path, ""), f.do("GET", path, ""), f.do("POST", path+"/pause", ""), f.do("POST", path+"/connect", "{}"),
		f.do("POST", path+"/resume", "{}"), f.do("POST", path+"/timeout", `{"timeout":1}`), f.do("POST", path+"/fork", "{}"),
		f.do("POST", path+"/snapshots", "{}"), f.do("GET", path+"/metrics", ""), f.do("GET", path+"/logs", ""),
	} {
		f.want(r, http.StatusNotFound)
	}
	var activity []struct{ State, From string }
	f.want(f.do("GET", "/cryovisor/v1/activity", ""), http.StatusOK).decode(t, &activity)
	if len(activity) == 0 {
		t.Error("nothing has happened")
	}
}

// TestDefaults makes sandboxes that say nothing.
func TestDefaults(t *testing.T) {
	f := newFixture(t, nil)
	for path, want := range map[string]time.Duration{"/sandboxes": 15 * time.Second, "/v2/sandboxes": 300 * time.Second} {
		var said struct{ SandboxID string }
		f.want(f.do("POST", path, ""), http.StatusCreated).decode(t, &said)
		l := f.get(said.SandboxID)
		if d := l.EndAt.Sub(l.StartedAt); d < want || d > want+time.Second || l.Lifecycle.OnTimeout != "kill" {
			t.Errorf("%s: %+v, %v", path, l, d)
		}
	}
}

// TestTimeouts lets time pass: a sandbox is paused or killed, and one that is paused is gone after its retention.
func TestTimeouts(t *testing.T) {
	f := newFixture(t, nil)
	kill, pause := f.create(`{"timeout":60}`), f.create(`{"timeout":60,"autoPause":true}`)
	events, cancel := f.manager.Subscribe()
	defer cancel()
	f.clock.advance(time.Minute)
	for range 2 {
		e := <-events
		if want := map[string]lifecycle.State{kill: lifecycle.StateKilled, pause: lifecycle.StatePaused}[e.Sandbox.ID]; e.Sandbox.State != want {
			t.Errorf("event %+v", e)
		}
	}
	f.want(f.do("GET", "/sandboxes/"+kill, ""), http.StatusNotFound)
	f.clock.advance(lifecycle.DefaultRetention - time.Minute)
	if l := f.get(pause); l.State != "paused" {
		t.Errorf("%+v", l)
	}
	f.clock.advance(time.Minute)
	f.want(f.do("POST", "/v2/sandboxes/"+pause+"/connect", "{}"), http.StatusNotFound)
}

// TestList pages and filters.
func TestList(t *testing.T) {
	f := newFixture(t, nil)
	var ids []string
	for i := range 5 {
		id := f.create(fmt.Sprintf(`{"metadata":{"n":"%d","a b&=%%ü":"c d&=%%2B+"}}`, i))
		if i < 3 {
			f.want(f.do("POST", "/sandboxes/"+id+"/pause", ""), http.StatusNoContent)
		}
		ids = append([]string{id}, ids...)
	}
	list := func(query url.Values) (found []string) {
		for more := true; more; {
			var page []listed
			r := f.want(f.do("GET", "/v2/sandboxes?"+query.Encode(), ""), http.StatusOK)
			r.decode(t, &page)
			for _, l := range page {
				found = append(found, l.SandboxID)
			}
			query.Set("nextToken", r.header.Get("X-Next-Token"))
			more = query.Get("nextToken") != ""
		}
		return found
	}
	// As the SDKs encode it: each key and value, then the pairs, then the query.
	metadata := url.Values{url.PathEscape("a b&=%ü"): {url.PathEscape("c d&=%2B+")}}.Encode()
	for want, query := range map[string]url.Values{
		"all":               {"limit": {"2"}},
		"paused":            {"state": {"paused"}, "limit": {"1"}},
		"running":           {"state": {"running"}},
		"both":              {"state": {"running,paused"}},
		"by metadata":       {"metadata": {metadata}},
		"by metadata, none": {"metadata": {metadata + "&n=x"}},
	} {
		wants := map[string][]string{"all": ids, "paused": ids[2:], "running": ids[:2], "both": ids, "by metadata": ids}[want]
		if found := list(query); !slices.Equal(found, wants) {
			t.Errorf("%s: %v, want %v", want, found, wants)
		}
	}
	for _, query := range []string{"limit=0", "limit=101", "limit=x", "state=killed", "nextToken=x", "metadata=%25zz", "metadata=a%3D%2525zz", "order=asc"} {
		f.want(f.do("GET", "/v2/sandboxes?"+query, ""), http.StatusBadRequest)
	}
}

// TestOwners has two keys see their own only.
func TestOwners(t *testing.T) {
	f := newFixture(t, nil)
	id := f.create("")
	var snapshot struct{ SnapshotID string }
	f.want(f.do("POST", "/sandboxes/"+id+"/snapshots", `{"name":"kept"}`), http.StatusCreated).decode(t, &snapshot)
	path := "/sandboxes/" + id
	for _, r := range []reply{
		f.as(f.other, "GET", path, ""), f.as(f.other, "DELETE", path, ""), f.as(f.other, "POST", path+"/pause", ""),
		f.as(f.other, "POST", path+"/connect", ""), f.as(f.other, "POST", path+"/fork", ""), f.as(f.other, "GET", path+"/logs", ""),
		f.as(f.other, "DELETE", "/templates/"+snapshot.SnapshotID, ""), f.as(f.other, "DELETE", "/templates/kept", ""),
		f.as(f.other, "POST", "/v2/sandboxes", `{"templateID":"`+snapshot.SnapshotID+`"}`), f.do("DELETE", "/templates/base", ""),
	} {
		f.want(r, http.StatusNotFound)
	}
	for _, path := range []string{"/v2/sandboxes", "/snapshots", "/cryovisor/v1/activity"} {
		if r := f.want(f.as(f.other, "GET", path, ""), http.StatusOK); strings.TrimSpace(string(r.body)) != "[]" {
			t.Errorf("%s: %s", path, r.body)
		}
	}
	for _, key := range []string{"", "x", "e2b_", f.key[:len(f.key)-1], f.key + "0", strings.ToUpper(f.key), strings.Repeat("e2b_", 1000)} {
		f.want(f.as(key, "GET", path, ""), http.StatusUnauthorized)
	}
	all, err := f.keys.List(t.Context())
	i := slices.IndexFunc(all, func(k server.APIKey) bool { return k.Name == "mine" })
	if err != nil || len(all) != 2 || i < 0 {
		t.Fatalf("%v, %v", all, err)
	}
	f.must(f.keys.Revoke(t.Context(), all[i].ID))
	if err := f.keys.Revoke(t.Context(), all[i].ID); !errors.Is(err, server.ErrNoKey) {
		t.Errorf("revoked twice: %v", err)
	}
	f.want(f.do("GET", path, ""), http.StatusUnauthorized)
	for _, secret := range []string{f.key, f.other} {
		if strings.Contains(f.log.String(), secret) {
			t.Error("a key is in the log")
		}
	}
}

// TestForksAndSnapshots makes and lists them.
func TestForksAndSnapshots(t *testing.T) {
	f := newFixture(t, nil)
	id := f.create("")
	var forks []struct {
		Sandbox *struct{ SandboxID string }
		Error   *struct{ Code int }
	}
	f.want(f.do("POST", "/sandboxes/"+id+"/fork", `{"count":2,"timeout":60}`), http.StatusCreated).decode(t, &forks)
	if len(forks) != 2 || forks[0].Sandbox == nil || forks[1].Error != nil {
		t.Fatalf("%+v", forks)
	}
	f.get(forks[1].Sandbox.SandboxID)
	f.want(f.do("POST", "/sandboxes/"+id+"/fork", `{"count":0}`), http.StatusBadRequest)
	var ids []string
	for _, name := range []string{"", "one", "two"} {
		var s struct {
			SnapshotID string
			Names      []string
		}
		f.want(f.do("POST", "/sandboxes/"+id+"/snapshots", `{"name":"`+name+`"}`), http.StatusCreated).decode(t, &s)
		ids = append(ids, s.SnapshotID)
		if (name != "") != slices.Contains(s.Names, name) {
			t.Errorf("%+v", s)
		}
		f.clock.advance(time.Millisecond)
	}
	f.want(f.do("POST", "/sandboxes/"+id+"/snapshots", `{"name":"two"}`), http.StatusConflict)
	for query, want := range map[string]int{"": 3, "sandboxID=" + id: 3, "sandboxID=x": 0, "name=one": 1} {
		var found []struct{ SnapshotID string }
		f.want(f.do("GET", "/snapshots?"+query, ""), http.StatusOK).decode(t, &found)
		if len(found) != want {
			t.Errorf("%q: %+v", query, found)
		}
	}
	r := f.want(f.do("GET", "/snapshots?limit=2", ""), http.StatusOK)
	r = f.want(f.do("GET", "/snapshots?limit=2&nextToken="+r.header.Get("X-Next-Token"), ""), http.StatusOK)
	if !strings.Contains(string(r.body), ids[0]) || strings.Contains(string(r.body), ids[1]) || r.header.Get("X-Next-Token") != "" {
		t.Errorf("the second page: %s", r.body)
	}
	f.want(f.do("GET", "/snapshots?nextToken=x", ""), http.StatusBadRequest)
	clone := f.create(`{"templateID":"two"}`)
	for _, name := range []string{ids[0], "one", "two"} {
		f.want(f.do("DELETE", "/templates/"+name, ""), http.StatusNoContent)
		f.want(f.do("DELETE", "/templates/"+name, ""), http.StatusNotFound)
	}
	f.get(clone)
	f.want(f.do("GET", "/templates", ""), http.StatusOK)
}

// TestBad sends what is not acceptable.
func TestBad(t *testing.T) {
	f := newFixture(t, nil)
	id := f.create("")
	for body, want := range map[string]int{
		`{`: 400, `[]`: 400, `{"timeout":"x"}`: 400, `{"timeout":-1}`: 400, `{"timeout":2592001}`: 400, "\"\xff\"": 400,
		`{"templateID":"none"}`: 404, `{"autoPauseMemory":false}`: 400,
		`{"metadata":{"a":"` + strings.Repeat("x", 17<<10) + `"}}`: 400, `{"x":"` + strings.Repeat("x", 65<<10) + `"}`: 413,
	} {
		f.want(f.do("POST", "/v2/sandboxes", body), want)
	}
	path := "/sandboxes/" + id
	for _, r := range []reply{
		f.do("POST", path+"/pause", `{"memory":false}`), f.do("POST", path+"/connect", `{"memory":false}`), f.do("POST", path+"/timeout", `{}`),
		f.do("POST", path+"/snapshots", `{"name":"a b"}`), f.do("GET", path+"/logs?cursor=-1", ""), f.do("GET", path+"/logs?limit=x", ""),
	} {
		f.want(r, http.StatusBadRequest)
	}
	f.want(f.do("GET", "/nothing", ""), http.StatusNotFound)
	f.want(f.do("PUT", path, ""), http.StatusMethodNotAllowed)
	if l := f.get(id); l.State != "running" {
		t.Errorf("%+v", l)
	}
}

// TestBounds reaches the limits of requests.
func TestBounds(t *testing.T) {
	f := newFixture(t, func(c *server.Config) { c.Rate, c.Burst = 0.5, 3 })
	for range 3 {
		f.want(f.do("GET", "/v2/sandboxes", ""), http.StatusOK)
	}
	r := f.want(f.do("GET", "/v2/sandboxes", ""), http.StatusTooManyRequests)
	if r.header.Get("Retry-After") != "2" {
		t.Errorf("Retry-After is %q", r.header.Get("Retry-After"))
	}
	f.want(f.as(f.other, "GET", "/v2/sandboxes", ""), http.StatusOK)
}

// TestOpen asks for what needs no key.
func TestOpen(t *testing.T) {
	f := newFixture(t, nil)
	id := f.create(`{"metadata":{"secret":"metadata"}}`)
	f.want(f.do("POST", "/sandboxes/"+id+"/pause", ""), http.StatusNoContent)
	f.want(f.as("", "GET", "/healthz", ""), http.StatusOK)
	r := f.want(f.as("", "GET", "/metrics", ""), http.StatusOK)
	for _, want := range []string{
		`cryovisor_sandboxes{state="paused"} 1`, `cryovisor_operation_seconds_count{operation="pause"} 1`,
		`cryovisor_http_requests_total{method="POST",route="/sandboxes/{sandboxID}/pause",status="204"} 1`,
	} {
		if !strings.Contains(string(r.body), want) {
			t.Errorf("the metrics lack %s:\n%s", want, r.body)
		}
	}
	for _, secret := range []string{id, "secret"} {
		if strings.Contains(string(r.body), secret) || strings.Contains(f.log.String(), "metadata\"") {
			t.Errorf("%s is told to everybody", secret)
		}
	}
	for path, want := range map[string]string{"/": "text/html", "/page.js": "text/javascript", "/page.css": "text/css"} {
		r := f.want(f.as("", "GET", path, ""), http.StatusOK)
		if !strings.HasPrefix(r.header.Get("Content-Type"), want) || !strings.Contains(r.header.Get("Content-Security-Policy"), "default-src 'none'") {
			t.Errorf("%s: %v", path, r.header)
		}
	}
	for state, want := range map[string]int{id: http.StatusBadGateway, f.create(""): http.StatusNoContent, "x": http.StatusBadGateway} {
		request, err := http.NewRequestWithContext(t.Context(), "GET", f.url+"/health", nil)
		f.must(err)
		request.Header.Set("E2b-Sandbox-Id", state)
		answer, err := http.DefaultClient.Do(request)
		f.must(err)
		answer.Body.Close()
		if answer.StatusCode != want {
			t.Errorf("health of %s: %d, want %d", state, answer.StatusCode, want)
		}
	}
	request, err := http.NewRequestWithContext(t.Context(), "GET", f.url+"/healthz", nil)
	f.must(err)
	for given, kept := range map[string]bool{"abc-1": true, "a b": false, strings.Repeat("a", 65): false} {
		request.Header.Set("X-Request-Id", given)
		answer, err := http.DefaultClient.Do(request)
		f.must(err)
		answer.Body.Close()
		if got := answer.Header.Get("X-Request-Id"); got == "" || (got == given) != kept {
			t.Errorf("request id %q for %q", got, given)
		}
	}
}

// TestDescribed holds the routes against the description, both ways.
func TestDescribed(t *testing.T) {
	f := newFixture(t, nil)
	answer, err := http.Get(f.url + "/openapi.json")
	f.must(err)
	defer answer.Body.Close()
	var doc struct{ Paths map[string]map[string]any }
	f.must(json.NewDecoder(answer.Body).Decode(&doc))
	described := make(map[string]bool)
	for path, methods := range doc.Paths {
		for method := range methods {
			described[strings.ToUpper(method)+" "+path] = true
		}
	}
	routes := server.Routes()
	for _, r := range routes {
		if !described[r] {
			t.Errorf("%s is not described", r)
		}
		delete(described, r)
	}
	for r := range described {
		t.Errorf("%s is described, and not there", r)
	}
}
