// Package client talks to a server of sandboxes (package server) over HTTP. Its errors are those of package lifecycle where there is one: what
// errors.Is and errors.As tell is the same as with a Manager in the same process.
package client

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"time"
)

// maxAnswer bounds what a server may answer, in bytes.
const maxAnswer = 16 << 20

// Client is a server's URL and an API key for it. Its methods may be called from any number of goroutines.
type Client struct {
	URL string // such as http://127.0.0.1:7480
	Key string
	// HTTP makes the requests; nil means http.DefaultClient. Redirects are not followed, whatever it says: they would take the key elsewhere.
	HTTP *http.Client
}

// Sandbox is what a server says of a sandbox.
type Sandbox struct {
	ID          string            `json:"sandboxID"`
	Template    string            `json:"templateID"`
	Alias       string            `json:"alias,omitempty"` // the template's name
	State       string            `json:"state"`           // "running" or "paused"
	Started     time.Time         `json:"startedAt"`
	End         time.Time         `json:"endAt"`
	VCPUs       int               `json:"cpuCount"`
	MemoryMiB   uint64            `json:"memoryMB"`
	DiskMiB     uint64            `json:"diskSizeMB"`
	StoredBytes uint64            `json:"storedBytes"`
	Metadata    map[string]string `json:"metadata"`
}

// CreateOptions describe a new sandbox; see lifecycle.CreateOptions.
type CreateOptions struct {
	Template string
	Metadata map[string]string
	Timeout  time.Duration // of whole seconds; 0: the server's default
	Pause    bool          // at the timeout, instead of kill
}

// Create makes a sandbox.
func (c *Client) Create(ctx context.Context, o CreateOptions) (s Sandbox, err error) {
	body := map[string]any{"autoPause": o.Pause}
	if o.Template != "" {
		body["templateID"] = o.Template
	}
	if o.Metadata != nil {
		body["metadata"] = o.Metadata
	}
	addTimeout(body, o.Timeout)
	_, err = c.do(ctx, "create", "", http.MethodPost, "/v2/sandboxes", body, &s)
	return s, err
}

func addTimeout(body map[string]any, d time.Duration) {
	if d > 0 {
		body["timeout"] = int64(d / time.Second)
	}
}

// Connect has a sandbox run, and says whether it was paused.
func (c *Client) Connect(ctx context.Context, id string, timeout time.Duration) (s Sandbox, resumed bool, err error) {
	body := map[string]any{}
	addTimeout(body, timeout)
	answer, err := c.do(ctx, "connect to", id, http.MethodPost, "/v2/sandboxes/"+url.PathEscape(id)+"/connect", body, &s)
	return s, err == nil && answer.StatusCode == http.StatusCreated, err
}

// Pause pauses a sandbox. Errors: a *lifecycle.StateError for one that is paused.
func (c *Client) Pause(ctx context.Context, id string) error {
	_, err := c.do(ctx, "pause", id, http.MethodPost, "/sandboxes/"+url.PathEscape(id)+"/pause", map[string]any{}, nil)
	return err
}

// Kill kills a sandbox.
func (c *Client) Kill(ctx context.Context, id string) error {
	_, err := c.do(ctx, "kill", id, http.MethodDelete, "/sandboxes/"+url.PathEscape(id), nil, nil)
	return err
}

// Get describes a sandbox.
func (c *Client) Get(ctx context.Context, id string) (s Sandbox, err error) {
	_, err = c.do(ctx, "find", id, http.MethodGet, "/sandboxes/"+url.PathEscape(id), nil, &s)
	return s, err
}

// ListOptions choose sandboxes.
type ListOptions struct {
	State    string // "running" or "paused"; empty: both
	Metadata map[string]string
	Limit    int    // 0: 100
	Token    string // of the page before
}

// List returns a page of sandboxes, the newest first, and the token of the next one, which is empty after the last.
func (c *Client) List(ctx context.Context, o ListOptions) (page []Sandbox, next string, err error) {
	query := url.Values{}
	if o.State != "" {
		query.Set("state", o.State)
	}
	if len(o.Metadata) > 0 {
		pairs := url.Values{}
		for k, v := range o.Metadata {
			pairs.Set(url.PathEscape(k), url.PathEscape(v))
		}
		query.Set("metadata", pairs.Encode())
	}
	if o.Limit > 0 {
		query.Set("limit", strconv.Itoa(o.Limit))
	}
	if o.Token != "" {
		query.Set("nextToken", o.Token)
	}
	answer, err := c.do(ctx, "list", "", http.MethodGet, "/v2/sandboxes?"+query.Encode(), nil, &page)
	if err != nil {
		return nil, "", err
	}
	return page, answer.Header.Get("X-Next-Token"), nil
}

