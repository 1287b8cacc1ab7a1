package virtio_test

import (
	"errors"
	"slices"
	"testing"

	"github.com/cryovisor/cryovisor/internal/virtio"
	"github.com/cryovisor/cryovisor/internal/virtio/virtiotest"
)

func TestRestoreRefuses(t *testing.T) {
	d := echoDriver(t, &echo{}, ^virtio.Feature(0))
	must(nil, d.Transport.Quiesce(t.Context()))
	good, err := d.Transport.Save()
	must(nil, err)
	for name, spoil := range map[string]func(s *virtio.State){
		"another type":                func(s *virtio.State) { s.Type++ },
		"a status bit":                func(s *virtio.State) { s.Status |= 0x10 },
		"an interrupt bit":            func(s *virtio.State) { s.Interrupt = 4 },
		"DRIVER_OK, not FEATURES_OK":  func(s *virtio.State) { s.Status &^= virtiotest.FeaturesOK },
		"a feature that is not there": func(s *virtio.State) { s.Features |= 1 << 33 },
		"a legacy driver":             func(s *virtio.State) { s.Features &^= virtio.FeatureVersion1 },
		"no queues":                   func(s *virtio.State) { s.Queues = nil },
		"a queue too few":             func(s *virtio.State) { s.Queues = s.Queues[:1] },
		"a queue too many":            func(s *virtio.State) { s.Queues = append(s.Queues, virtio.QueueState{}) },
		"a ready queue of size 0":     func(s *virtio.State) { s.Queues[0].Size = 0 },
		"an odd size":                 func(s *virtio.State) { s.Queues[0].Size = 3 },
		"too large a size":            func(s *virtio.State) { s.Queues[0].Size = 128 },
		"an odd size, not ready":      func(s *virtio.State) { s.Queues[0].Ready, s.Queues[0].Size = false, 3 },
		"too large, not ready":        func(s *virtio.State) { s.Queues[0].Ready, s.Queues[0].Size = false, 128 },
		"a table that is not aligned": func(s *virtio.State) { s.Queues[1].Desc |= 8 },
		"a driver area not aligned":   func(s *virtio.State) { s.Queues[1].Driver |= 1 },
		"a device area not aligned":   func(s *virtio.State) { s.Queues[1].Device |= 2 },
		"a device's state too short":  func(s *virtio.State) { s.Device = nil },
	} {
		s := good
		s.Queues = slices.Clone(good.Queues)
		spoil(&s)
		if err := bareDriver(t, &echo{}).Transport.Restore(s); !errors.Is(err, virtio.ErrState) {
			t.Errorf("%s: %v", name, err)
		}
	}
	to := bareDriver(t, &echo{}).Transport
	must(nil, to.Restore(good))
	must(nil, to.Resume())
	if err := to.Restore(good); !errors.Is(err, virtio.ErrBusy) {
		t.Errorf("while it works: %v", err)
	}
	must(nil, to.Close())
	if err := to.Restore(good); !errors.Is(err, virtio.ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
	// What a driver that isn't ready has left is its own business.
	early := good
	early.Status, early.Features = 0, 1<<33
	early.Queues = []virtio.QueueState{{Desc: 1, Driver: 1, Device: 1}, {Size: 128}}
	if err := bareDriver(t, &echo{}).Transport.Restore(early); err != nil {
		t.Errorf("before the driver is ready: %v", err)
	}
}
