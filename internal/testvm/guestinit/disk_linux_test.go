package main

import (
	"os"
	"strings"
	"testing"
)

// TestDisk runs the load on a directory.
func TestDisk(t *testing.T) {
	d := &disk{root: t.TempDir(), done: func() error { return nil }}
	did := map[string]bool{}
	for n := range uint64(400) {
		detail, err := d.step(n)
		if err != nil {
			t.Fatalf("step %d: %v", n, err)
		}
		what, _, _ := strings.Cut(detail, " ")
		did[what] = true
	}
	if len(did) != 5 {
		t.Errorf("it did only %v", did)
	}
	if err := d.finish(); err != nil {
		t.Fatal(err)
	}
}

// TestDiskSeesDamage damages what the load wrote, in each way once.
func TestDiskSeesDamage(t *testing.T) {
	for name, damage := range map[string]func(path string) error{
		"changed": func(path string) error {
			b, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			b[len(b)-1] ^= 1
			return os.WriteFile(path, b, 0o644)
		},
		"short":   func(path string) error { return os.Truncate(path, recordSize-1) },
		"removed": os.Remove,
		"added":   func(path string) error { return os.WriteFile(path+".more", nil, 0o644) },
	} {
		t.Run(name, func(t *testing.T) {
			d := &disk{root: t.TempDir(), done: func() error { return nil }}
			for n := range uint64(40) {
				if _, err := d.step(n); err != nil {
					t.Fatal(err)
				}
			}
			if err := damage(d.files[2].path(d.root)); err != nil {
				t.Fatal(err)
			}
			if d.finish() == nil {
				t.Error("it is not seen")
			}
		})
	}
}
