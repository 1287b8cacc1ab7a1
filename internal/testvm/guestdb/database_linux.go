package main

import (
	"bytes"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"maps"
	"net/url"
	"path/filepath"
	"strings"

	_ "modernc.org/sqlite" // the driver "sqlite"
)

const (
	checkEvery = 4 // steps, after which everything is read back
	undoEvery  = 5 // steps, after which changes are made and taken back
)

// checkpointPages is the size of the write-ahead log, in pages, at which it goes into the database: often, as it is part
// of the load.
const checkpointPages = 40

// schema makes the tables; item is the content, meta has the number of steps that it is after.
const schema = `
CREATE TABLE meta (id INTEGER PRIMARY KEY CHECK (id = 1), steps INTEGER NOT NULL);
CREATE TABLE item (id INTEGER PRIMARY KEY, owner INTEGER NOT NULL, step INTEGER NOT NULL, body BLOB NOT NULL);
CREATE INDEX item_owner ON item (owner, step);
INSERT INTO meta VALUES (1, 0);`

// spillPages is the size of SQLite's cache, in pages: less than undo changes, so that some of that is written and
// read back from the journal.
const spillPages = 16

// fullSync is what SQLite calls synchronous=FULL.
const fullSync = 2

// database is an open database, and what must be in it. It is for one goroutine.
type database struct {
	db    *sql.DB
	path  string
	model model
}

// open opens a database file. The mode is SQLite's: "rw" demands that the file is there, "rwc" makes it.
func open(ctx context.Context, path, mode string) (*database, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return nil, err
	}
	query := url.Values{"mode": {mode}, "_pragma": {
		"synchronous(FULL)", fmt.Sprintf("wal_autocheckpoint(%d)", checkpointPages), fmt.Sprintf("cache_size(%d)", spillPages),
	}}
	name := url.URL{Scheme: "file", Path: path, RawQuery: query.Encode()}
	db, err := sql.Open("sqlite", name.String())
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	db.SetMaxOpenConns(1) // the pragmas are its own
	d := &database{db: db, path: path}
	if err := db.PingContext(ctx); err != nil {
		return nil, d.failed("open", errors.Join(err, db.Close()))
	}
	return d, nil
}

// create makes a database with a journal of a kind ("wal" or "delete"), in which no step has been taken.
func create(ctx context.Context, path, journal string) (*database, error) {
	d, err := open(ctx, path, "rwc")
	if err != nil {
		return nil, err
	}
	if err := d.setUp(ctx, journal); err != nil {
		return nil, errors.Join(err, d.close())
	}
	return d, nil
}

func (d *database) setUp(ctx context.Context, journal string) error {
	var got string
	if err := d.db.QueryRowContext(ctx, "PRAGMA journal_mode = "+journal).Scan(&got); err != nil {
		return d.failed("journal_mode", err)
	}
	var sync int
	if err := d.db.QueryRowContext(ctx, "PRAGMA synchronous").Scan(&sync); err != nil {
		return d.failed("synchronous", err)
	}
	if got != journal || sync != fullSync {
		return fmt.Errorf("%s: journal_mode is %s, want %s; synchronous is %d, want %d", d.path, got, journal, sync, fullSync)
	}
	return d.transact(ctx, func(tx *sql.Tx) error {
		_, err := tx.ExecContext(ctx, schema)
		return err
	})
}

func (d *database) close() error { return d.failed("close", d.db.Close()) }

// failed says which file an error is of.
func (d *database) failed(what string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %s: %w", d.path, what, err)
}

// transact commits what do does, or takes it back if it fails.
func (d *database) transact(ctx context.Context, do func(tx *sql.Tx) error) error {
	tx, err := d.db.BeginTx(ctx, nil)
	if err != nil {
		return d.failed("begin", err)
	}
	if err := do(tx); err != nil {
		return d.failed("transaction", errors.Join(err, tx.Rollback()))
	}
	return d.failed("commit", tx.Commit())
}

// step takes a step in one transaction, and says what it did. After an error the model is ahead of the database.
func (d *database) step(ctx context.Context) (string, error) {
	n := d.model.steps
	if n%undoEvery == undoEvery-1 {
		if err := d.undo(ctx); err != nil {
			return "", err
		}
	}
	c := d.model.next()
	if err := d.transact(ctx, func(tx *sql.Tx) error { return apply(ctx, tx, n, c) }); err != nil {
		return "", err
	}
	detail := fmt.Sprintf("rows=%d updated=%d removed=%d", len(d.model.rows), len(c.update), len(c.remove))
	if n%checkEvery != checkEvery-1 {
		return detail, nil
	}
	return detail + " checked", d.compare(ctx)
}

