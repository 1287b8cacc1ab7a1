package blockdev_test

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"syscall"
	"testing"

	"github.com/cryovisor/cryovisor/blockdev"
	"github.com/cryovisor/cryovisor/blockdev/blockdevtest"
)

// meanwhile is a file in which something happens when the first sync has just ended, and of which the second never does.
type meanwhile struct {
	*blockdevtest.Medium
	after func() error
	syncs int
}

func (m *meanwhile) Sync() error {
	if m.syncs++; m.syncs > 1 {
		return errCrash
	}
	return errors.Join(m.Medium.Sync(), m.after())
}

var errCrash = errors.New("the host crashes")

// TestWriteDuringFlush: the map must not tell of a write that was made while a flush had synced the data already.
func TestWriteDuringFlush(t *testing.T) {
	lower := rawDisk(t, 64<<10, blockdev.Options{ReadOnly: true})
	late := bytes.Repeat([]byte{7}, 4096)
	for seed := range uint64(50) {
		m := &meanwhile{Medium: blockdevtest.NewMedium()}
		o, err := blockdev.NewOverlayIn(m, lower.Device, blockdev.OverlayOptions{Size: 64 << 10})
		if err != nil {
			t.Fatal(err)
		}
		m.after = func() error {
			_, err := o.WriteAt(late, 8192)
			return err
		}
		if _, err := o.WriteAt(late, 0); err != nil {
			t.Fatal(err)
		}
		if err := o.Flush(); !errors.Is(err, errCrash) {
			t.Fatal(err)
		}
		again, err := blockdev.OpenOverlayIn(m.Crash(rand.New(rand.NewPCG(seed, 1))), lower.Device)
		if err != nil {
			t.Fatal(err)
		}
		got := make([]byte, 4096)
		if _, err := again.ReadAt(got, 8192); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, late) && !bytes.Equal(got, lower.Content[8192:][:4096]) {
			t.Fatalf("seed %d: a block that was not flushed is neither as it was nor as it was written: %x", seed, got[:16])
		}
	}
}

// TestFlushAgain: a flush that could not write the map leaves it to the next one.
func TestFlushAgain(t *testing.T) {
	m := blockdevtest.NewMedium()
	o, err := blockdev.NewOverlayIn(m, nil, blockdev.OverlayOptions{Size: 64 << 10})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := o.WriteAt([]byte("something"), 5000); err != nil {
		t.Fatal(err)
	}
	m.SetHook(func(op blockdevtest.Op) *blockdevtest.Fault {
		if op.Kind == blockdevtest.OpWrite {
			return &blockdevtest.Fault{Err: syscall.ENOSPC}
		}
		return nil
	})
	if err := o.Flush(); !errors.Is(err, syscall.ENOSPC) {
		t.Fatal(err)
	}
	m.SetHook(nil)
	if err := o.Flush(); err != nil {
		t.Fatal(err)
	}
	again, err := blockdev.OpenOverlayIn(m.Open(), nil)
	if err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 9)
	if _, err := again.ReadAt(got, 5000); err != nil || string(got) != "something" {
		t.Errorf("%q, %v", got, err)
	}
}
