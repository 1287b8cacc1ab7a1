package server

import (
	"bytes"
	"net/http"
	"strconv"
	"time"

	"github.com/cryovisor/cryovisor/lifecycle"
	"github.com/cryovisor/cryovisor/memory"
)

type metricsBody struct {
	Timestamp     time.Time `json:"timestamp"`
	TimestampUnix int64     `json:"timestampUnix"`
	CPUCount      int       `json:"cpuCount"`
	CPUUsedPct    float64   `json:"cpuUsedPct"` // of one processor, since it last began to run
	MemUsed       uint64    `json:"memUsed"`
	MemTotal      uint64    `json:"memTotal"`
	MemCache      uint64    `json:"memCache"`
	DiskUsed      uint64    `json:"diskUsed"`
	DiskTotal     uint64    `json:"diskTotal"`
}

// sandboxMetrics answers with one sample, of now: none is kept. A paused sandbox has none.
func (s *Server) sandboxMetrics(w http.ResponseWriter, r *request) error {
	info, err := s.sandbox(r)
	if err != nil {
		return err
	}
	bodies := []metricsBody{}
	if machine, err := s.cfg.Manager.Machine(info.ID); err == nil {
		bodies = append(bodies, sample(info, machine))
	}
	writeJSON(w, http.StatusOK, bodies)
	return nil
}

func sample(info lifecycle.SandboxInfo, machine *lifecycle.Machine) metricsBody {
	now := time.Now().UTC()
	body := metricsBody{
		Timestamp: now, TimestampUnix: now.Unix(), CPUCount: info.VCPUs, MemTotal: info.MemoryBytes, DiskTotal: info.DiskBytes,
		MemUsed: machine.VM.Memory().Stats().PagesFetched * memory.PageSize,
	}
	if ran := now.Sub(info.Started); ran > 0 {
		body.CPUUsedPct = 100 * float64(machine.VM.Activity().VCPU) / float64(ran)
	}
	return body
}

type logsBody struct {
	Logs []logBody `json:"logs"`
}

type logBody struct {
	Timestamp time.Time         `json:"timestamp"`
	Message   string            `json:"message"`
	Level     string            `json:"level"`
	Fields    map[string]string `json:"fields"`
}

// maxLogLines is how many lines an answer has at most, and has if nothing is said.
const maxLogLines = 1000

// logs answers with lines of the guest's console, whose time is not known: that of the sandbox's start stands for it. A cursor is an offset in all of the
// output; each line has its end as a field, from which the next answer may go on.
func (s *Server) logs(w http.ResponseWriter, r *request) error {
	info, err := s.sandbox(r)
	if err != nil {
		return err
	}
	query := r.URL.Query()
	cursor, err := numberOf(query.Get("cursor"), 0)
	if err != nil {
		return err
	}
	limit, err := numberOf(query.Get("limit"), maxLogLines)
	if err != nil {
		return err
	}
	offset, text, err := s.cfg.Manager.Logs(r.Context(), info.ID)
	if err != nil {
		return err
	}
	body := logsBody{Logs: []logBody{}}
	for len(text) > 0 && int64(len(body.Logs)) < min(limit, maxLogLines) {
		line, rest, _ := bytes.Cut(text, []byte("\n"))
		end := offset + int64(len(text)-len(rest))
		if end > cursor {
			body.Logs = append(body.Logs, logBody{
				Timestamp: info.Started, Message: string(bytes.ToValidUTF8(bytes.TrimRight(line, "\r"), []byte("\ufffd"))), Level: "info",
				Fields: map[string]string{"cursor": strconv.FormatInt(end, 10)},
			})
		}
		offset, text = end, rest
	}
	writeJSON(w, http.StatusOK, body)
	return nil
}

func numberOf(text string, absent int64) (int64, error) {
	if text == "" {
		return absent, nil
	}
	n, err := strconv.ParseInt(text, 10, 64)
	if err != nil || n < 0 {
		return 0, badRequest("a cursor and a limit are numbers")
	}
	return n, nil
}

// guestHealth says whether a sandbox runs, as SDKs ask that of the agent in it. It needs no key, as there, and says nothing else.
func (s *Server) guestHealth(w http.ResponseWriter, r *request) error {
	id := r.Header.Get("E2b-Sandbox-Id")
	if info, err := s.cfg.Manager.Get(id); err == nil && info.State == lifecycle.StateRunning {
		w.WriteHeader(http.StatusNoContent)
		return nil
	}
	writeJSON(w, http.StatusBadGateway, map[string]any{
		"sandboxId": id[:min(len(id), 64)], "message": "The sandbox was not found", "code": http.StatusBadGateway,
	})
	return nil
}

func (s *Server) healthz(w http.ResponseWriter, _ *request) error {
	if _, err := s.cfg.Manager.List(lifecycle.ListOptions{Limit: 1}); err != nil {
		return err
	}
	writeJSON(w, http.StatusOK, map[string]string{"status": "ok"})
	return nil
}