// apply is the transaction of step n.
func apply(ctx context.Context, tx *sql.Tx, n uint64, c change) error {
	var err error
	var changed int64
	exec := func(query string, args ...any) {
		if err != nil {
			return
		}
		var r sql.Result
		if r, err = tx.ExecContext(ctx, query, args...); err != nil {
			return
		}
		var rows int64
		rows, err = r.RowsAffected()
		changed += rows
	}
	for _, r := range c.update {
		exec("UPDATE item SET owner = ?, step = ?, body = ? WHERE id = ?", r.owner, r.step, r.body(), r.id)
	}
	for _, r := range c.remove {
		exec("DELETE FROM item WHERE id = ?", r.id)
	}
	for _, r := range c.insert {
		exec("INSERT INTO item (id, owner, step, body) VALUES (?, ?, ?, ?)", r.id, r.owner, r.step, r.body())
	}
	exec("UPDATE meta SET steps = ? WHERE steps = ?", n+1, n)
	if want := int64(len(c.update) + len(c.remove) + len(c.insert) + 1); err == nil && changed != want {
		err = fmt.Errorf("step %d: %d rows changed, want %d", n, changed, want)
	}
	return err
}

// undo changes every row, and takes it back.
func (d *database) undo(ctx context.Context) error {
	tx, err := d.db.BeginTx(ctx, nil)
	if err != nil {
		return d.failed("begin", err)
	}
	_, err = tx.ExecContext(ctx, "UPDATE item SET owner = owner + 1, body = zeroblob(length(body)); UPDATE meta SET steps = steps + 1")
	return d.failed("undo", errors.Join(err, tx.Rollback()))
}

// verify checks a database as it is on disk, by itself and against the steps that it says it is after.
func (d *database) verify(ctx context.Context) error {
	if err := d.integrity(ctx); err != nil {
		return err
	}
	steps, err := d.steps(ctx)
	if err != nil {
		return err
	}
	d.model = replay(steps)
	return d.compare(ctx)
}

// integrity has SQLite check the database's structure.
func (d *database) integrity(ctx context.Context) error {
	var answers []string
	err := d.each(ctx, "PRAGMA integrity_check(10)", func(rows *sql.Rows) error {
		var s string
		err := rows.Scan(&s)
		answers = append(answers, s)
		return err
	})
	if all := strings.Join(answers, "; "); err == nil && all != "ok" {
		err = fmt.Errorf("integrity_check says %q", all)
	}
	return d.failed("integrity_check", err)
}

// steps is how many steps the database says it is after.
func (d *database) steps(ctx context.Context) (n uint64, err error) {
	return n, d.failed("meta", d.db.QueryRowContext(ctx, "SELECT steps FROM meta").Scan(&n))
}

// compare compares all of the database's content with the model.
func (d *database) compare(ctx context.Context) error {
	steps, err := d.steps(ctx)
	if err != nil {
		return err
	}
	if steps != d.model.steps {
		return fmt.Errorf("%s is after %d steps, want %d", d.path, steps, d.model.steps)
	}
	return errors.Join(d.failed("item", d.compareRows(ctx)), d.failed("item_owner", d.compareIndex(ctx)))
}

func (d *database) compareRows(ctx context.Context) error {
	want := d.model.rows
	i := 0
	err := d.each(ctx, "SELECT id, owner, step, body FROM item ORDER BY id", func(rows *sql.Rows) error {
		var r row
		var body sql.RawBytes
		if err := rows.Scan(&r.id, &r.owner, &r.step, &body); err != nil {
			return err
		}
		if i >= len(want) || r != want[i] || !bytes.Equal(body, r.body()) {
			return fmt.Errorf("row %d, %+v with %d bytes, is not what %d steps make", i, r, len(body), d.model.steps)
		}
		i++
		return nil
	})
	if err == nil && i != len(want) {
		err = fmt.Errorf("%d rows, want %d", i, len(want))
	}
	return err
}

// compareIndex reads the index alone.
func (d *database) compareIndex(ctx context.Context) error {
	got := map[uint64]group{}
	const query = "SELECT owner, count(*), sum(step) FROM item INDEXED BY item_owner GROUP BY owner"
	err := d.each(ctx, query, func(rows *sql.Rows) error {
		var owner uint64
		var g group
		err := rows.Scan(&owner, &g.count, &g.steps)
		got[owner] = g
		return err
	})
	if want := d.model.groups(); err == nil && !maps.Equal(got, want) {
		err = fmt.Errorf("the index has %v, want %v", got, want)
	}
	return err
}

// each calls do for each row of a query's answer.
func (d *database) each(ctx context.Context, query string, do func(rows *sql.Rows) error) (err error) {
	rows, err := d.db.QueryContext(ctx, query)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, rows.Close()) }()
	for rows.Next() {
		if err := do(rows); err != nil {
			return err
		}
	}
	return rows.Err()
}
