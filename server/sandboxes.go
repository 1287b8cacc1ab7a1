package server

import (
	"context"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/cryovisor/cryovisor/lifecycle"
)

// The most, and what a list has if nothing is said.
const maxLimit = 100

// detached is the context of what changes a sandbox: that goes on if the caller goes away, for who asks again is to find it done.
func detached(r *request) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(r.Context()), longest)
}

// sandbox returns the request's sandbox. Another's does not exist.
func (s *Server) sandbox(r *request) (lifecycle.SandboxInfo, error) {
	info, err := s.cfg.Manager.Get(r.PathValue("sandboxID"))
	if err == nil && info.Owner != r.owner {
		err = lifecycle.ErrNotFound
	}
	return info, err
}

func (s *Server) create(timeout time.Duration) func(http.ResponseWriter, *request) error {
	return func(w http.ResponseWriter, r *request) error {
		opts, err := createOptions(r.Body, timeout)
		if err != nil {
			return err
		}
		opts.Owner = r.owner
		ctx, cancel := detached(r)
		defer cancel()
		sandbox, err := s.cfg.Manager.Create(ctx, opts)
		if err != nil {
			return err
		}
		info, err := sandbox.Info()
		if err != nil {
			return err
		}
		writeJSON(w, http.StatusCreated, s.sandboxBody(info))
		return nil
	}
}

// createOptions reads the body of a create; timeout is that of one that says nothing.
func createOptions(r io.Reader, timeout time.Duration) (lifecycle.CreateOptions, error) {
	body := createBody{TemplateID: BaseTemplate}
	if err := readBody(r, &body); err != nil {
		return lifecycle.CreateOptions{}, err
	}
	if body.AutoPauseMemory != nil && !*body.AutoPauseMemory {
		return lifecycle.CreateOptions{}, badRequest("pauses without memory are not supported")
	}
	d, err := seconds(body.Timeout, timeout)
	if err != nil {
		return lifecycle.CreateOptions{}, err
	}
	opts := lifecycle.CreateOptions{Template: body.TemplateID, Metadata: body.Metadata, Timeout: max(d, time.Nanosecond)}
	if body.AutoPause {
		opts.OnTimeout = lifecycle.ActionPause
	}
	opts.AutoResume = body.AutoResume != nil && body.AutoResume.Enabled
	return opts, nil
}

func (s *Server) get(w http.ResponseWriter, r *request) error {
	info, err := s.sandbox(r)
	if err != nil {
		return err
	}
	body := s.listedBody(info)
	body.Lifecycle = &lifecycleBody{OnTimeout: string(info.OnTimeout), AutoResume: info.AutoResume}
	writeJSON(w, http.StatusOK, body)
	return nil
}

func (s *Server) list(w http.ResponseWriter, r *request) error {
	opts, err := s.listOptions(r)
	if err != nil {
		return err
	}
	page, err := s.cfg.Manager.List(opts)
	if err != nil {
		return err
	}
	bodies := make([]listedBody, len(page.Sandboxes))
	for i, info := range page.Sandboxes {
		bodies[i] = s.listedBody(info)
	}
	if page.Next != "" {
		w.Header().Set("X-Next-Token", page.Next)
	}
	writeJSON(w, http.StatusOK, bodies)
	return nil
}

func (s *Server) listOptions(r *request) (lifecycle.ListOptions, error) {
	query := r.URL.Query()
	opts := lifecycle.ListOptions{Owner: r.owner, Token: query.Get("nextToken"), Limit: maxLimit}
	var err error
	if opts.Metadata, err = parseMetadata(query.Get("metadata")); err != nil {
		return opts, err
	}
	if opts.Limit, err = limitOf(query.Get("limit")); err != nil {
		return opts, err
	}
	for _, list := range query["state"] {
		for state := range strings.SplitSeq(list, ",") {
			switch state {
			case "running":
				opts.States = append(opts.States, lifecycle.StateRunning)
			case "paused":
				opts.States = append(opts.States, lifecycle.StatePaused)
			default:
				return opts, badRequest("a state is running or paused")
			}
		}
	}
	for _, unknown := range []string{"template", "order", "startedAfter"} {
		if query.Has(unknown) {
			return opts, badRequest("lists by " + unknown + " are not supported")
		}
	}
	return opts, nil
}

