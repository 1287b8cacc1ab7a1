//go:build linux && amd64

package server_test

import (
	"net/http"
	"slices"
	"strconv"
	"testing"

	"github.com/cryovisor/cryovisor/internal/testvm"
	"github.com/cryovisor/cryovisor/lifecycle"
	"github.com/cryovisor/cryovisor/vmm"
)

// line is one of a guest's, as it is described.
type line struct {
	Message string
	Fields  struct{ Cursor string }
}

func (f *fixture) lines(id, query string) []line {
	f.t.Helper()
	var said struct{ Logs []line }
	f.want(f.do("GET", "/v2/sandboxes/"+id+"/logs?"+query, ""), http.StatusOK).decode(f.t, &said)
	return said.Logs
}

// TestLogs reads what a guest says, in parts, and through a pause.
func TestLogs(t *testing.T) {
	f := newFixture(t, nil)
	guest, err := testvm.Beacon(testvm.BeaconConfig{Memory: 4 << 20, Period: 1e6, Every: 1})
	f.must(err)
	_, err = f.manager.CreateTemplate(t.Context(), lifecycle.TemplateConfig{
		Name: "beacon", VM: vmm.Config{MemoryBytes: 4 << 20, Boot: guest.Program()},
	})
	f.must(err)
	id := f.create(`{"templateID":"beacon","timeout":3600}`)
	for len(f.lines(id, "")) < 10 {
		if f.get(id).State != "running" {
			t.Fatal("it has ended")
		}
	}
	f.want(f.do("POST", "/sandboxes/"+id+"/pause", ""), http.StatusNoContent)
	all := f.lines(id, "")
	if all[0].Message != "ready" || len(all) < 10 {
		t.Fatalf("%+v", all)
	}
	var parts []line
	for cursor := "0"; ; {
		part := f.lines(id, "limit=4&cursor="+cursor)
		if len(part) == 0 {
			break
		}
		if len(part) > 4 || len(parts) > len(all) {
			t.Fatalf("%d lines of at most 4, after %d of %d", len(part), len(parts), len(all))
		}
		parts = append(parts, part...)
		cursor = part[len(part)-1].Fields.Cursor
	}
	if !slices.Equal(parts, all) {
		t.Errorf("in parts: %+v; all: %+v", parts, all)
	}
	f.want(f.do("POST", "/sandboxes/"+id+"/connect", `{"timeout":3600}`), http.StatusCreated)
	last := all[len(all)-2] // the one after it may have been cut by the pause
	next := f.lines(id, "cursor="+last.Fields.Cursor)
	for len(next) < 2 {
		next = f.lines(id, "cursor="+last.Fields.Cursor)
	}
	ticks := func(l line) int {
		n, err := strconv.Atoi(l.Message[:max(0, len(l.Message)-len(" ticks"))])
		f.must(err)
		return n
	}
	if ticks(next[0]) <= ticks(last) {
		t.Errorf("after the pause it goes on with %+v, from %+v", next, last)
	}
}
