package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/cryovisor/cryovisor/snapshot"
)

const storeEnv = "CRYOVISOR_STORE"

// storeFlag is the flag of verbs that use a store of snapshots.
type storeFlag struct{ dir string }

func (s *storeFlag) add(cmd *cobra.Command) {
	cmd.Flags().StringVarP(&s.dir, "store", "s", "",
		"directory of snapshots (default $"+storeEnv+", else .local/share/cryovisor in your home directory)")
}

func (s *storeFlag) open() (*snapshot.Store, error) {
	dir := s.dir
	if dir == "" {
		dir = os.Getenv(storeEnv)
	}
	if dir == "" {
		home, err := os.UserHomeDir()
		if err != nil {
			return nil, err
		}
		dir = filepath.Join(home, ".local", "share", "cryovisor")
	}
	return snapshot.OpenStore(dir)
}

// find returns the snapshot that a user named: by the path of its manifest, by
// its id or by the first characters of its id.
func (s *storeFlag) find(name string) (*snapshot.Store, snapshot.ID, error) {
	if store, id, err := byPath(name); !errors.Is(err, errNotPath) {
		return store, id, err
	}
	store, err := s.open()
	if err != nil {
		return nil, snapshot.ID{}, err
	}
	if id, err := snapshot.ParseID(name); err == nil {
		return store, id, nil
	}
	entries, listErr := store.List()
	var found []snapshot.ID
	for _, e := range entries {
		if strings.HasPrefix(e.ID.String(), strings.ToLower(name)) {
			found = append(found, e.ID)
		}
	}
	switch len(found) {
	case 1:
		return store, found[0], nil
	case 0:
		return nil, snapshot.ID{}, errors.Join(
			fmt.Errorf("no snapshot %q in %s: %w", name, store.Dir(), snapshot.ErrNotFound), listErr)
	default:
		return nil, snapshot.ID{}, fmt.Errorf("%q may be any of %d snapshots: give more of the id", name, len(found))
	}
}

var errNotPath = errors.New("not the path of a manifest")

// byPath takes apart the path of a manifest, STORE/snapshots/ID.cryo.
func byPath(name string) (*snapshot.Store, snapshot.ID, error) {
	if !strings.ContainsRune(name, filepath.Separator) {
		return nil, snapshot.ID{}, errNotPath
	}
	abs, err := filepath.Abs(name)
	if err != nil {
		return nil, snapshot.ID{}, err
	}
	base := filepath.Base(abs)
	id, err := snapshot.ParseID(strings.TrimSuffix(base, filepath.Ext(base)))
	if err != nil {
		return nil, snapshot.ID{}, fmt.Errorf("%s is not named like the manifest of a snapshot: %w", name, err)
	}
	store, err := snapshot.OpenStore(filepath.Dir(filepath.Dir(abs)))
	if err != nil {
		return nil, snapshot.ID{}, err
	}
	if store.ManifestPath(id) != abs {
		return nil, snapshot.ID{}, fmt.Errorf("%s does not lie in a store: its manifests are at %s", name, store.ManifestPath(id))
	}
	return store, id, nil
}
