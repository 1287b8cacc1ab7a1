package lifecycle

import (
	"bytes"
	"context"
	"errors"
	"testing"

	"filippo.io/age"

	"github.com/cryovisor/cryovisor/snapshot"
)

// Whoever comes for a snapshot when its last user has gone gets it as a whole or not at all: it is about to be deleted, though its
// manifest is there still.
func TestHoldOfDoomed(t *testing.T) {
	ctx := context.Background()
	store, err := snapshot.OpenStore(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	key, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	w, err := store.Create(ctx, snapshot.Options{Recipients: []age.Recipient{key.Recipient()}})
	if err != nil {
		t.Fatal(err)
	}
	page := func(p []byte, _ int64) (int, error) { return copy(p, bytes.Repeat([]byte{1}, len(p))), nil }
	ram := &snapshot.Memory{Size: 1 << 20, ReadAt: page, Data: []snapshot.Range{{GPA: 0, Len: snapshot.PageSize}}}
	if err := w.Write(ctx, snapshot.Contents{Memory: ram}); err != nil {
		t.Fatal(err)
	}
	info, err := w.Commit(ctx)
	if err != nil {
		t.Fatal(err)
	}
	s := newHoldings(store)
	for range 2 {
		if err := s.hold(info.ID); err != nil {
			t.Fatal(err)
		}
	}
	if s.lastUser(info.ID) || !s.lastUser(info.ID) {
		t.Fatal("of two users, it is the second that is the last")
	}
	if err := s.hold(info.ID); !errors.Is(err, snapshot.ErrNotFound) {
		t.Fatalf("hold while it is being deleted: %v", err)
	}
	if _, err := store.Header(info.ID); err != nil {
		t.Fatalf("it is there still: %v", err)
	}
	s.deleted(info.ID) // which has failed, as it is there
	if err := s.hold(info.ID); err != nil {
		t.Fatal(err)
	}
	if err := s.letGo(ctx, info.ID); err != nil {
		t.Fatal(err)
	}
	if err := s.hold(info.ID); !errors.Is(err, snapshot.ErrNotFound) || len(s.doomed) > 0 || s.total() > 0 {
		t.Fatalf("hold of what is gone: %v; %d doomed, %d bytes", err, len(s.doomed), s.total())
	}
}
