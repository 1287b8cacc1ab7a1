package server_test

import (
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/cryovisor/cryovisor/server"
)

// FuzzMetadata reads what a list's query says of metadata; what was encoded as SDKs do is found again.
func FuzzMetadata(f *testing.F) {
	for _, s := range []string{"", "a=b", "a%3Db=c&d=e", "%zz", "a=%2525", "=&=", "a;b"} {
		f.Add(s, s)
	}
	f.Fuzz(func(t *testing.T, k, v string) {
		_, _ = server.ParseMetadata(k)
		pairs := url.Values{url.PathEscape(k): {url.PathEscape(v)}}
		found, err := server.ParseMetadata(pairs.Encode())
		if err != nil || len(found) != 1 || found[k] != v {
			t.Errorf("%q=%q is %v, %v", k, v, found, err)
		}
	})
}

// FuzzCreate reads the bodies of creates: they are bad requests, or options within the server's bounds.
func FuzzCreate(f *testing.F) {
	for _, s := range []string{
		"", " ", "null", "{}", "[]", `{"timeout":0}`, `{"timeout":1e3}`, `{"timeout":2592000,"autoPause":true}`, `{"timeout":9223372036854775807}`,
		`{"templateID":"\ud800","metadata":{"a":null,"":"\u0000"},"autoResume":{"enabled":true}}`, `{"TIMEOUT":5,"timeout":6}`, `{"autoPauseMemory":false}`,
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, body string) {
		opts, status := server.CreateOptions(strings.NewReader(body))
		if status != 0 {
			if status != http.StatusBadRequest {
				t.Errorf("%q is answered with %d", body, status)
			}
			return
		}
		if opts.Timeout <= 0 || opts.Timeout > 30*24*time.Hour || opts.Owner != "" || !utf8.ValidString(opts.Template) {
			t.Errorf("%q is %+v", body, opts)
		}
	})
}

// FuzzSnapshotToken reads tokens of the list of snapshots: any is of a place, whose token is for the same; or it is refused.
func FuzzSnapshotToken(f *testing.F) {
	for _, s := range []string{"", "-", "1-a", "1700000000000000000-0123456789abcdefghij", "-1-a", "+1-a", "01-a"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		token, status := server.SnapshotToken(s)
		if status == http.StatusBadRequest && token == "" {
			return
		}
		if again, status := server.SnapshotToken(token); status != 0 || again != token {
			t.Errorf("%q is %q, and that is %q, %d", s, token, again, status)
		}
	})
}
