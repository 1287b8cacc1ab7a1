package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

var journals = []string{"wal", "delete"}

// makeDatabase makes a database and takes some steps. It is left open, as a crash would leave it, until the test ends.
func makeDatabase(t *testing.T, journal string, steps int) *database {
	t.Helper()
	d, err := create(t.Context(), filepath.Join(t.TempDir(), "db"), journal)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.close(); err != nil {
			t.Error(err)
		}
	})
	for i := range steps {
		if _, err := d.step(t.Context()); err != nil {
			t.Fatalf("step %d: %v", i, err)
		}
	}
	return d
}

// checkCopy checks a copy of a database's files.
func checkCopy(t *testing.T, path string, damage func(path string) error) (string, error) {
	t.Helper()
	dir := t.TempDir()
	if err := os.CopyFS(dir, os.DirFS(filepath.Dir(path))); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, filepath.Base(path))
	if err := damage(file); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	err := run(t.Context(), []string{"check", file}, nil, &out)
	return strings.TrimSpace(out.String()), err
}

func noDamage(string) error { return nil }

// TestLoad speaks to the load as the guest does, and checks what it leaves.
func TestLoad(t *testing.T) {
	const steps = 100
	for _, journal := range journals {
		t.Run(journal, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "db")
			var in strings.Builder
			want := []string{"ready"}
			for n := range steps {
				fmt.Fprintln(&in, n)
				want = append(want, strconv.Itoa(n))
			}
			want = append(want, "steps=100")
			var out bytes.Buffer
			if err := run(t.Context(), []string{"load", "--journal", journal, path}, strings.NewReader(in.String()), &out); err != nil {
				t.Fatal(err)
			}
			lines := strings.Split(strings.TrimSpace(out.String()), "\n")
			if len(lines) != len(want) {
				t.Fatalf("%d lines, want %d:\n%s", len(lines), len(want), out.String())
			}
			for i, line := range lines {
				if first, _, _ := strings.Cut(line, " "); first != want[i] {
					t.Errorf("line %q, want %q", line, want[i])
				}
			}
			for _, detail := range []string{" removed=8", " updated=3", " checked"} {
				if !strings.Contains(out.String(), detail) {
					t.Errorf("no step says%s", detail)
				}
			}
			if got, err := checkCopy(t, path, noDamage); err != nil || got != "steps=100" {
				t.Errorf("check: %q, %v", got, err)
			}
		})
	}
}

// TestCheckAfterCrash checks what is on disk while a database is open, as it would be after a crash.
func TestCheckAfterCrash(t *testing.T) {
	for _, journal := range journals {
		t.Run(journal, func(t *testing.T) {
			d := makeDatabase(t, journal, 77)
			if got, err := checkCopy(t, d.path, noDamage); err != nil || got != "steps=77" {
				t.Errorf("between two steps: %q, %v", got, err)
			}
			tx, err := d.db.BeginTx(t.Context(), nil)
			if err != nil {
				t.Fatal(err)
			}
			if err := apply(t.Context(), tx, 77, d.model.next()); err != nil {
				t.Fatal(err)
			}
			// More than the cache holds, so that some of it is in the files.
			if _, err := tx.ExecContext(t.Context(), "UPDATE item SET body = zeroblob(length(body))"); err != nil {
				t.Fatal(err)
			}
			if got, err := checkCopy(t, d.path, noDamage); err != nil || got != "steps=77" {
				t.Errorf("in a step: %q, %v", got, err)
			}
			if journal == "delete" {
				torn := func(path string) error { return os.Remove(path + "-journal") }
				if got, err := checkCopy(t, d.path, torn); err == nil {
					t.Errorf("in a step, without the journal: %q", got)
				}
			}
			if err := tx.Rollback(); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// TestCheckSeesDamage damages a database by SQL, which leaves it sound for SQLite, and its file.
func TestCheckSeesDamage(t *testing.T) {
	damages := map[string]func(path string) error{
		"absent": os.Remove,
		"empty":  func(path string) error { return os.Truncate(path, 0) },
		"short": func(path string) error {
			info, err := os.Stat(path)
			return errors.Join(err, os.Truncate(path, info.Size()/2))
		},
		"a page": func(path string) error {
			f, err := os.OpenFile(path, os.O_WRONLY, 0)
			if err != nil {
				return err
			}
			_, err = f.WriteAt(bytes.Repeat([]byte{0xa5}, 4096), 5*4096)
			return errors.Join(err, f.Close())
		},
	}
	for name, query := range map[string]string{
		"steps":   "UPDATE meta SET steps = steps - 1",
		"no meta": "DELETE FROM meta",
		"body":    "UPDATE item SET body = x'00' WHERE id = (SELECT max(id) FROM item)",
		"owner":   "UPDATE item SET owner = owner + 1 WHERE id = (SELECT min(id) FROM item)",
		"removed": "DELETE FROM item WHERE id = (SELECT max(id) FROM item)",
		"added":   "INSERT INTO item SELECT max(id) + 1, 0, 0, x'' FROM item",
		"index":   "DROP INDEX item_owner",
	} {
		damages[name] = func(path string) (err error) {
			d, err := open(t.Context(), path, "rw")
			if err != nil {
				return err
			}
			_, err = d.db.ExecContext(t.Context(), query)
			return errors.Join(err, d.close())
		}
	}
	d := makeDatabase(t, "delete", 60)
	for name, damage := range damages {
		t.Run(name, func(t *testing.T) {
			if got, err := checkCopy(t, d.path, damage); err == nil || got != "" {
				t.Errorf("check: %q, %v", got, err)
			}
		})
	}
}

// TestLoadSeesDamage changes a database behind the back of its load.
func TestLoadSeesDamage(t *testing.T) {
	d := makeDatabase(t, "wal", 10)
	if _, err := d.db.ExecContext(t.Context(), "UPDATE item SET body = x'00' WHERE id = (SELECT max(id) FROM item)"); err != nil {
		t.Fatal(err)
	}
	if err := d.compare(t.Context()); err == nil {
		t.Error("it is not seen")
	}
}

func TestRunRefuses(t *testing.T) {
	path := filepath.Join(t.TempDir(), "db")
	for _, args := range [][]string{
		nil,
		{"other", path},
		{"load"},
		{"check"},
		{"check", path, path},
		{"load", "--journal", "off", path},
		{"load", "--other", path},
	} {
		if err := run(t.Context(), args, strings.NewReader(""), io.Discard); !errors.Is(err, errUsage) {
			t.Errorf("%q: %v", args, err)
		}
	}
	for _, in := range []string{"1\n", "0\n0\n", "x\n"} {
		file := filepath.Join(t.TempDir(), "db")
		if err := run(t.Context(), []string{"load", file}, strings.NewReader(in), io.Discard); err == nil {
			t.Errorf("steps %q are taken", in)
		}
	}
}
