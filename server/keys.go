package server

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"database/sql"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/time/rate"

	_ "modernc.org/sqlite" // the driver
)

// KeysFile is the name of the database of API keys in a data directory.
const KeysFile = "api.db"

// keyPrefix begins API keys. SDKs of the E2B family expect this one.
const keyPrefix = "e2b_"

// ErrNoKey says that there is no such API key.
var ErrNoKey = errors.New("no such API key")

// APIKey describes a key, which itself is not stored.
type APIKey struct {
	ID      string    `json:"id"` // the owner of the sandboxes that are made with it
	Name    string    `json:"name"`
	Created time.Time `json:"created"`
}

// Keys are the API keys of a data directory. Several processes may have them open: a command can add one while a server runs. The methods
// may be called from any number of goroutines.
//
// A key is 160 random bits. What is stored is its SHA-256: a slow hash would protect guessable secrets, which these are not.
type Keys struct {
	db   *sql.DB
	path string
}

// OpenKeys opens the keys of a data directory, which must exist.
func OpenKeys(ctx context.Context, dir string) (*Keys, error) {
	path := filepath.Join(dir, KeysFile)
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600) // SQLite would make it readable by others
	if err == nil {
		err = f.Close()
	}
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("API keys: %w", err)
	}
	// With TRUNCATE the journal stays when it is not in use, so that a confined process can have it, and nothing else around it.
	dsn := url.URL{Scheme: "file", Opaque: (&url.URL{Path: path}).EscapedPath(), RawQuery: "_pragma=busy_timeout(10000)&_pragma=journal_mode(TRUNCATE)"}
	db, err := sql.Open("sqlite", dsn.String())
	if err != nil {
		return nil, fmt.Errorf("API keys: %w", err)
	}
	_, err = db.ExecContext(ctx, `CREATE TABLE IF NOT EXISTS keys (
		hash BLOB PRIMARY KEY, id TEXT NOT NULL UNIQUE, name TEXT NOT NULL, created INTEGER NOT NULL) STRICT`)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("API keys: %w", err), db.Close())
	}
	return &Keys{db, path}, nil
}

// Files are the files of the keys, which are there from now on: what a confined process has to keep.
func (k *Keys) Files() ([]string, error) {
	journal := k.path + "-journal"
	f, err := os.OpenFile(journal, os.O_RDWR|os.O_CREATE, 0o600) // empty, it says that no change is under way
	if err != nil {
		return nil, fmt.Errorf("API keys: %w", err)
	}
	return []string{k.path, journal}, f.Close()
}

// Close closes them.
func (k *Keys) Close() error { return k.db.Close() }

// Create makes a key, which is returned this once.
func (k *Keys) Create(ctx context.Context, name string) (APIKey, string, error) {
	secret := make([]byte, 20)
	id := make([]byte, 6)
	_, _ = rand.Read(secret) // never fails, by its documentation
	_, _ = rand.Read(id)
	key := APIKey{ID: "key_" + hex.EncodeToString(id), Name: name, Created: time.Now().UTC().Truncate(time.Second)}
	text := keyPrefix + hex.EncodeToString(secret)
	_, err := k.db.ExecContext(ctx, "INSERT INTO keys (hash, id, name, created) VALUES (?, ?, ?, ?)", hash(text), key.ID, name, key.Created.Unix())
	if err != nil {
		return APIKey{}, "", fmt.Errorf("API keys: %w", err)
	}
	return key, text, nil
}

// List returns all keys, the oldest first.
func (k *Keys) List(ctx context.Context) ([]APIKey, error) {
	rows, err := k.db.QueryContext(ctx, "SELECT id, name, created FROM keys ORDER BY created, id")
	if err != nil {
		return nil, fmt.Errorf("API keys: %w", err)
	}
	defer rows.Close()
	var keys []APIKey
	for rows.Next() {
		var key APIKey
		var created int64
		if err := rows.Scan(&key.ID, &key.Name, &created); err != nil {
			return nil, fmt.Errorf("API keys: %w", err)
		}
		key.Created = time.Unix(created, 0).UTC()
		keys = append(keys, key)
	}
	return keys, rows.Err()
}

// Revoke deletes a key: ErrNoKey if there is none. Its sandboxes stay, until their timeouts and their retention.
func (k *Keys) Revoke(ctx context.Context, id string) error {
	result, err := k.db.ExecContext(ctx, "DELETE FROM keys WHERE id = ?", id)
	if err != nil {
		return fmt.Errorf("API keys: %w", err)
	}
	if n, err := result.RowsAffected(); n == 0 || err != nil {
		return errors.Join(fmt.Errorf("%w: %q", ErrNoKey, id), err)
	}
	return nil
}

// find returns the id of a key. It is looked up by its hash, so that the time that takes tells nothing of what is stored.
func (k *Keys) find(ctx context.Context, text string) (id string, err error) {
	err = k.db.QueryRowContext(ctx, "SELECT id FROM keys WHERE hash = ?", hash(text)).Scan(&id)
	if errors.Is(err, sql.ErrNoRows) {
		err = ErrNoKey
	}
	return id, err
}

func hash(text string) []byte {
	sum := sha256.Sum256([]byte(text))
	return sum[:]
}

// authenticate returns the id of the request's API key.
func (s *Server) authenticate(r *http.Request) (id string, err error) {
	text := r.Header.Get("X-API-KEY")
	if len(text) > 256 || !strings.HasPrefix(text, keyPrefix) {
		return "", errNoKey
	}
	id, err = s.cfg.Keys.find(r.Context(), text)
	if errors.Is(err, ErrNoKey) {
		return "", errNoKey
	}
	if err != nil {
		return "", err
	}
	return id, s.limiters.admit(id)
}

// limiters bound the rate of requests of each API key. There is one for each key that was used: keys are few.
type limiters struct {
	rate  rate.Limit
	burst int
	of    sync.Map // from string to *rate.Limiter
}

// maxRetryAfter bounds what a caller is told to wait, in seconds.
const maxRetryAfter = 3600

func (l *limiters) admit(id string) error {
	known, ok := l.of.Load(id)
	if !ok {
		known, _ = l.of.LoadOrStore(id, rate.NewLimiter(l.rate, l.burst))
	}
	limiter, _ := known.(*rate.Limiter)
	if !limiter.Allow() {
		return &tooMany{"too many requests with this API key", int(min(math.Ceil(1/float64(l.rate)), maxRetryAfter))}
	}
	return nil
}
