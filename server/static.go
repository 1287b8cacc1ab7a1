package server

import (
	"bytes"
	_ "embed"
	"net/http"
	"time"
)

//go:embed openapi.json
var openAPI []byte

//go:embed page/index.html
var pageHTML []byte

//go:embed page/page.js
var pageScript []byte

//go:embed page/page.css
var pageStyle []byte

func (s *Server) description(w http.ResponseWriter, r *request) error {
	serveStatic(w, r, "application/json", openAPI)
	return nil
}

// page serves the page for people. Its script asks for an API key, and is one more client: the page itself holds nothing of anybody's.
func (s *Server) page(w http.ResponseWriter, r *request) error {
	w.Header().Set("Content-Security-Policy",
		"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
	w.Header().Set("Referrer-Policy", "no-referrer")
	switch r.URL.Path {
	case "/page.js":
		serveStatic(w, r, "text/javascript; charset=utf-8", pageScript)
	case "/page.css":
		serveStatic(w, r, "text/css; charset=utf-8", pageStyle)
	default:
		serveStatic(w, r, "text/html; charset=utf-8", pageHTML)
	}
	return nil
}

func serveStatic(w http.ResponseWriter, r *request, kind string, contents []byte) {
	w.Header().Set("Content-Type", kind)
	w.Header().Set("Cache-Control", "no-cache")
	http.ServeContent(w, r.Request, "", time.Time{}, bytes.NewReader(contents))
}
