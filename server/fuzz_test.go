package server_test

import (
	"net/url"
	"testing"

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
