package vmm

import (
	"sync"
	"testing"

	"github.com/cryovisor/cryovisor/internal/virtio"
	"github.com/cryovisor/cryovisor/internal/virtio/rng"
)

// Activity may be asked for at any time: also while the devices are being closed, and afterwards.
func TestActivityOfClosed(t *testing.T) {
	vm := &VM{ended: make(chan struct{})}
	for range 3 {
		irq, err := virtio.NewEventFD()
		if err != nil {
			t.Fatal(err)
		}
		transport, err := virtio.New(rng.New(rng.Config{}), virtio.Config{Doorbell: virtio.NewBell(), Interrupt: irq.Ring})
		if err != nil {
			t.Fatal(err)
		}
		vm.virtio = append(vm.virtio, &virtioDevice{transport: transport, irq: irq, traffic: func() uint64 { return 7 }})
	}
	stop := make(chan struct{})
	var asking sync.WaitGroup
	asking.Go(func() {
		for {
			if n := vm.Activity().Frames; n != 21 {
				t.Errorf("%d frames", n)
				return
			}
			select {
			case <-stop:
				return
			default:
			}
		}
	})
	if err := vm.closeVirtio(); err != nil {
		t.Error(err)
	}
	close(stop)
	asking.Wait()
	if n := vm.Activity().Frames; n != 21 {
		t.Errorf("%d frames of a closed machine", n)
	}
}
