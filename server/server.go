// Package server gives a lifecycle.Manager to anyone with a sandbox SDK of the E2B family: it serves their REST contract, both generations of its
// routes, over HTTP. Guests have no agent of that family's: what the SDKs send into a guest (commands, files) is not served.
package server

import (
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"runtime/debug"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/time/rate"

	"github.com/cryovisor/cryovisor/lifecycle"
)

// Bounds of a server, where a Config says nothing.
const (
	DefaultRate     = 50  // requests a second for each API key
	DefaultBurst    = 100 // of them at once
	DefaultInFlight = 256 // requests at once, of all keys
	maxBody         = 64 << 10
	// longest is how long a pause, or what else changes a sandbox, may go on when its caller has gone.
	longest = 10 * time.Minute
)

// Config describes a server.
type Config struct {
	Manager *lifecycle.Manager
	Keys    *Keys
	// Logger gets a line for each request; nil: nobody does. Bodies, keys and metadata are in none.
	Logger *slog.Logger
	// Rate and Burst bound the requests of an API key, InFlight those of all; 0 means the defaults.
	Rate     rate.Limit
	Burst    int
	InFlight int
}

// Server is an http.Handler. Its methods may be called from any number of goroutines. Close it before its Manager.
type Server struct {
	cfg      Config
	mux      *http.ServeMux
	limiters limiters
	inFlight atomic.Int64
	metrics  *metrics
	activity *activity
}

// New makes a server.
func New(cfg Config) (*Server, error) {
	if cfg.Manager == nil || cfg.Keys == nil {
		return nil, errors.New("server: needs a Manager and Keys")
	}
	if cfg.Rate < 0 || cfg.Burst < 0 || cfg.InFlight < 0 {
		return nil, fmt.Errorf("server: bounds can't be negative: Rate %v, Burst %d, InFlight %d", cfg.Rate, cfg.Burst, cfg.InFlight)
	}
	if cfg.Rate == 0 {
		cfg.Rate = DefaultRate
	}
	if cfg.Burst == 0 {
		cfg.Burst = DefaultBurst
	}
	if cfg.InFlight == 0 {
		cfg.InFlight = DefaultInFlight
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	s := &Server{cfg: cfg, mux: http.NewServeMux(), limiters: limiters{rate: cfg.Rate, burst: cfg.Burst}}
	s.metrics = newMetrics(cfg.Manager)
	s.activity = newActivity(cfg.Manager)
	for _, r := range s.routes() {
		s.mux.Handle(r.method+" "+r.pattern, s.handler(r))
	}
	return s, nil
}

// Close ends what the server does besides answering requests.
func (s *Server) Close() { s.activity.close() }

// Metrics returns the server's metrics, for an embedder's own registry.
func (s *Server) Metrics() prometheus.Gatherer { return s.metrics.registry }

// route is what one method of one path does. Its function writes the answer to a good request; an error becomes one.
type route struct {
	method, pattern string
	open            bool // no API key is needed
	do              func(w http.ResponseWriter, r *request) error
}

func (s *Server) routes() []route {
	return []route{
		{"POST", "/sandboxes", false, s.create(15 * time.Second)},
		{"POST", "/v2/sandboxes", false, s.create(300 * time.Second)},
		{"GET", "/sandboxes", false, s.list},
		{"GET", "/v2/sandboxes", false, s.list},
		{"GET", "/sandboxes/{sandboxID}", false, s.get},
		{"DELETE", "/sandboxes/{sandboxID}", false, s.kill},
		{"POST", "/sandboxes/{sandboxID}/pause", false, s.pause},
		{"POST", "/sandboxes/{sandboxID}/resume", false, s.resume},
		{"POST", "/sandboxes/{sandboxID}/connect", false, s.connect},
		{"POST", "/v2/sandboxes/{sandboxID}/connect", false, s.connect},
		{"POST", "/sandboxes/{sandboxID}/timeout", false, s.setTimeout},
		{"POST", "/sandboxes/{sandboxID}/refreshes", false, s.refresh},
		{"GET", "/sandboxes/{sandboxID}/metrics", false, s.sandboxMetrics},
		{"GET", "/sandboxes/{sandboxID}/logs", false, s.logs},
		{"GET", "/v2/sandboxes/{sandboxID}/logs", false, s.logs},
		{"POST", "/sandboxes/{sandboxID}/snapshots", false, s.snapshot},
		{"POST", "/sandboxes/{sandboxID}/fork", false, s.fork},
		{"GET", "/snapshots", false, s.snapshots},
		{"DELETE", "/templates/{templateID}", false, s.deleteTemplate},
		{"GET", "/templates", false, s.templates},
		{"GET", "/cryovisor/v1/activity", false, s.recent},
		{"GET", "/health", true, s.guestHealth},
		{"GET", "/healthz", true, s.healthz},
		{"GET", "/metrics", true, s.prometheus},
		{"GET", "/openapi.json", true, s.description},
		{"GET", "/{$}", true, s.page},
		{"GET", "/page.js", true, s.page},
		{"GET", "/page.css", true, s.page},
	}
}

// ServeHTTP implements http.Handler.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	began := time.Now()
	id := requestID(r)
	w.Header().Set("X-Request-Id", id)
	w.Header().Set("X-Content-Type-Options", "nosniff")
	seen := &recorder{ResponseWriter: w}
	defer func() {
		if cause := recover(); cause != nil { // a bug, which must not end the sandboxes that run in this process
			s.cfg.Logger.Error("panic", "request", id, "cause", fmt.Sprint(cause), "stack", string(debug.Stack()))
			if seen.status == 0 {
				writeError(seen, errInternal)
			}
		}
		s.metrics.observe(r.Method, seen, time.Since(began))
		s.cfg.Logger.Info("request", "request", id, "method", r.Method, "route", seen.route, "status", seen.status,
			"took", time.Since(began), "key", seen.key)
	}()
	if s.inFlight.Add(1) > int64(s.cfg.InFlight) {
		s.inFlight.Add(-1)
		writeError(seen, errBusy)
		return
	}
	defer s.inFlight.Add(-1)
	if _, pattern := s.mux.Handler(r); pattern == "" {
		writeError(seen, s.noRoute(r))
		return
	}
	s.mux.ServeHTTP(seen, r)
}

