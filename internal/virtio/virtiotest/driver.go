package virtiotest

import (
	"context"
	"encoding/binary"
	"fmt"
	"math/rand/v2"

	"github.com/cryovisor/cryovisor/internal/virtio"
)

// Registers of the MMIO transport that the driver uses, and status bits (virtio 1.2, sections 4.2.2 and
// 2.1): written down again here, so that a mistake in package virtio is not repeated.
const (
	RegMagic, RegVersion, RegDeviceID               = 0x00, 0x04, 0x08
	RegDeviceFeatures, RegDeviceFeaturesSel         = 0x10, 0x14
	RegDriverFeatures, RegDriverFeaturesSel         = 0x20, 0x24
	RegQueueSel, RegQueueSizeMax, RegQueueSize      = 0x30, 0x34, 0x38
	RegQueueReady, RegQueueNotify                   = 0x44, 0x50
	RegInterruptStatus, RegInterruptACK             = 0x60, 0x64
	RegStatus                                       = 0x70
	RegQueueDesc, RegQueueDriver, RegQueueDevice    = 0x80, 0x90, 0xa0
	RegConfigGeneration, RegConfig                  = 0xfc, 0x100
	Acknowledge, DriverLoaded, DriverOK, FeaturesOK = 1, 2, 4, 8
	NeedsReset, Failed                              = 64, 128
)

const pageSize = 4096

// Driver is the guest's side of one device. It belongs to one goroutine; Interrupt may be called from any.
type Driver struct {
	RAM      *RAM
	Rand     *rand.Rand
	Features virtio.Feature // that were negotiated
	Rings    []*Ring

	// Transport may be replaced by one that was restored from its state.
	Transport *virtio.Transport

	bell     *Bell
	irq      chan struct{}
	pages    []uint64 // that no request uses
	ringsEnd uint64
}

// NewDriver returns a driver whose rings and buffers will be in ram. Bind gives it its device.
func NewDriver(ram *RAM, rng *rand.Rand) *Driver {
	d := &Driver{RAM: ram, Rand: rng, irq: make(chan struct{}, 1)}
	d.freeAll()
	return d
}

func (d *Driver) freeAll() {
	d.pages, d.ringsEnd = nil, 0
	for gpa := uint64(0); gpa+pageSize <= uint64(len(d.RAM.mem)); gpa += pageSize {
		d.pages = append(d.pages, gpa)
	}
}

// Interrupt is an edge on the interrupt line: the Interrupt of the Transport's Config.
func (d *Driver) Interrupt() error {
	select {
	case d.irq <- struct{}{}:
	default:
	}
	return nil
}

// Attach makes a Transport for dev in d's RAM, with a Bell of its own, and uses it.
func (d *Driver) Attach(dev virtio.Device) error {
	d.bell = NewBell()
	t, err := virtio.New(dev, virtio.Config{Memory: d.RAM, Doorbell: d.bell, Interrupt: d.Interrupt})
	d.Transport = t
	return err
}

// Reg reads a register.
func (d *Driver) Reg(off uint64) uint32 {
	var b [4]byte
	d.Transport.Read(off, b[:])
	return binary.LittleEndian.Uint32(b[:])
}

// SetReg writes a register.
func (d *Driver) SetReg(off uint64, v uint32) {
	d.Transport.Write(off, binary.LittleEndian.AppendUint32(nil, v))
}

// Offered returns the features that the device offers.
func (d *Driver) Offered() virtio.Feature {
	d.SetReg(RegDeviceFeaturesSel, 0)
	lo := d.Reg(RegDeviceFeatures)
	d.SetReg(RegDeviceFeaturesSel, 1)
	return virtio.Feature(d.Reg(RegDeviceFeatures))<<32 | virtio.Feature(lo)
}

