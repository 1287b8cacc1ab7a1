// Package catalog keeps the records of sandboxes and templates in an SQLite database. It knows columns, and no meaning: package lifecycle
// has that.
//
// What a method has written when it returns is on stable storage. Its methods may be called from any number of goroutines.
package catalog

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"time"

	_ "modernc.org/sqlite" // the driver
)

// version is the schema's, in SQLite's user_version.
const version = 1

// ErrVersion says that a newer program has made the catalog.
var ErrVersion = errors.New("the catalog is of a newer version")

// Sandbox is the record of a sandbox. Times are UTC, and zero is none.
type Sandbox struct {
	ID, Template, Owner string
	Running             bool
	Snapshot            string // of its last pause; empty if there was none
	Created, Started    time.Time
	Paused              time.Time // since when it is
	Timeout             time.Duration
	IdleTimeout         time.Duration
	OnTimeout           string
	AutoResume          bool
	Metadata            map[string]string
	VCPUs               int
	MemoryBytes         uint64
	DiskBytes           uint64
	StoredBytes         uint64
	Pauses              int
	LastError           string
}

// Template is the record of a template or a checkpoint.
type Template struct {
	ID, Name, Owner string
	Source          string
	Snapshot        string
	Created         time.Time
	VCPUs           int
	MemoryBytes     uint64
	DiskBytes       uint64
	StoredBytes     uint64
	Labels          map[string]string
	WorkingSet      []byte
}

// Catalog is an open database.
type Catalog struct {
	db   *sql.DB
	path string
}

// schema makes the tables. secrets has the sealed key of each sandbox and template, apart from the rest, so that it can be deleted and
// sealed anew alone. STRICT has SQLite refuse values of another type.
const schema = `
CREATE TABLE sandboxes (
	id TEXT PRIMARY KEY, template TEXT NOT NULL, owner TEXT NOT NULL, running INTEGER NOT NULL, snapshot TEXT NOT NULL,
	created INTEGER NOT NULL, started INTEGER NOT NULL, paused INTEGER NOT NULL,
	timeout INTEGER NOT NULL, idle_timeout INTEGER NOT NULL, on_timeout TEXT NOT NULL, auto_resume INTEGER NOT NULL, metadata TEXT NOT NULL,
	vcpus INTEGER NOT NULL, memory_bytes INTEGER NOT NULL, disk_bytes INTEGER NOT NULL, stored_bytes INTEGER NOT NULL,
	pauses INTEGER NOT NULL, last_error TEXT NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE templates (
	id TEXT PRIMARY KEY, name TEXT NOT NULL, owner TEXT NOT NULL, source TEXT NOT NULL, snapshot TEXT NOT NULL, created INTEGER NOT NULL,
	vcpus INTEGER NOT NULL, memory_bytes INTEGER NOT NULL, disk_bytes INTEGER NOT NULL, stored_bytes INTEGER NOT NULL,
	labels TEXT NOT NULL, working_set BLOB
) STRICT, WITHOUT ROWID;
CREATE TABLE secrets (id TEXT PRIMARY KEY, sealed BLOB NOT NULL) STRICT, WITHOUT ROWID;
`

// Open opens the database at path, which is made, readable by its user only, if it is missing.
func Open(path string) (*Catalog, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600) // SQLite would make it readable by others
	if err == nil {
		err = f.Close()
	}
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("catalog: %w", err)
	}
	c, err := open(path)
	if err != nil {
		return nil, fmt.Errorf("catalog %s: %w", path, err)
	}
	return c, nil
}

func open(path string) (*Catalog, error) {
	// secure_delete overwrites what is deleted: sealed keys, above all.
	dsn := url.URL{Scheme: "file", Opaque: (&url.URL{Path: path}).EscapedPath(), RawQuery: url.Values{"_pragma": {
		"busy_timeout(10000)", "journal_mode(WAL)", "synchronous(FULL)", "secure_delete(ON)",
	}, "_txlock": {"immediate"}}.Encode()}
	db, err := sql.Open("sqlite", dsn.String())
	if err != nil {
		return nil, err
	}
	db.SetMaxOpenConns(1) // so writers wait here, not in SQLite
	c := &Catalog{db, path}
	if err := c.prepare(); err != nil {
		return nil, errors.Join(err, db.Close())
	}
	return c, nil
}

// prepare makes the tables of a new database.
func (c *Catalog) prepare() error {
	tx, err := c.db.Begin()
	if err != nil {
		return err
	}
	defer tx.Rollback() //nolint:errcheck // after a Commit it has nothing to say
	var found int
	if err := tx.QueryRow("PRAGMA user_version").Scan(&found); err != nil {
		return err
	}
	switch {
	case found > version:
		return fmt.Errorf("%w, %d; this program knows %d: use the newer program", ErrVersion, found, version)
	case found == version:
		return nil
	}
	if _, err := tx.Exec(schema + fmt.Sprintf("PRAGMA user_version = %d", version)); err != nil {
		return err
	}
	return tx.Commit()
}

// Files are the files of a catalog, which are there as long as it is open: a process that has them needs nothing else in their directory.
func (c *Catalog) Files() []string { return []string{c.path, c.path + "-wal", c.path + "-shm"} }

// Close closes the database.
func (c *Catalog) Close() error { return c.db.Close() }

// Check has SQLite look for damage, and says what it found.
func (c *Catalog) Check(ctx context.Context) error {
	var said string
	if err := c.db.QueryRowContext(ctx, "PRAGMA integrity_check(20)").Scan(&said); err != nil {
		return err
	}
	if said != "ok" {
		return fmt.Errorf("catalog: %s", said)
	}
	return nil
}

// Forget makes what was deleted unreadable in the write-ahead log too.
func (c *Catalog) Forget(ctx context.Context) error {
	_, err := c.db.ExecContext(ctx, "PRAGMA wal_checkpoint(TRUNCATE)")
	return err
}

// transact executes do as one change.
func (c *Catalog) transact(ctx context.Context, do func(tx *sql.Tx) error) error {
	tx, err := c.db.BeginTx(ctx, nil)
	if err != nil {
		return fmt.Errorf("catalog: %w", err)
	}
	if err := do(tx); err != nil {
		return errors.Join(fmt.Errorf("catalog: %w", err), tx.Rollback())
	}
	if err := tx.Commit(); err != nil {
		return fmt.Errorf("catalog: %w", err)
	}
	return nil
}

func nanos(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixNano()
}

func fromNanos(n int64) time.Time {
	if n == 0 {
		return time.Time{}
	}
	return time.Unix(0, n).UTC()
}

// pairs is a map in a column.
func pairs(m map[string]string) string {
	if len(m) == 0 {
		return "{}"
	}
	b, _ := json.Marshal(m) // of strings: it can't fail
	return string(b)
}

func fromPairs(s string) (map[string]string, error) {
	var m map[string]string
	if s == "{}" {
		return nil, nil
	}
	err := json.Unmarshal([]byte(s), &m)
	return m, err
}
