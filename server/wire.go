package server

import (
	"encoding/json"
	"errors"
	"io"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/cryovisor/cryovisor/lifecycle"
)

// What the SDKs want to be told, and has no meaning here.
const (
	clientID    = "cryovisor"
	envdVersion = "0.6.4" // of an agent that guests do not have; SDKs kill sandboxes with too old a one
)

// maxTimeout bounds timeouts, in seconds.
const maxTimeout = 30 * 24 * 3600

// createBody is what a create says. What is not here is ignored.
type createBody struct {
	TemplateID      string            `json:"templateID"`
	Metadata        map[string]string `json:"metadata"`
	Timeout         *int64            `json:"timeout"`
	AutoPause       bool              `json:"autoPause"`
	AutoPauseMemory *bool             `json:"autoPauseMemory"`
	AutoResume      *struct {
		Enabled bool `json:"enabled"`
	} `json:"autoResume"`
}

// sandboxBody is the answer to a create, connect or resume.
type sandboxBody struct {
	TemplateID  string `json:"templateID"`
	SandboxID   string `json:"sandboxID"`
	ClientID    string `json:"clientID"`
	EnvdVersion string `json:"envdVersion"`
	Alias       string `json:"alias,omitempty"`
}

// listedBody is a sandbox in a list, and, with Lifecycle, alone.
type listedBody struct {
	sandboxBody
	StartedAt  time.Time         `json:"startedAt"`
	EndAt      time.Time         `json:"endAt"`
	State      string            `json:"state"`
	CPUCount   int               `json:"cpuCount"`
	MemoryMB   uint64            `json:"memoryMB"`
	DiskSizeMB uint64            `json:"diskSizeMB"`
	Metadata   map[string]string `json:"metadata"`
	// StoredBytes is an addition of ours.
	StoredBytes uint64         `json:"storedBytes"`
	Lifecycle   *lifecycleBody `json:"lifecycle,omitempty"`
}

type lifecycleBody struct {
	OnTimeout  string `json:"onTimeout"`
	AutoResume bool   `json:"autoResume"`
}

func (s *Server) sandboxBody(info lifecycle.SandboxInfo) sandboxBody {
	body := sandboxBody{TemplateID: info.Template, SandboxID: info.ID, ClientID: clientID, EnvdVersion: envdVersion}
	if t, err := s.cfg.Manager.Template(info.Template); err == nil {
		body.Alias = t.Name
	}
	return body
}

func (s *Server) listedBody(info lifecycle.SandboxInfo) listedBody {
	state := "running"
	if info.State == lifecycle.StatePaused || info.State == lifecycle.StateResuming {
		state = "paused"
	}
	if info.Metadata == nil {
		info.Metadata = map[string]string{}
	}
	return listedBody{
		sandboxBody: s.sandboxBody(info), StartedAt: info.Started, EndAt: info.End.UTC(), State: state, CPUCount: info.VCPUs,
		MemoryMB: info.MemoryBytes >> 20, DiskSizeMB: info.DiskBytes >> 20, Metadata: info.Metadata, StoredBytes: info.StoredBytes,
	}
}

// readBody decodes a body of JSON, which may be empty.
func readBody(r io.Reader, into any) error {
	b, err := io.ReadAll(r)
	if err != nil {
		if tooLarge := (*http.MaxBytesError)(nil); errors.As(err, &tooLarge) {
			return err
		}
		return badRequest("the body can't be read")
	}
	if len(strings.TrimSpace(string(b))) == 0 {
		return nil
	}
	if !utf8.Valid(b) {
		return badRequest("the body is not UTF-8")
	}
	if err := json.Unmarshal(b, into); err != nil {
		return badRequest("the body is not the JSON that is expected: " + err.Error())
	}
	return nil
}

// seconds is a timeout of a request; absent is what one that says nothing gets.
func seconds(n *int64, absent time.Duration) (time.Duration, error) {
	if n == nil {
		return absent, nil
	}
	if *n < 0 || *n > maxTimeout {
		return 0, badRequest("a timeout is from 0 to 2592000 seconds")
	}
	return time.Duration(*n) * time.Second, nil
}

// parseMetadata reads the metadata of a list's query: pairs as in a query, whose keys and values have been escaped once more. url.Values has
// undone the outermost escape.
func parseMetadata(text string) (map[string]string, error) {
	if text == "" {
		return nil, nil
	}
	pairs, err := url.ParseQuery(text)
	if err != nil {
		return nil, badRequest("metadata is not a list of pairs")
	}
	found := make(map[string]string, len(pairs))
	for _, k := range slices.Collect(maps.Keys(pairs)) {
		key, err := url.PathUnescape(k)
		if err != nil {
			return nil, badRequest("metadata has a key that is not escaped")
		}
		if found[key], err = url.PathUnescape(pairs.Get(k)); err != nil {
			return nil, badRequest("metadata has a value that is not escaped")
		}
	}
	return found, nil
}