// SetTimeout sets the timeout of a sandbox that runs, from now; d is of whole seconds. The contract has one that is paused be lifecycle.ErrNotFound.
func (c *Client) SetTimeout(ctx context.Context, id string, d time.Duration) error {
	body := map[string]any{"timeout": int64(d / time.Second)}
	_, err := c.do(ctx, "set the timeout of", id, http.MethodPost, "/sandboxes/"+url.PathEscape(id)+"/timeout", body, nil)
	return err
}

// Fork makes n sandboxes of one. Those that could not be made are errors joined into err, and left out.
func (c *Client) Fork(ctx context.Context, id string, n int, timeout time.Duration) (forks []Sandbox, err error) {
	body := map[string]any{"count": n}
	addTimeout(body, timeout)
	var results []struct {
		Sandbox *Sandbox
		Error   *Error
	}
	if _, err := c.do(ctx, "fork", id, http.MethodPost, "/sandboxes/"+url.PathEscape(id)+"/fork", body, &results); err != nil {
		return nil, err
	}
	for _, r := range results {
		switch {
		case r.Sandbox != nil:
			forks = append(forks, *r.Sandbox)
		case r.Error != nil:
			r.Error.Op, r.Error.ID = "fork", id
			err = errors.Join(err, r.Error)
		}
	}
	return forks, err
}

// Snapshot keeps a sandbox as it is, under a name or none, for Create; it goes on. The id is the template's. Errors: lifecycle.ErrExists.
func (c *Client) Snapshot(ctx context.Context, id, name string) (template string, err error) {
	body := map[string]any{}
	if name != "" {
		body["name"] = name
	}
	var made struct{ SnapshotID string }
	_, err = c.do(ctx, "snapshot", id, http.MethodPost, "/sandboxes/"+url.PathEscape(id)+"/snapshots", body, &made)
	return made.SnapshotID, err
}

// Log is a line that a guest wrote to its console.
type Log struct {
	Message string            `json:"message"`
	Fields  map[string]string `json:"fields"`
}

// Logs returns lines that end behind a cursor, and the cursor behind them.
func (c *Client) Logs(ctx context.Context, id string, cursor int64) (lines []Log, next int64, err error) {
	var body struct{ Logs []Log }
	path := "/v2/sandboxes/" + url.PathEscape(id) + "/logs?cursor=" + strconv.FormatInt(cursor, 10)
	if _, err := c.do(ctx, "read the logs of", id, http.MethodGet, path, nil, &body); err != nil {
		return nil, cursor, err
	}
	for _, l := range body.Logs {
		if n, err := strconv.ParseInt(l.Fields["cursor"], 10, 64); err == nil {
			cursor = max(cursor, n)
		}
	}
	return body.Logs, cursor, nil
}

// Usage is what a running sandbox uses.
type Usage struct {
	CPUPercent float64 `json:"cpuUsedPct"` // of one processor, since it last began to run
	MemUsed    uint64  `json:"memUsed"`    // bytes
	MemTotal   uint64  `json:"memTotal"`
}

// Usage returns nil for a sandbox that is paused.
func (c *Client) Usage(ctx context.Context, id string) (*Usage, error) {
	var samples []Usage
	_, err := c.do(ctx, "measure", id, http.MethodGet, "/sandboxes/"+url.PathEscape(id)+"/metrics", nil, &samples)
	if err != nil || len(samples) == 0 {
		return nil, err
	}
	return &samples[len(samples)-1], nil
}

// do makes a request, and decodes a good answer. id, which may be empty, is for errors.
func (c *Client) do(ctx context.Context, op, id, method, path string, body, into any) (*http.Response, error) {
	fail := func(err error) error { return fmt.Errorf("%s: %w", named(op, id), err) }
	var content io.Reader
	if body != nil {
		b, err := json.Marshal(body)
		if err != nil {
			return nil, fail(err)
		}
		content = bytes.NewReader(b)
	}
	request, err := http.NewRequestWithContext(ctx, method, c.URL+path, content)
	if err != nil {
		return nil, fail(err)
	}
	request.Header.Set("X-API-KEY", c.Key)
	if body != nil {
		request.Header.Set("Content-Type", "application/json")
	}
	answer, err := c.http().Do(request)
	if err != nil {
		return nil, fail(err)
	}
	defer answer.Body.Close()
	text, err := io.ReadAll(io.LimitReader(answer.Body, maxAnswer+1))
	if err != nil {
		return nil, fail(err)
	}
	if len(text) > maxAnswer {
		return nil, fail(errors.New("the server's answer is too large"))
	}
	if answer.StatusCode >= 300 {
		return nil, failure(op, id, answer, text)
	}
	if into != nil {
		if err := json.Unmarshal(text, into); err != nil {
			return nil, fail(fmt.Errorf("the server's answer is not as expected: %w", err))
		}
	}
	return answer, nil
}

// http is the client's, but for redirects: net/http would take the header with the key along, to any host.
func (c *Client) http() *http.Client {
	by := http.Client{}
	if c.HTTP != nil {
		by = *c.HTTP
	}
	by.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	return &by
}