// noRoute is why a request fits none of the routes.
func (s *Server) noRoute(r *http.Request) error {
	for _, method := range []string{"GET", "POST", "DELETE"} {
		other := *r
		other.Method = method
		if _, pattern := s.mux.Handler(&other); pattern != "" {
			return newError(http.StatusMethodNotAllowed, "this path has no method "+r.Method)
		}
	}
	return newError(http.StatusNotFound, "there is no such path")
}

// handler authenticates and bounds a request, and has its route answer it.
func (s *Server) handler(rt route) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		seen, _ := w.(*recorder)
		seen.route = rt.pattern
		req := &request{Request: r, route: rt.pattern}
		if !rt.open {
			key, err := s.authenticate(r)
			if err != nil {
				s.logFailure(w, req, err)
				writeError(w, err)
				return
			}
			req.owner, seen.key = key, key
		}
		r.Body = http.MaxBytesReader(w, r.Body, maxBody)
		if err := rt.do(w, req); err != nil {
			s.logFailure(w, req, err)
			writeError(w, err)
		}
	})
}

// logFailure logs an error that is the server's, of which its caller is not told more than that.
func (s *Server) logFailure(w http.ResponseWriter, r *request, err error) {
	if statusOf(err) >= http.StatusInternalServerError {
		s.cfg.Logger.Error("failed", "request", w.Header().Get("X-Request-Id"), "route", r.route, "error", err)
	}
}

// request is one of an API key, whose id is the owner of its sandboxes.
type request struct {
	*http.Request
	owner string
	route string
}

// recorder notes what is answered.
type recorder struct {
	http.ResponseWriter
	route, key string
	status     int
}

// WriteHeader implements http.ResponseWriter.
func (r *recorder) WriteHeader(status int) {
	if r.status == 0 {
		r.status = status
	}
	r.ResponseWriter.WriteHeader(status)
}

// Write implements http.ResponseWriter.
func (r *recorder) Write(b []byte) (int, error) {
	if r.status == 0 {
		r.status = http.StatusOK
	}
	return r.ResponseWriter.Write(b)
}
