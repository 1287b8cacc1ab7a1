package catalog

import (
	"context"
	"database/sql"
)

const sandboxColumns = `id, template, owner, running, snapshot, created, started, paused, timeout, idle_timeout, on_timeout, auto_resume,
	metadata, vcpus, memory_bytes, disk_bytes, stored_bytes, pauses, last_error`

// Sandboxes returns all records of sandboxes, in the order in which they were created.
func (c *Catalog) Sandboxes(ctx context.Context) ([]Sandbox, error) {
	return query(ctx, c, "SELECT "+sandboxColumns+" FROM sandboxes ORDER BY created, id", scanSandbox)
}

func scanSandbox(row *sql.Rows) (s Sandbox, err error) {
	var created, started, paused int64
	var metadata string
	err = row.Scan(&s.ID, &s.Template, &s.Owner, &s.Running, &s.Snapshot, &created, &started, &paused, &s.Timeout, &s.IdleTimeout,
		&s.OnTimeout, &s.AutoResume, &metadata, &s.VCPUs, &s.MemoryBytes, &s.DiskBytes, &s.StoredBytes, &s.Pauses, &s.LastError)
	if err != nil {
		return s, err
	}
	s.Created, s.Started, s.Paused = fromNanos(created), fromNanos(started), fromNanos(paused)
	s.Metadata, err = fromPairs(metadata)
	return s, err
}

// PutSandbox adds a record, or replaces the one of that id. sealed, if not nil, is its key.
func (c *Catalog) PutSandbox(ctx context.Context, s Sandbox, sealed []byte) error {
	return c.transact(ctx, func(tx *sql.Tx) error {
		_, err := tx.ExecContext(ctx, "REPLACE INTO sandboxes ("+sandboxColumns+") VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)",
			s.ID, s.Template, s.Owner, s.Running, s.Snapshot, nanos(s.Created), nanos(s.Started), nanos(s.Paused), int64(s.Timeout),
			int64(s.IdleTimeout), s.OnTimeout, s.AutoResume, pairs(s.Metadata), s.VCPUs, int64(s.MemoryBytes), int64(s.DiskBytes),
			int64(s.StoredBytes), s.Pauses, s.LastError)
		if err != nil {
			return err
		}
		return putSecret(ctx, tx, s.ID, sealed)
	})
}

// DeleteSandbox deletes a record and its key. There need be none.
func (c *Catalog) DeleteSandbox(ctx context.Context, id string) error {
	return c.remove(ctx, "sandboxes", id)
}

const templateColumns = `id, name, owner, source, snapshot, created, vcpus, memory_bytes, disk_bytes, stored_bytes, labels, working_set`

// Templates returns all records of templates, in the order in which they were created.
func (c *Catalog) Templates(ctx context.Context) ([]Template, error) {
	return query(ctx, c, "SELECT "+templateColumns+" FROM templates ORDER BY created, id", scanTemplate)
}

func scanTemplate(row *sql.Rows) (t Template, err error) {
	var created int64
	var labels string
	err = row.Scan(&t.ID, &t.Name, &t.Owner, &t.Source, &t.Snapshot, &created, &t.VCPUs, &t.MemoryBytes, &t.DiskBytes, &t.StoredBytes,
		&labels, &t.WorkingSet)
	if err != nil {
		return t, err
	}
	t.Created = fromNanos(created)
	t.Labels, err = fromPairs(labels)
	return t, err
}

// PutTemplate adds a record, or replaces the one of that id. sealed, if not nil, is its key.
func (c *Catalog) PutTemplate(ctx context.Context, t Template, sealed []byte) error {
	return c.transact(ctx, func(tx *sql.Tx) error {
		_, err := tx.ExecContext(ctx, "REPLACE INTO templates ("+templateColumns+") VALUES (?,?,?,?,?,?,?,?,?,?,?,?)",
			t.ID, t.Name, t.Owner, t.Source, t.Snapshot, nanos(t.Created), t.VCPUs, int64(t.MemoryBytes), int64(t.DiskBytes),
			int64(t.StoredBytes), pairs(t.Labels), t.WorkingSet)
		if err != nil {
			return err
		}
		return putSecret(ctx, tx, t.ID, sealed)
	})
}

// DeleteTemplate deletes a record and its key. There need be none.
func (c *Catalog) DeleteTemplate(ctx context.Context, id string) error {
	return c.remove(ctx, "templates", id)
}

func (c *Catalog) remove(ctx context.Context, table, id string) error {
	return c.transact(ctx, func(tx *sql.Tx) error {
		if _, err := tx.ExecContext(ctx, "DELETE FROM secrets WHERE id = ?", id); err != nil {
			return err
		}
		_, err := tx.ExecContext(ctx, "DELETE FROM "+table+" WHERE id = ?", id)
		return err
	})
}

func putSecret(ctx context.Context, tx *sql.Tx, id string, sealed []byte) error {
	if sealed == nil {
		return nil
	}
	_, err := tx.ExecContext(ctx, "REPLACE INTO secrets (id, sealed) VALUES (?, ?)", id, sealed)
	return err
}

// Secret returns a sealed key: nil if there is none.
func (c *Catalog) Secret(ctx context.Context, id string) (sealed []byte, err error) {
	rows, err := query(ctx, c, "SELECT sealed FROM secrets WHERE id = ?", func(row *sql.Rows) (b []byte, err error) {
		return b, row.Scan(&b)
	}, id)
	if err != nil || len(rows) == 0 {
		return nil, err
	}
	return rows[0], nil
}

// secret is a row of the table of secrets.
type secret struct {
	id     string
	sealed []byte
}

// Reseal replaces every sealed key by what seal makes of it, as one change: an error of seal leaves all as they were.
func (c *Catalog) Reseal(ctx context.Context, seal func(id string, sealed []byte) ([]byte, error)) error {
	secrets, err := query(ctx, c, "SELECT id, sealed FROM secrets", func(row *sql.Rows) (s secret, err error) {
		return s, row.Scan(&s.id, &s.sealed)
	})
	if err != nil {
		return err
	}
	return c.transact(ctx, func(tx *sql.Tx) error {
		for _, s := range secrets {
			sealed, err := seal(s.id, s.sealed)
			if err != nil {
				return err
			}
			if err := putSecret(ctx, tx, s.id, sealed); err != nil {
				return err
			}
		}
		return nil
	})
}

// PruneSecrets deletes the keys of nobody: of no sandbox and no template.
func (c *Catalog) PruneSecrets(ctx context.Context) (n int64, err error) {
	err = c.transact(ctx, func(tx *sql.Tx) error {
		result, err := tx.ExecContext(ctx,
			"DELETE FROM secrets WHERE id NOT IN (SELECT id FROM sandboxes UNION ALL SELECT id FROM templates)")
		if err != nil {
			return err
		}
		n, err = result.RowsAffected()
		return err
	})
	return n, err
}

// query returns all rows of a question.
func query[T any](ctx context.Context, c *Catalog, question string, scan func(*sql.Rows) (T, error), args ...any) ([]T, error) {
	rows, err := c.db.QueryContext(ctx, question, args...)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var all []T
	for rows.Next() {
		v, err := scan(rows)
		if err != nil {
			return nil, err
		}
		all = append(all, v)
	}
	return all, rows.Err()
}