// Init resets the device and brings it up to DRIVER_OK with the features of want that it offers, and rings
// of at most size elements. Requests of before are forgotten.
func (d *Driver) Init(want virtio.Feature, size int) error {
	d.SetReg(RegStatus, 0)
	if s := d.Reg(RegStatus); s != 0 {
		return fmt.Errorf("status %#x after a reset", s)
	}
	select {
	case <-d.irq:
	default:
	}
	d.freeAll()
	d.Rings = nil
	d.SetReg(RegStatus, Acknowledge)
	d.SetReg(RegStatus, Acknowledge|DriverLoaded)
	d.Features = d.Offered() & want
	d.SetReg(RegDriverFeaturesSel, 0)
	d.SetReg(RegDriverFeatures, uint32(d.Features))
	d.SetReg(RegDriverFeaturesSel, 1)
	d.SetReg(RegDriverFeatures, uint32(d.Features>>32))
	d.SetReg(RegStatus, Acknowledge|DriverLoaded|FeaturesOK)
	if s := d.Reg(RegStatus); s&FeaturesOK == 0 {
		return fmt.Errorf("status %#x: the device refuses features %#x", s, d.Features)
	}
	for i := 0; ; i++ {
		d.SetReg(RegQueueSel, uint32(i))
		largest := int(d.Reg(RegQueueSizeMax))
		if largest == 0 {
			break
		}
		if err := d.addRing(i, min(size, largest)); err != nil {
			return err
		}
	}
	d.SetReg(RegStatus, Acknowledge|DriverLoaded|FeaturesOK|DriverOK)
	if s := d.Reg(RegStatus); s != Acknowledge|DriverLoaded|FeaturesOK|DriverOK {
		return fmt.Errorf("status %#x when the driver is ready", s)
	}
	return nil
}

func (d *Driver) addRing(i, size int) error {
	r := &Ring{d: d, index: i, size: size, requests: map[uint16]*posted{}}
	for at := range size {
		r.free = append(r.free, uint16(at))
	}
	var err error
	for _, area := range []struct {
		gpa   *uint64
		reg   uint64
		bytes int
	}{
		{&r.desc, RegQueueDesc, 16 * size},
		{&r.avail, RegQueueDriver, 6 + 2*size},
		{&r.used, RegQueueDevice, 6 + 8*size},
	} {
		if *area.gpa, err = d.contiguous(area.bytes); err != nil {
			return err
		}
		d.SetReg(area.reg, uint32(*area.gpa))
		d.SetReg(area.reg+4, uint32(*area.gpa>>32))
	}
	d.SetReg(RegQueueSize, uint32(size))
	d.SetReg(RegQueueReady, 1)
	if d.Reg(RegQueueReady) != 1 {
		return fmt.Errorf("queue %d of size %d does not become ready", i, size)
	}
	d.Rings = append(d.Rings, r)
	return nil
}

// contiguous takes n zeroed bytes for a ring, packed from address 0 on. The pages are in order while rings are set
// up.
func (d *Driver) contiguous(n int) (uint64, error) {
	gpa := d.ringsEnd
	d.ringsEnd += uint64(n+15) &^ 15
	for len(d.pages) > 0 && d.pages[0] < d.ringsEnd {
		d.pages = d.pages[1:]
	}
	_, err := d.RAM.WriteAt(make([]byte, n), int64(gpa))
	return gpa, err
}

// page takes a page for a buffer.
func (d *Driver) page() (uint64, bool) {
	if len(d.pages) == 0 {
		return 0, false
	}
	i := d.Rand.IntN(len(d.pages))
	gpa := d.pages[i]
	last := len(d.pages) - 1
	d.pages[i] = d.pages[last]
	d.pages = d.pages[:last]
	return gpa, true
}

// Wait waits for an interrupt and acknowledges it. It returns the interrupt status, which may be 0.
func (d *Driver) Wait(ctx context.Context) (uint32, error) {
	select {
	case <-d.irq:
		return d.ack(), nil
	case <-ctx.Done():
		return 0, fmt.Errorf("wait for an interrupt, device status %#x: %w; the device: %w", d.Reg(RegStatus), context.Cause(ctx), d.Transport.Err())
	}
}

// Idle waits until the worker has done what it was rung for, if there is one: a device that needs a reset and was
// restored so has none.
func (d *Driver) Idle() {
	if d.Reg(RegStatus)&(DriverOK|NeedsReset) == DriverOK {
		d.bell.Idle()
	}
}

func (d *Driver) ack() uint32 {
	status := d.Reg(RegInterruptStatus)
	d.SetReg(RegInterruptACK, status)
	return status
}
