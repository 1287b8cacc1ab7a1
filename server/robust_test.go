//go:build linux && amd64

package server_test

import (
	"context"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/cryovisor/cryovisor/lifecycle"
	"github.com/cryovisor/cryovisor/server"
)

// bodyFunc is a body that is read by a function.
type bodyFunc func() (int, error)

func (f bodyFunc) Read([]byte) (int, error) { return f() }

// TestCallerGoesAway has the caller of a pause go away when the request has been read: it is done even so.
func TestCallerGoesAway(t *testing.T) {
	f := newFixture(t, nil)
	id := f.create(`{"timeout":3600}`)
	ctx, cancel := context.WithCancel(t.Context())
	r := httptest.NewRequestWithContext(ctx, "POST", "/sandboxes/"+id+"/pause", bodyFunc(func() (int, error) {
		cancel()
		return 0, io.EOF
	}))
	r.Header.Set("X-API-KEY", f.key)
	w := httptest.NewRecorder()
	f.server.ServeHTTP(w, r)
	if info, err := f.manager.Get(id); err != nil || info.State != lifecycle.StatePaused || w.Code != http.StatusNoContent {
		t.Errorf("%+v, %v; answered with %d", info, err, w.Code)
	}
}

// TestInFlight has more requests at once than are allowed.
func TestInFlight(t *testing.T) {
	f := newFixture(t, func(c *server.Config) { c.InFlight = 1 })
	id := f.create(`{"timeout":3600}`)
	read, write := io.Pipe()
	begun := make(chan struct{})
	r := httptest.NewRequestWithContext(t.Context(), "POST", "/sandboxes/"+id+"/pause", bodyFunc(func() (int, error) {
		close(begun)
		return read.Read(nil)
	}))
	r.Header.Set("X-API-KEY", f.key)
	w := httptest.NewRecorder()
	answered := make(chan struct{})
	go func() {
		f.server.ServeHTTP(w, r)
		close(answered)
	}()
	<-begun
	f.want(f.do("GET", "/v2/sandboxes", ""), http.StatusServiceUnavailable)
	f.must(write.Close())
	<-answered
	if w.Code != http.StatusNoContent {
		t.Errorf("the first was answered with %d", w.Code)
	}
	f.want(f.do("GET", "/v2/sandboxes", ""), http.StatusOK)
}

// TestFailures has the server fail: callers learn that and no more, and the log has the rest.
func TestFailures(t *testing.T) {
	f := newFixture(t, func(c *server.Config) { c.InFlight = 2 })
	server.AddRoute(f.server, "GET /panic", func(http.ResponseWriter, *http.Request) { panic("a bug") })
	for range 3 { // each gives its place back
		w := httptest.NewRecorder()
		f.server.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), "GET", "/panic", nil))
		f.want(reply{status: w.Code, body: w.Body.Bytes()}, http.StatusInternalServerError)
	}
	if log := f.log.String(); !strings.Contains(log, "a bug") || !strings.Contains(log, "robust_test.go") {
		t.Errorf("the log does not say where: %s", log)
	}
	f.must(f.keys.Close())
	r := f.want(f.do("GET", "/v2/sandboxes", ""), http.StatusInternalServerError)
	if strings.Contains(string(r.body), "database") || !strings.Contains(f.log.String(), "database is closed") {
		t.Errorf("%s; the log: %s", r.body, f.log.String())
	}
}

// TestSnapshotsComeAndGo deletes a snapshot between two pages.
func TestSnapshotsComeAndGo(t *testing.T) {
	f := newFixture(t, nil)
	id := f.create(`{"timeout":3600}`)
	for _, name := range []string{"oldest", "middle", "newest"} {
		f.want(f.do("POST", "/sandboxes/"+id+"/snapshots", `{"name":"`+name+`"}`), http.StatusCreated)
	}
	r := f.want(f.do("GET", "/snapshots?limit=2", ""), http.StatusOK)
	f.want(f.do("DELETE", "/templates/middle", ""), http.StatusNoContent)
	f.want(f.do("POST", "/sandboxes/"+id+"/snapshots", `{"name":"later"}`), http.StatusCreated)
	r = f.want(f.do("GET", "/snapshots?limit=2&nextToken="+r.header.Get("X-Next-Token"), ""), http.StatusOK)
	var page []struct{ Names []string }
	r.decode(t, &page)
	if len(page) != 1 || page[0].Names[0] != "oldest" || r.header.Get("X-Next-Token") != "" {
		t.Errorf("the second page: %s, %v", r.body, r.header)
	}
	for _, token := range []string{"1", "-x", "x-x", "9223372036854775808-x"} {
		f.want(f.do("GET", "/snapshots?nextToken="+token, ""), http.StatusBadRequest)
	}
}
