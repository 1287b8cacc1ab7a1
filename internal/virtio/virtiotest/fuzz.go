package virtiotest

import (
	"context"
	"encoding/binary"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/cryovisor/cryovisor/internal/virtio"
)

// maxInput is the longest image, and the longest list of register accesses, that is tried. To make an input of n bytes
// shorter the fuzzer runs n*n/2 others, and does nothing else meanwhile.
const maxInput = 384

// registers are the ones that a fuzzer picks from.
var registers = []uint64{
	RegDeviceFeaturesSel, RegDriverFeatures, RegDriverFeaturesSel, RegQueueSel, RegQueueSize, RegQueueReady,
	RegQueueNotify, RegInterruptACK, RegStatus, RegQueueDesc, RegQueueDesc + 4, RegQueueDriver, RegQueueDriver + 4,
	RegQueueDevice, RegQueueDevice + 4, RegConfig, RegConfig + 8,
}

// FuzzRegisters gives a device random register accesses (5 bytes of ops each: which, value) with guest memory made of
// image. The device must not panic, must still be stoppable, and its state must survive a save.
func FuzzRegisters(t *testing.T, fresh func() virtio.Device, image, ops []byte) {
	if len(image)+len(ops) > maxInput {
		return
	}
	d := fuzzDriver(t, fresh, image)
	defer closeFuzzed(t, d)
	for ; len(ops) >= 5; ops = ops[5:] {
		off, v := registers[int(ops[0]&0x7f)%len(registers)], binary.LittleEndian.Uint32(ops[1:])
		if ops[0]&0x80 != 0 {
			d.Transport.Write(uint64(v%virtio.RegionSize), ops[1:1+v%4])
			d.Transport.Read(uint64(v%virtio.RegionSize), make([]byte, 1+v%8))
			continue
		}
		d.SetReg(off, v)
		d.Reg(off)
	}
	d.Idle()
	checkFuzzed(t, d, fresh)
}

// FuzzRings sets a device up as a driver does, then makes guest memory of image, so that it is rings, descriptors and
// requests, and rings for each queue.
func FuzzRings(t *testing.T, fresh func() virtio.Device, features virtio.Feature, image []byte) {
	if len(image) > maxInput {
		return
	}
	d := fuzzDriver(t, fresh, nil)
	defer closeFuzzed(t, d)
	playImage(t, d, features, image)
	checkFuzzed(t, d, fresh)
}

func playImage(t testing.TB, d *Driver, features virtio.Feature, image []byte) {
	if err := d.Init(features|virtio.FeatureVersion1, 16); err != nil {
		t.Fatal(err)
	}
	d.Idle() // so that one input always does the same
	d.RAM.load(image)
	for i := range d.Rings {
		d.SetReg(RegQueueNotify, uint32(i))
	}
	d.Idle()
}

// RingImage is an image for FuzzRings in which the rings hold reqs: seeds from which a fuzzer finds more than
// from noise. It makes sure that a device answers one of them at least.
func RingImage(t testing.TB, fresh func() virtio.Device, features virtio.Feature, reqs ...Request) []byte {
	d := fuzzDriver(t, fresh, nil)
	if err := d.Init(features|virtio.FeatureVersion1, 16); err != nil {
		t.Fatal(err)
	}
	if err := d.Transport.Quiesce(context.Background()); err != nil {
		t.Fatal(err)
	}
	for _, req := range reqs {
		if ok, err := d.Rings[req.Queue].Post(req); !ok || err != nil {
			t.Fatalf("no room for a request: %v", err)
		}
	}
	image := makeImage(d.RAM.Bytes())
	closeFuzzed(t, d)
	if len(image) > maxInput {
		t.Fatalf("an image of %d bytes is too long to be tried", len(image))
	}
	checkSeed(t, fresh, features, image)
	return image
}

func checkSeed(t testing.TB, fresh func() virtio.Device, features virtio.Feature, image []byte) {
	d := fuzzDriver(t, fresh, nil)
	defer closeFuzzed(t, d)
	playImage(t, d, features, image)
	if err := d.Transport.Quiesce(context.Background()); err != nil {
		t.Fatal(err)
	}
	s, err := d.Transport.Save()
	if err != nil {
		t.Fatal(err)
	}
	answered := 0
	for _, q := range s.Queues {
		answered += int(q.Used)
	}
	if answered == 0 {
		t.Fatalf("no request of the image is answered: %v", d.Transport.Err())
	}
}

func fuzzDriver(t testing.TB, fresh func() virtio.Device, image []byte) *Driver {
	d := NewDriver(NewRAM(imageRAM), rand.New(rand.NewPCG(1, 2)))
	d.RAM.load(image)
	if err := d.Attach(fresh()); err != nil {
		t.Fatal(err)
	}
	return d
}

func closeFuzzed(t testing.TB, d *Driver) {
	if err := d.Transport.Close(); err != nil {
		t.Error(err)
	}
}

// checkFuzzed checks that a device, whatever its driver did, can be stopped, moved and used again.
func checkFuzzed(t *testing.T, d *Driver, fresh func() virtio.Device) {
	// A device that never ends is found out by this.
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	r := &run{t: t, d: d, s: Subject{New: fresh}}
	if err := r.move(ctx); err != nil {
		t.Fatalf("move to another process: %v", err)
	}
	if err := d.Transport.Quiesce(ctx); err != nil {
		t.Fatal(err)
	}
	if err := d.Transport.Resume(); err != nil {
		t.Fatal(err)
	}
	d.Idle()
	if err := d.Init(^virtio.Feature(0), 8); err != nil {
		t.Fatalf("use after a reset: %v", err)
	}
}
