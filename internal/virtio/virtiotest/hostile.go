package virtiotest

import (
	"context"
	"encoding/binary"
	"math/rand/v2"
	"runtime"
	"sync"
	"testing"

	"github.com/cryovisor/cryovisor/internal/virtio"
)

// Bounds of Hostile: how often the device is brought up, and in how much of the guest's memory, from address 0 on, rings are
// changed.
const (
	hostileRounds = 500
	hostileRings  = 2 << 10
)

// Hostile has several vCPUs use a device at the same time, each as it likes: one asks for reqs, again and again, one changes the
// rings, descriptors and requests under the device's hands, and two write to its registers; while the host stops the device,
// saves it and lets it work. It must not panic, nor keep a request, and be good for use in the end. Run it with the race detector.
func Hostile(t *testing.T, fresh func() virtio.Device, features virtio.Feature, reqs ...Request) {
	d := fuzzDriver(t, fresh, nil)
	defer closeFuzzed(t, d)
	stop, asked := make(chan struct{}), make(chan struct{}, 1)
	var vcpus sync.WaitGroup
	run := func(seed uint64, step func(rng *rand.Rand)) {
		vcpus.Go(func() {
			rng := rand.New(rand.NewPCG(seed, 3))
			for {
				select {
				case <-stop:
					return
				default:
					step(rng)
				}
			}
		})
	}
	run(1, func(rng *rand.Rand) { scribble(d.RAM, rng) })
	for seed := range uint64(2) {
		run(2+seed, func(rng *rand.Rand) { meddle(d, rng) })
	}
	vcpus.Go(func() {
		defer close(asked)
		rng := rand.New(rand.NewPCG(4, 3))
		for range hostileRounds {
			ask(d, features, reqs, rng)
			asked <- struct{}{}
		}
	})
	for range asked {
		if err := saveStopped(d.Transport); err != nil {
			t.Error(err)
		}
	}
	close(stop)
	vcpus.Wait()
	checkFuzzed(t, d, fresh)
}

// ask brings the device up and asks for some of reqs. Others may have hindered it.
func ask(d *Driver, features virtio.Feature, reqs []Request, rng *rand.Rand) {
	if err := d.Init(features|virtio.FeatureVersion1, 16); err != nil {
		return
	}
	for range 40 {
		req := reqs[rng.IntN(len(reqs))]
		if req.Queue >= len(d.Rings) {
			continue
		}
		if ok, err := d.Rings[req.Queue].Post(req); !ok || err != nil {
			return
		}
		d.SetReg(RegQueueNotify, uint32(req.Queue))
		for range 20 { // let the device, and the others, come to it
			runtime.Gosched()
		}
	}
}

// scribble changes a word of the rings now and then, mostly to something small: not so often that no request is ever whole.
func scribble(ram *RAM, rng *rand.Rand) {
	if rng.IntN(100) > 0 {
		runtime.Gosched()
		return
	}
	var b [4]byte
	binary.LittleEndian.PutUint32(b[:], rng.Uint32()>>rng.IntN(32))
	_, _ = ram.WriteAt(b[:1+rng.IntN(len(b))], int64(rng.IntN(hostileRings))) // it is in RAM
}

// meddle accesses registers: seldom one that sets the device up, or ends everything.
func meddle(d *Driver, rng *rand.Rand) {
	off := registers[rng.IntN(len(registers))]
	switch {
	case off == RegQueueNotify || off == RegInterruptACK || off >= RegConfig:
		d.SetReg(off, rng.Uint32()>>rng.IntN(32))
	case rng.IntN(1000) > 0:
	case off == RegStatus:
		d.SetReg(off, []uint32{0, Acknowledge | DriverLoaded | FeaturesOK | DriverOK, 0xff}[rng.IntN(3)])
	default:
		d.SetReg(off, rng.Uint32()>>rng.IntN(32))
	}
	d.Reg(uint64(rng.IntN(virtio.RegionSize)) &^ 3)
	runtime.Gosched()
}

// saveStopped stops a device and lets it work again, now and then when somebody has lost patience.
func saveStopped(t *virtio.Transport) error {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	_ = t.Quiesce(ctx) // if it has nothing to do, that is soon enough
	if err := t.Quiesce(context.Background()); err != nil {
		return err
	}
	if _, err := t.Save(); err != nil {
		return err
	}
	return t.Resume()
}
