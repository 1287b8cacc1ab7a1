package client_test

import (
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/cryovisor/cryovisor/lifecycle"
	"github.com/cryovisor/cryovisor/server/client"
)

// answering is a client of a server that gives one answer to everything.
func answering(t *testing.T, status int, body string, headers ...string) *client.Client {
	t.Helper()
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		for i := 0; i < len(headers); i += 2 {
			w.Header().Set(headers[i], headers[i+1])
		}
		w.WriteHeader(status)
		_, _ = w.Write([]byte(body))
	}))
	t.Cleanup(s.Close)
	return &client.Client{URL: s.URL, Key: "key"}
}

// TestErrors holds errors against those of a Manager in the same process.
func TestErrors(t *testing.T) {
	for _, test := range []struct {
		status int
		body   string
		is     error
	}{
		{404, `{"code":404,"message":"not found"}`, lifecycle.ErrNotFound},
		{400, `{"code":400,"message":"no"}`, lifecycle.ErrInvalid},
		{401, `{"code":401,"message":"no"}`, client.ErrKey},
		{409, `{"code":409,"message":"the name is in use"}`, lifecycle.ErrExists},
		{429, `{"code":429,"message":"slowly"}`, client.ErrRateLimited},
		{404, `<html>`, lifecycle.ErrNotFound},
		{404, `{"message":"of a proxy"}`, lifecycle.ErrNotFound},
	} {
		err := answering(t, test.status, test.body).Pause(t.Context(), "a")
		if !errors.Is(err, test.is) || !strings.HasPrefix(err.Error(), "pause a: ") {
			t.Errorf("%d %s: %v", test.status, test.body, err)
		}
	}
	var state *lifecycle.StateError
	err := answering(t, 409, `{"code":409,"message":"it is paused","state":"paused"}`).Pause(t.Context(), "a")
	if want := (lifecycle.StateError{ID: "a", Op: "pause", State: lifecycle.StatePaused}); !errors.As(err, &state) || *state != want {
		t.Errorf("%v: %+v", err, state)
	}
	var limit *lifecycle.LimitError
	_, err = answering(t, 429, `{"code":429,"message":"no more","limit":{"what":"running sandboxes","most":3}}`).Create(t.Context(), client.CreateOptions{})
	if want := (lifecycle.LimitError{What: "running sandboxes", Limit: 3}); !errors.As(err, &limit) || *limit != want || errors.Is(err, client.ErrRateLimited) {
		t.Errorf("%v: %+v", err, limit)
	}
	var answer *client.Error
	_, err = answering(t, 429, `{}`, "Retry-After", "7").Get(t.Context(), "a")
	if !errors.As(err, &answer) || answer.RetryAfter != 7*time.Second {
		t.Errorf("%v: %+v", err, answer)
	}
	forks, err := answering(t, 201, `[{"sandbox":{"sandboxID":"b"}},{"error":{"code":404,"message":"gone"}}]`).Fork(t.Context(), "a", 2, 0)
	if len(forks) != 1 || forks[0].ID != "b" || !errors.Is(err, lifecycle.ErrNotFound) {
		t.Errorf("%v, %v", forks, err)
	}
}

// TestRedirect has a server send the client elsewhere: the key stays here.
func TestRedirect(t *testing.T) {
	elsewhere := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { t.Error("the redirect was followed") }))
	defer elsewhere.Close()
	for _, status := range []int{http.StatusFound, http.StatusTemporaryRedirect} {
		c := answering(t, status, "", "Location", elsewhere.URL)
		for _, by := range []*http.Client{nil, {}} {
			c.HTTP = by
			var answer *client.Error
			if _, _, err := c.List(t.Context(), client.ListOptions{}); !errors.As(err, &answer) || answer.Code != status {
				t.Errorf("%d: %v", status, err)
			}
		}
	}
}

func TestAnswers(t *testing.T) {
	for _, body := range []string{"", "[]", `{"sandboxID":1}`} {
		if s, err := answering(t, http.StatusOK, body).Get(t.Context(), "a"); err == nil {
			t.Errorf("%q was accepted: %+v", body, s)
		}
	}
	large := `{"sandboxID":"` + strings.Repeat("x", 16<<20) + `"}`
	if _, err := answering(t, http.StatusOK, large).Get(t.Context(), "a"); err == nil || !strings.Contains(err.Error(), "too large") {
		t.Errorf("an answer of %d bytes: %v", len(large), err)
	}
}
