//go:build linux && amd64

package main

import (
	"encoding/json"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
)

const greeting = `{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "Debian"}, "capabilities": ["oob"]}}`

// exchange is a command that a fake QEMU expects, and all that it then sends.
type exchange struct{ command, answer string }

// dialFake connects to a fake QEMU, which checks what it is told and hangs up at the end.
func dialFake(t *testing.T, script ...exchange) *qmpClient {
	t.Helper()
	here, there := net.Pipe()
	done := make(chan struct{})
	t.Cleanup(func() {
		here.Close()
		<-done
	})
	go func() {
		defer close(done)
		defer there.Close()
		if _, err := io.WriteString(there, greeting); err != nil {
			t.Error(err)
		}
		in := json.NewDecoder(there)
		for _, e := range append([]exchange{{`{"execute":"qmp_capabilities"}`, `{"return": {}}`}}, script...) {
			var got json.RawMessage
			if err := in.Decode(&got); err != nil {
				t.Error(err)
				return
			}
			if string(got) != e.command {
				t.Errorf("QEMU was told %s, want %s", got, e.command)
			}
			if _, err := io.WriteString(there, e.answer); err != nil {
				t.Error(err)
			}
		}
	}()
	c, version, err := newQMPClient(here)
	if err != nil {
		t.Fatal(err)
	}
	if version != "7.2.22" {
		t.Errorf("the version is %q", version)
	}
	return c
}

const (
	migrate = `{"arguments":{"uri":"unix:x"},"execute":"migrate"}`
	setup   = `{"event": "MIGRATION", "data": {"status": "setup"}}`
	active  = `{"event": "MIGRATION", "data": {"status": "active"}}`
)

// TestMigration has events before and after the answer, as they come from QEMU.
func TestMigration(t *testing.T) {
	c := dialFake(t, exchange{migrate, setup + `{"return": {}}` + "\r\n" + `{"event": "STOP"}` + active +
		`{"event": "MIGRATION", "data": {"status": "completed"}}`})
	if err := c.begin("migrate", "unix:x"); err != nil {
		t.Fatal(err)
	}
	if err := c.await(); err != nil {
		t.Fatal(err)
	}
}

func TestMigrationFails(t *testing.T) {
	c := dialFake(t,
		exchange{migrate, `{"return": {}}` + active + `{"event": "MIGRATION", "data": {"status": "failed"}}`},
		exchange{`{"execute":"query-migrate"}`, `{"return": {"error-desc": "no room"}}`})
	if err := c.begin("migrate", "unix:x"); err != nil {
		t.Fatal(err)
	}
	if err := c.await(); !errors.Is(err, errMigration) || !strings.Contains(err.Error(), "no room") {
		t.Errorf("got %v, want %v and why", err, errMigration)
	}
}

func TestQEMURefuses(t *testing.T) {
	c := dialFake(t,
		exchange{migrate, `{"error": {"class": "GenericError", "desc": "not now"}}`},
		exchange{`{"arguments":{"command-line":"savevm x"},"execute":"human-monitor-command"}`, `{"return": "Error: no drive\r\n"}`},
		exchange{`{"arguments":{"command-line":"savevm x"},"execute":"human-monitor-command"}`, `{"return": ""}`})
	var refused *commandError
	if err := c.begin("migrate", "unix:x"); !errors.As(err, &refused) || refused.Desc != "not now" {
		t.Errorf("got %v, want a commandError", err)
	}
	if err := c.human("savevm x"); !errors.As(err, &refused) || refused.Desc != "Error: no drive" {
		t.Errorf("got %v, want a commandError", err)
	}
	if err := c.human("savevm x"); err != nil {
		t.Error(err)
	}
}

// TestQEMUEnds: whoever waits is told when the process has gone.
func TestQEMUEnds(t *testing.T) {
	c := dialFake(t, exchange{migrate, `{"return": {}}` + active})
	if err := c.begin("migrate", "unix:x"); err != nil {
		t.Fatal(err)
	}
	if err := c.await(); !errors.Is(err, io.EOF) {
		t.Errorf("got %v, want %v", err, io.EOF)
	}
}
