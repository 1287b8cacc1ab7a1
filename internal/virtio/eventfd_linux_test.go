package virtio_test

import (
	"errors"
	"os"
	"testing"

	"github.com/cryovisor/cryovisor/internal/virtio"
)

func TestEventFD(t *testing.T) {
	e, err := virtio.NewEventFD()
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		must(nil, e.Ring())
	}
	must(nil, e.Wait())
	heard := make(chan error)
	go func() { heard <- e.Wait() }()
	must(nil, e.Ring())
	if err := <-heard; err != nil {
		t.Fatal(err)
	}
	go func() { heard <- e.Wait() }()
	must(nil, e.Close())
	if err := <-heard; !errors.Is(err, os.ErrClosed) {
		t.Errorf("wait on a closed one: %v", err)
	}
	if e.Ring() == nil {
		t.Error("a closed one rings")
	}
}
