package virtiotest

import (
	"bytes"
	"context"
	"encoding/binary"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/cryovisor/cryovisor/internal/virtio"
)

// fuzzRAM is small, so that random addresses often hit it.
const fuzzRAM = 128 << 10

// registers are the ones that a fuzzer picks from.
var registers = []uint64{
	RegDeviceFeaturesSel, RegDriverFeatures, RegDriverFeaturesSel, RegQueueSel, RegQueueSize, RegQueueReady,
	RegQueueNotify, RegInterruptACK, RegStatus, RegQueueDesc, RegQueueDesc + 4, RegQueueDriver, RegQueueDriver + 4,
	RegQueueDevice, RegQueueDevice + 4, RegConfig, RegConfig + 8,
}

// FuzzRegisters gives a device random register accesses (5 bytes of ops each: which, value) with image as
// guest memory. The device must not panic, must still be stoppable, and its state must survive a save.
func FuzzRegisters(t *testing.T, fresh func() virtio.Device, image, ops []byte) {
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

// FuzzRings sets a device up as a driver does, then makes image guest memory, so that it is rings, descriptors and
// requests, and rings for each queue.
func FuzzRings(t *testing.T, fresh func() virtio.Device, features virtio.Feature, image []byte) {
	d := fuzzDriver(t, fresh, nil)
	defer closeFuzzed(t, d)
	if err := d.Init(features|virtio.FeatureVersion1, 16); err != nil {
		t.Fatal(err)
	}
	if _, err := d.RAM.WriteAt(image[:min(len(image), fuzzRAM)], 0); err != nil {
		t.Fatal(err)
	}
	for i := range d.Rings {
		d.SetReg(RegQueueNotify, uint32(i))
	}
	d.Idle()
	checkFuzzed(t, d, fresh)
}

// RingImage is guest memory for FuzzRings in which the rings hold reqs: seeds from which a fuzzer finds more than
// from noise.
func RingImage(t testing.TB, fresh func() virtio.Device, features virtio.Feature, reqs ...Request) []byte {
	d := fuzzDriver(t, fresh, nil)
	defer closeFuzzed(t, d)
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
	return bytes.TrimRight(d.RAM.Bytes(), "\x00")
}

func fuzzDriver(t testing.TB, fresh func() virtio.Device, image []byte) *Driver {
	d := NewDriver(NewRAM(fuzzRAM), rand.New(rand.NewPCG(1, 2)))
	copy(d.RAM.mem, image)
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
