//go:build linux && amd64

package server_test

import (
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/cryovisor/cryovisor/lifecycle"
	"github.com/cryovisor/cryovisor/server"
	"github.com/cryovisor/cryovisor/server/client"
)

// TestClient has the client say what a Manager in the same process would.
func TestClient(t *testing.T) {
	f := newFixture(t, nil)
	ctx := t.Context()
	c := &client.Client{URL: f.url, Key: f.key}
	odd := map[string]string{"a&b=c": "1%20+ é/", "": "&=?#"}
	s, err := c.Create(ctx, client.CreateOptions{Metadata: odd, Timeout: time.Hour, Pause: true})
	f.must(err)
	_, err = c.Create(ctx, client.CreateOptions{Metadata: map[string]string{"a": "b=c"}, Timeout: time.Hour})
	f.must(err)
	found, next, err := c.List(ctx, client.ListOptions{State: "running", Metadata: odd})
	if err != nil || next != "" || len(found) != 1 || found[0].ID != s.ID || !maps.Equal(found[0].Metadata, odd) {
		t.Errorf("by metadata: %+v, %q, %v", found, next, err)
	}
	first, next, err := c.List(ctx, client.ListOptions{Limit: 1})
	if err != nil || len(first) != 1 || next == "" {
		t.Fatalf("%+v, %q, %v", first, next, err)
	}
	if second, next, err := c.List(ctx, client.ListOptions{Limit: 1, Token: next}); err != nil || len(second) != 1 || second[0].ID != s.ID || next != "" {
		t.Errorf("the next page: %+v, %q, %v", second, next, err)
	}
	id, err := c.Snapshot(ctx, s.ID, "kept")
	f.must(err)
	if kept, err := f.manager.Template("kept"); err != nil || kept.ID != id {
		t.Errorf("%q, %+v, %v", id, kept, err)
	}
	if _, err := c.Snapshot(ctx, s.ID, "kept"); !errors.Is(err, lifecycle.ErrExists) {
		t.Errorf("a name twice: %v", err)
	}
	f.must(c.SetTimeout(ctx, s.ID, 2*time.Hour))
	if got, err := c.Get(ctx, s.ID); err != nil || time.Until(got.End) < 119*time.Minute {
		t.Errorf("%+v, %v", got, err)
	}
	f.must(c.Pause(ctx, s.ID))
	var state *lifecycle.StateError
	if err := c.Pause(ctx, s.ID); !errors.As(err, &state) || state.State != lifecycle.StatePaused {
		t.Errorf("paused twice: %v", err)
	}
	f.must(c.Kill(ctx, s.ID))
	if err := c.Kill(ctx, s.ID); !errors.Is(err, lifecycle.ErrNotFound) {
		t.Errorf("killed twice: %v", err)
	}
}

// TestLimitError takes a limit of the Manager's through an answer of the server's.
func TestLimitError(t *testing.T) {
	want := lifecycle.LimitError{What: "paused sandboxes", Limit: 7}
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		server.WriteError(w, fmt.Errorf("pause: %w", &want))
	}))
	defer s.Close()
	var got *lifecycle.LimitError
	if err := (&client.Client{URL: s.URL}).Pause(t.Context(), "a"); !errors.As(err, &got) || *got != want {
		t.Errorf("%v", err)
	}
}