func limitOf(text string) (int, error) {
	if text == "" {
		return maxLimit, nil
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < 1 || n > maxLimit {
		return 0, badRequest("a limit is from 1 to 100")
	}
	return n, nil
}

func (s *Server) kill(w http.ResponseWriter, r *request) error {
	info, err := s.sandbox(r)
	if err != nil {
		return err
	}
	ctx, cancel := detached(r)
	defer cancel()
	if err := s.cfg.Manager.Kill(ctx, info.ID); err != nil {
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

// memoryBody is a body that may ask for a pause, or a connection, without memory.
type memoryBody struct {
	Timeout *int64 `json:"timeout"`
	Memory  *bool  `json:"memory"`
}

// read reads the body; memory is what makes a pause what it is here.
func (b *memoryBody) read(r *request) error {
	if err := readBody(r.Body, b); err != nil {
		return err
	}
	if b.Memory != nil && !*b.Memory {
		return badRequest("pauses and connections without memory are not supported")
	}
	return nil
}

func (s *Server) pause(w http.ResponseWriter, r *request) error {
	info, err := s.sandbox(r)
	if err != nil {
		return err
	}
	if err := new(memoryBody).read(r); err != nil {
		return err
	}
	ctx, cancel := detached(r)
	defer cancel()
	if _, err := s.cfg.Manager.Pause(ctx, info.ID); err != nil {
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

func (s *Server) connect(w http.ResponseWriter, r *request) error {
	info, opts, err := s.connectOptions(r)
	if err != nil {
		return err
	}
	ctx, cancel := detached(r)
	defer cancel()
	info, resumed, err := s.cfg.Manager.Connect(ctx, info.ID, opts)
	if err != nil {
		return err
	}
	status := http.StatusOK
	if resumed {
		status = http.StatusCreated
	}
	writeJSON(w, status, s.sandboxBody(info))
	return nil
}

func (s *Server) connectOptions(r *request) (info lifecycle.SandboxInfo, opts lifecycle.ConnectOptions, err error) {
	if info, err = s.sandbox(r); err != nil {
		return info, opts, err
	}
	var body memoryBody
	if err := body.read(r); err != nil {
		return info, opts, err
	}
	opts.Timeout, err = seconds(body.Timeout, 0)
	return info, opts, err
}

// resume is connect for older clients: one that runs is a conflict.
func (s *Server) resume(w http.ResponseWriter, r *request) error {
	info, opts, err := s.connectOptions(r)
	if err != nil {
		return err
	}
	ctx, cancel := detached(r)
	defer cancel()
	if info, err = s.cfg.Manager.Resume(ctx, info.ID, opts); err != nil {
		return err
	}
	writeJSON(w, http.StatusCreated, s.sandboxBody(info))
	return nil
}

func (s *Server) setTimeout(w http.ResponseWriter, r *request) error {
	info, err := s.sandbox(r)
	if err != nil {
		return err
	}
	var body struct {
		Timeout *int64 `json:"timeout"`
	}
	if err := readBody(r.Body, &body); err != nil {
		return err
	}
	if body.Timeout == nil {
		return badRequest("the body has no timeout")
	}
	d, err := seconds(body.Timeout, 0)
	if err != nil {
		return err
	}
	if err := s.cfg.Manager.SetTimeout(info.ID, d); err != nil {
		return notFoundIfPaused(err)
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

// refresh is activity: it extends the timeout by at least the duration.
func (s *Server) refresh(w http.ResponseWriter, r *request) error {
	info, err := s.sandbox(r)
	if err != nil {
		return err
	}
	var body struct {
		Duration *int64 `json:"duration"`
	}
	if err := readBody(r.Body, &body); err != nil {
		return err
	}
	d, err := seconds(body.Duration, 0)
	if err != nil {
		return err
	}
	if info.State == lifecycle.StatePaused {
		return lifecycle.ErrNotFound
	}
	if err := s.cfg.Manager.Extend(info.ID, d); err != nil {
		return notFoundIfPaused(err)
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}
