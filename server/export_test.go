package server

import "strings"

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

// WriteError answers with an error.
var WriteError = writeError
