package server

import (
	"io"
	"net/http"
	"strings"
	"time"

	"github.com/cryovisor/cryovisor/lifecycle"
)

// Routes are all methods and paths.
func Routes() []string {
	var all []string
	for _, r := range new(Server).routes() {
		all = append(all, r.method+" "+strings.TrimSuffix(r.pattern, "{$}"))
	}
	return all
}

// ParseMetadata is what reads a list's metadata.
var ParseMetadata = parseMetadata

// AddRoute has a server answer one more path.
func AddRoute(s *Server, pattern string, answer http.HandlerFunc) { s.mux.HandleFunc(pattern, answer) }

// CreateOptions are what the body of a create of the second generation says, and the status of its answer if that is none.
func CreateOptions(r io.Reader) (opts lifecycle.CreateOptions, status int) {
	opts, err := createOptions(r, 300*time.Second)
	if err != nil {
		status = statusOf(err)
	}
	return opts, status
}

// SnapshotToken returns the token of the place that a token is for; or the status of the answer, if that is none.
func SnapshotToken(token string) (again string, status int) {
	p, err := parsePlace(token)
	if err != nil {
		return "", statusOf(err)
	}
	return p.token(), 0
}

// WriteError answers with an error.
var WriteError = writeError
