package main

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// buildDatabase compiles the program that the job runs.
func buildDatabase(t *testing.T) string {
	t.Helper()
	program := filepath.Join(t.TempDir(), "guestdb")
	if out, err := exec.CommandContext(t.Context(), "go", "build", "-o", program, "../guestdb").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return program
}

// TestDatabase runs the load on a directory.
func TestDatabase(t *testing.T) {
	program, root := buildDatabase(t), t.TempDir()
	done := 0
	d, err := startDatabase(program, root, func() error { done++; return nil })
	if err != nil {
		t.Fatal(err)
	}
	const steps = 101
	for n := range uint64(steps) {
		if detail, err := d.step(n); err != nil || !strings.HasPrefix(detail, journals[n%2]+" rows=") {
			t.Fatalf("step %d: %q, %v", n, detail, err)
		}
	}
	if err := d.finish(); err != nil || done != 1 {
		t.Errorf("finish: %v; the disk was released %d times", err, done)
	}
	if n, err := checkDatabases(program, root); err != nil || n != steps {
		t.Errorf("%d steps, want %d; %v", n, steps, err)
	}
	if _, err := startDatabase(program, root, func() error { done++; return nil }); err == nil || done != 2 {
		t.Errorf("a second load: %v; the disk was released %d times", err, done)
	}
	if err := os.Truncate(databasePath(root, "delete"), 4096); err != nil {
		t.Fatal(err)
	}
	if n, err := checkDatabases(program, root); err == nil || !strings.Contains(err.Error(), "delete.db") {
		t.Errorf("a short database: %d, %v", n, err)
	}
}

// TestDatabaseProgramFails: what a program says of its failure is told, once, whenever it fails.
func TestDatabaseProgramFails(t *testing.T) {
	released := errors.New("released")
	for name, script := range map[string]string{
		"at the start": "echo reason >&2; exit 3",
		"in a step":    "echo ready; read n; echo reason >&2; exit 3",
		"at once":      "echo ready; exec >&-; echo reason >&2; exit 3",
		"at the end":   "echo ready; read n; echo 0 detail; cat; echo reason >&2; exit 3",
		"wrong count":  "echo ready; read n; echo 0 detail; cat; echo steps=5; echo reason >&2; exit 3",
		"late":         "echo ready; read n; echo 0 detail; cat; echo steps=1; echo reason >&2; exit 3",
	} {
		t.Run(name, func(t *testing.T) {
			program := filepath.Join(t.TempDir(), "program")
			if err := os.WriteFile(program, []byte("#!/bin/sh\n"+script+"\n"), 0o755); err != nil {
				t.Fatal(err)
			}
			d, err := startDatabase(program, t.TempDir(), func() error { return released })
			if err == nil {
				_, err = d.step(0)
				err = errors.Join(err, d.finish())
			}
			if err == nil || !errors.Is(err, released) || !strings.Contains(err.Error(), "exit status 3: reason") {
				t.Errorf("the error is %v", err)
			}
		})
	}
}
