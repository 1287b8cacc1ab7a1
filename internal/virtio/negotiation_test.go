package virtio_test

import (
	"math/rand/v2"
	"testing"

	"github.com/cryovisor/cryovisor/internal/virtio"
	"github.com/cryovisor/cryovisor/internal/virtio/virtiotest"
)

// Statuses on the way to DRIVER_OK (virtio 1.2, section 3.1.1).
const (
	loaded = virtiotest.Acknowledge | virtiotest.DriverLoaded
	agreed = loaded | virtiotest.FeaturesOK
	ready  = agreed | virtiotest.DriverOK
)

// bareDriver is a driver whose device has just been reset.
func bareDriver(t *testing.T, dev virtio.Device) *virtiotest.Driver {
	t.Helper()
	d := virtiotest.NewDriver(virtiotest.NewRAM(1<<20), rand.New(rand.NewPCG(1, 1)))
	if err := d.Attach(dev); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { must(nil, d.Transport.Close()) })
	return d
}

func accept(d *virtiotest.Driver, f virtio.Feature) {
	for i, half := range []uint32{uint32(f), uint32(f >> 32)} {
		d.SetReg(virtiotest.RegDriverFeaturesSel, uint32(i))
		d.SetReg(virtiotest.RegDriverFeatures, half)
	}
}

func TestNegotiation(t *testing.T) {
	const device = virtio.Feature(1 << 3) // the echo's own
	for name, c := range map[string]struct {
		accept virtio.Feature
		status []uint32 // that the driver writes
		want   uint32
	}{
		"all":                     {device | virtio.FeatureVersion1 | virtio.FeatureIndirect | virtio.FeatureEventIdx, []uint32{loaded, agreed, ready}, ready},
		"the least":               {virtio.FeatureVersion1, []uint32{loaded, agreed, ready}, ready},
		"a legacy driver":         {device, []uint32{loaded, agreed}, loaded},
		"a legacy driver goes on": {device, []uint32{loaded, agreed, ready}, loaded},
		"nothing":                 {0, []uint32{loaded, agreed}, loaded},
		"more, low half":          {virtio.FeatureVersion1 | 1, []uint32{loaded, agreed}, loaded},
		"more, high half":         {virtio.FeatureVersion1 | 1<<33, []uint32{loaded, agreed}, loaded},
		"more, and goes on":       {virtio.FeatureVersion1 | 1<<33, []uint32{loaded, agreed, ready}, loaded},
		"DRIVER_OK too early":     {virtio.FeatureVersion1, []uint32{loaded, loaded | virtiotest.DriverOK}, loaded},
		"all at once":             {virtio.FeatureVersion1, []uint32{ready}, ready},
		"bits are not taken back": {virtio.FeatureVersion1, []uint32{loaded, agreed, loaded}, agreed},
		"given up":                {virtio.FeatureVersion1, []uint32{loaded, loaded | virtiotest.Failed}, loaded | virtiotest.Failed},
		"the device's own bit":    {virtio.FeatureVersion1, []uint32{loaded, loaded | virtiotest.NeedsReset}, loaded},
		"bits that do not exist":  {virtio.FeatureVersion1, []uint32{0xffffff30 | loaded}, loaded},
	} {
		t.Run(name, func(t *testing.T) {
			d := bareDriver(t, &echo{})
			accept(d, c.accept)
			for _, s := range c.status {
				d.SetReg(virtiotest.RegStatus, s)
			}
			if s := d.Reg(virtiotest.RegStatus); s != c.want {
				t.Errorf("status %#x, want %#x", s, c.want)
			}
		})
	}
}

// A driver that was refused may accept less. What was agreed on stays, until a reset forgets it.
func TestFeaturesAreFixed(t *testing.T) {
	d := bareDriver(t, &echo{})
	accept(d, virtio.FeatureVersion1|1)
	d.SetReg(virtiotest.RegStatus, agreed)
	accept(d, virtio.FeatureVersion1|virtio.FeatureIndirect)
	d.SetReg(virtiotest.RegStatus, agreed)
	if s := d.Reg(virtiotest.RegStatus); s != agreed {
		t.Fatalf("status %#x after less was accepted", s)
	}
	expect := func(want virtio.Feature) {
		t.Helper()
		must(nil, d.Transport.Quiesce(t.Context()))
		s, err := d.Transport.Save()
		if err != nil || s.Features != want {
			t.Errorf("features %#x, want %#x, %v", s.Features, want, err)
		}
		must(nil, d.Transport.Resume())
	}
	accept(d, 0)
	expect(virtio.FeatureVersion1 | virtio.FeatureIndirect)
	d.SetReg(virtiotest.RegDriverFeaturesSel, 2) // no such half
	d.SetReg(virtiotest.RegDriverFeatures, ^uint32(0))
	expect(virtio.FeatureVersion1 | virtio.FeatureIndirect)
	d.SetReg(virtiotest.RegStatus, 0)
	expect(0)
}
