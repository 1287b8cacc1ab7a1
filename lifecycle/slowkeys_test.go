//go:build linux && amd64

package lifecycle_test

import (
	"context"
	"path/filepath"
	"testing"

	"github.com/cryovisor/cryovisor/lifecycle"
)

// slowKeys is a KeyProvider that is asked for a key, and answers when it is let.
type slowKeys struct {
	lifecycle.KeyProvider
	asked, answer chan struct{}
}

func (k *slowKeys) Open(ctx context.Context, id string, sealed []byte) ([]byte, error) {
	k.asked <- struct{}{}
	select {
	case <-k.answer:
		return k.KeyProvider.Open(ctx, id, sealed)
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// While the KeyProvider takes its time for a template, nobody else waits: neither who asks for other sandboxes, nor who lists
// templates, that one included. Who wants to make one of the same template waits as long as it likes.
func TestSlowKeyProvider(t *testing.T) {
	local, err := lifecycle.OpenLocalKeys(filepath.Join(t.TempDir(), "master.txt"))
	if err != nil {
		t.Fatal(err)
	}
	keys := &slowKeys{local, make(chan struct{}, 1), make(chan struct{})}
	m := newManager(t, lifecycle.ManagerOptions{Keys: keys})
	create := func(ctx context.Context) <-chan error {
		done := make(chan error, 1)
		go func() {
			_, err := m.Create(ctx, lifecycle.CreateOptions{Template: "ticker"})
			done <- err
		}()
		return done
	}
	first := create(t.Context())
	<-keys.asked
	hurried, giveUp := context.WithCancel(t.Context())
	second := create(hurried)
	listed := make(chan struct{})
	go func() {
		defer close(listed)
		for range 100 {
			if n := len(m.Templates()); n != 1 {
				t.Errorf("%d templates", n)
			}
			if _, err := m.List(lifecycle.ListOptions{}); err != nil {
				t.Error(err)
			}
		}
	}()
	eventually(t, "lists", func() bool {
		select {
		case <-listed:
			return true
		default:
			return false
		}
	})
	giveUp()
	if err := <-second; err == nil {
		t.Error("made a sandbox without a key")
	}
	close(keys.answer)
	if err := <-first; err != nil {
		t.Error(err)
	}
}
