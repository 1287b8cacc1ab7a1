package server

import (
	"errors"
	"math"
	"net/http"
	"strconv"
	"strings"

	"github.com/cryovisor/cryovisor/lifecycle"
)

// notFoundIfPaused is how the contract tells that a sandbox that must run is paused.
func notFoundIfPaused(err error) error {
	if state := (*lifecycle.StateError)(nil); errors.As(err, &state) {
		return lifecycle.ErrNotFound
	}
	return err
}

type snapshotBody struct {
	SnapshotID string   `json:"snapshotID"`
	Names      []string `json:"names"`
}

func newSnapshotBody(t lifecycle.TemplateInfo) snapshotBody {
	body := snapshotBody{SnapshotID: t.ID, Names: []string{}}
	if t.Name != "" {
		body.Names = append(body.Names, t.Name)
	}
	return body
}

func (s *Server) snapshot(w http.ResponseWriter, r *request) error {
	info, err := s.sandbox(r)
	if err != nil {
		return err
	}
	var body struct {
		Name string `json:"name"`
	}
	if err := readBody(r.Body, &body); err != nil {
		return err
	}
	ctx, cancel := detached(r)
	defer cancel()
	t, err := s.cfg.Manager.Checkpoint(ctx, info.ID, body.Name)
	if err != nil {
		return err
	}
	writeJSON(w, http.StatusCreated, newSnapshotBody(t))
	return nil
}

// place is where a snapshot is in a list, the newest first, also after it was deleted.
type place struct {
	created int64 // ns since 1970
	id      string
}

func placeOf(t lifecycle.TemplateInfo) place { return place{t.Created.UnixNano(), t.ID} }

// after says whether p comes behind q in a list.
func (p place) after(q place) bool {
	return p.created < q.created || p.created == q.created && p.id < q.id
}

func (p place) token() string { return strconv.FormatInt(p.created, 10) + "-" + p.id }

// parsePlace is token's inverse.
func parsePlace(token string) (p place, err error) {
	created, id, ok := strings.Cut(token, "-")
	if p.created, err = strconv.ParseInt(created, 10, 64); !ok || err != nil || p.created < 0 {
		return place{}, badRequest("not a page token")
	}
	p.id = id
	return p, nil
}

// snapshots lists checkpoints, the newest first.
func (s *Server) snapshots(w http.ResponseWriter, r *request) error {
	query := r.URL.Query()
	limit, err := limitOf(query.Get("limit"))
	if err != nil {
		return err
	}
	before := place{created: math.MaxInt64}
	if token := query.Get("nextToken"); token != "" {
		if before, err = parsePlace(token); err != nil {
			return err
		}
	}
	bodies, last := []snapshotBody{}, place{}
	for _, t := range s.cfg.Manager.Templates() {
		if !placeOf(t).after(before) || t.Owner != r.owner || t.Source == "" || query.Has("sandboxID") && t.Source != query.Get("sandboxID") ||
			query.Has("name") && t.Name != query.Get("name") {
			continue
		}
		if len(bodies) == limit {
			w.Header().Set("X-Next-Token", last.token())
			break
		}
		bodies, last = append(bodies, newSnapshotBody(t)), placeOf(t)
	}
	writeJSON(w, http.StatusOK, bodies)
	return nil
}

// deleteTemplate deletes a checkpoint by its id or name. Templates for all are not for one key to delete.
func (s *Server) deleteTemplate(w http.ResponseWriter, r *request) error {
	for _, t := range s.cfg.Manager.Templates() {
		name := r.PathValue("templateID")
		if t.Owner != r.owner || t.ID != name && t.Name != name {
			continue
		}
		ctx, cancel := detached(r)
		defer cancel()
		if err := s.cfg.Manager.DeleteTemplate(ctx, t.ID); err != nil {
			return err
		}
		w.WriteHeader(http.StatusNoContent)
		return nil
	}
	return lifecycle.ErrNotFound
}

type templateBody struct {
	TemplateID string   `json:"templateID"`
	Names      []string `json:"names"`
	CPUCount   int      `json:"cpuCount"`
	MemoryMB   uint64   `json:"memoryMB"`
	DiskSizeMB uint64   `json:"diskSizeMB"`
	Public     bool     `json:"public"`
}

// templates lists what sandboxes can be made of.
func (s *Server) templates(w http.ResponseWriter, r *request) error {
	bodies := []templateBody{}
	for _, t := range s.cfg.Manager.Templates() {
		if t.Owner != "" && t.Owner != r.owner {
			continue
		}
		bodies = append(bodies, templateBody{
			TemplateID: t.ID, Names: newSnapshotBody(t).Names, CPUCount: t.VCPUs, MemoryMB: t.MemoryBytes >> 20, DiskSizeMB: t.DiskBytes >> 20,
			Public: t.Owner == "",
		})
	}
	writeJSON(w, http.StatusOK, bodies)
	return nil
}

// forkResult is a sandbox or an error.
type forkResult struct {
	Sandbox *sandboxBody `json:"sandbox,omitempty"`
	Error   *apiError    `json:"error,omitempty"`
}

func (s *Server) fork(w http.ResponseWriter, r *request) error {
	info, err := s.sandbox(r)
	if err != nil {
		return err
	}
	body := struct {
		Timeout *int64 `json:"timeout"`
		Count   int    `json:"count"`
	}{Count: 1}
	if err := readBody(r.Body, &body); err != nil {
		return err
	}
	d, err := seconds(body.Timeout, 0)
	if err != nil {
		return err
	}
	ctx, cancel := detached(r)
	defer cancel()
	results, err := s.cfg.Manager.Fork(ctx, info.ID, body.Count, lifecycle.ConnectOptions{Timeout: d})
	if err != nil {
		return err
	}
	bodies := make([]forkResult, len(results))
	for i, result := range results {
		bodies[i] = s.forkResult(w, r, result)
	}
	writeJSON(w, http.StatusCreated, bodies)
	return nil
}

func (s *Server) forkResult(w http.ResponseWriter, r *request, result lifecycle.ForkResult) forkResult {
	info, err := lifecycle.SandboxInfo{}, result.Err
	if err == nil {
		info, err = result.Sandbox.Info()
	}
	if err != nil {
		s.logFailure(w, r, err)
		return forkResult{Error: answerOf(err)}
	}
	body := s.sandboxBody(info)
	return forkResult{Sandbox: &body}
}
