//go:build linux && amd64

package vmm

import (
	"context"
	"errors"
	"fmt"
	"math"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/cryovisor/cryovisor/internal/acpi"
	"github.com/cryovisor/cryovisor/internal/kvm"
	"github.com/cryovisor/cryovisor/internal/virtio"
	"github.com/cryovisor/cryovisor/internal/virtio/balloon"
	"github.com/cryovisor/cryovisor/internal/virtio/blk"
	"github.com/cryovisor/cryovisor/internal/virtio/nic"
	"github.com/cryovisor/cryovisor/internal/virtio/rng"
	"github.com/cryovisor/cryovisor/internal/virtio/vsock"
	"github.com/cryovisor/cryovisor/memory"
)

// The registers of the virtio devices are in the 32-bit hole, a page for each
// slot; slot n has interrupt virtioGSI+n, up to 22. GSIs 0 to 4 are those of the
// timer, the keyboard, the PICs' cascade and the serial ports.
const (
	virtioBase   = 0xd0000000
	virtioStride = 0x1000
	virtioGSI    = 5
)

func (p place) base() uint64 { return virtioBase + virtioStride*uint64(p.slot) }
func (p place) gsi() uint32  { return virtioGSI + p.slot }

// virtioDevice is a virtio device in its place. A driver's notification goes from
// KVM to the transport's worker by an eventfd, and the worker's interrupt to KVM
// by another: no vCPU stops for either.
type virtioDevice struct {
	place
	transport *virtio.Transport
	irq       *virtio.EventFD
	traffic   func() uint64 // frames or packets so far; nil for a device that has none
}

// createVirtio makes the devices of a roster.
func (vm *VM) createVirtio(places []place) error {
	for _, p := range places {
		dev, err := vm.newVirtio(p)
		if err != nil {
			return fmt.Errorf("device %s: %w", p.name, err)
		}
		if err := vm.connect(p, dev); err != nil {
			return fmt.Errorf("device %s: %w", p.name, err)
		}
	}
	return nil
}

// newVirtio makes what is behind the registers at p.
func (vm *VM) newVirtio(p place) (virtio.Device, error) {
	kind, name, _ := strings.Cut(p.name, "/")
	switch kind {
	case kindEntropy:
		return rng.New(rng.Config{}), nil
	case kindBalloon:
		vm.balloon = balloon.New(balloon.Config{Memory: deviceMemory{vm}})
		return vm.balloon, nil
	case kindVsock:
		return configured(vsock.New(vsock.Config{CID: uint64(vm.hw.Vsock.CID), Path: vm.hw.Vsock.Path}))
	case kindDisk:
		for _, d := range vm.hw.Disks {
			if d.Name == name {
				return newDisk(d)
			}
		}
	case kindNIC:
		for _, n := range vm.hw.NICs {
			if n.Name == name {
				return newNIC(n)
			}
		}
	}
	return nil, stateErrorf(sectionDevice+p.name, "this program has no such device; update it")
}

func newDisk(d Disk) (virtio.Device, error) {
	serial := d.Serial
	if serial == "" {
		serial = d.Name[:min(len(d.Name), 20)]
	}
	return configured(blk.New(blk.Config{Disk: d.Device, Serial: serial, OnError: d.OnError, Captured: d.Captured}))
}

// configured blames the configuration for a device that could not be made.
func configured[D virtio.Device](dev D, err error) (virtio.Device, error) {
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrConfig, err)
	}
	return dev, nil
}

// newNIC gives the device a descriptor of its own, since it closes it.
func newNIC(n NIC) (virtio.Device, error) {
	conn, err := n.Tap.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("%w: tap: %w", ErrConfig, err)
	}
	fd, dupErr := -1, error(nil)
	err = conn.Control(func(orig uintptr) { fd, dupErr = unix.FcntlInt(orig, unix.F_DUPFD_CLOEXEC, 0) })
	if err = errors.Join(err, dupErr); err != nil {
		return nil, fmt.Errorf("%w: tap: %w", ErrConfig, err)
	}
	tap, err := nic.NewTap(fd)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrConfig, err)
	}
	dev, err := nic.New(nic.Config{Tap: tap, MAC: [6]byte(n.MAC), MTU: n.MTU})
	if err != nil {
		err = errors.Join(err, tap.Close())
	}
	return configured(dev, err)
}

// connect puts dev at p. It belongs to the VM then, also if it fails.
func (vm *VM) connect(p place, dev virtio.Device) error {
	bell, err := virtio.NewEventFD()
	if err != nil {
		return errors.Join(err, dev.Close())
	}
	irq, err := virtio.NewEventFD()
	if err != nil {
		return errors.Join(err, bell.Close(), dev.Close())
	}
	t, err := virtio.New(dev, virtio.Config{Memory: deviceMemory{vm}, Doorbell: bell, Interrupt: irq.Ring})
	if err != nil {
		return errors.Join(err, irq.Close())
	}
	vm.virtio = append(vm.virtio, &virtioDevice{place: p, transport: t, irq: irq, traffic: trafficOf(dev)})
	if err := vm.mmio.add(p.name, p.base(), p.base()+virtio.RegionSize-1, mmioRegisters{t}); err != nil {
		return err
	}
	notify := kvm.IOEvent{FD: bell.FD(), Addr: p.base() + virtio.NotifyOffset, Len: 4}
	if err := vm.kvm.IOEventFD(notify); err != nil {
		return err
	}
	return vm.kvm.IRQFD(irq.FD(), p.gsi())
}

// trafficOf is what counts the traffic of a network or socket device.
func trafficOf(dev virtio.Device) func() uint64 {
	switch dev := dev.(type) {
	case *nic.Device:
		return func() uint64 { s := dev.Stats(); return s.RxFrames + s.TxFrames }
	case *vsock.Device:
		return dev.Packets
	}
	return nil
}

// mmioRegisters is a transport on the bus.
type mmioRegisters struct{ t *virtio.Transport }

func (r mmioRegisters) read(off uint64, data []byte) { r.t.Read(off, data) }

func (r mmioRegisters) write(off uint64, data []byte) error {
	r.t.Write(off, data)
	return nil
}

// deviceMemory is guest memory as devices see it. When a page of it can't be had,
// the machine ends: the guest must not take that for a fault of the device.
type deviceMemory struct{ vm *VM }

func (d deviceMemory) ReadAt(p []byte, gpa int64) (int, error) {
	n, err := d.vm.mem.ReadAt(p, gpa)
	return n, d.check(err)
}

func (d deviceMemory) WriteAt(p []byte, gpa int64) (int, error) {
	n, err := d.vm.mem.WriteAt(p, gpa)
	return n, d.check(err)
}

func (d deviceMemory) Discard(gpa, n uint64) error { return d.check(d.vm.mem.Discard(gpa, n)) }

func (d deviceMemory) check(err error) error {
	if err == nil {
		return nil
	}
	if _, guests := errors.AsType[*memory.RangeError](err); !guests {
		d.vm.end(&ExitError{Kind: ErrGuestMemory, VCPU: -1, Detail: "for a device", Cause: err})
	}
	return err
}

// quiesce makes every device finish what it has taken on. If one can't, all go on.
func (vm *VM) quiesce(ctx context.Context) error {
	for _, d := range vm.virtio {
		if err := d.transport.Quiesce(ctx); err != nil {
			return fmt.Errorf("device %s: %w", d.name, err)
		}
	}
	return nil
}

// resumeDevices lets the devices work again.
func (vm *VM) resumeDevices() error {
	for _, d := range vm.virtio {
		if err := d.transport.Resume(); err != nil {
			return fmt.Errorf("device %s: %w", d.name, err)
		}
	}
	return nil
}

// closeVirtio ends the devices, when they have done what they are at. The list stays what it is, as Activity may be reading it.
func (vm *VM) closeVirtio() error {
	var errs []error
	for _, d := range vm.virtio {
		errs = append(errs, d.transport.Close(), d.irq.Close())
	}
	return errors.Join(errs...)
}

// Parts of the section of a virtio device.
const (
	tagSlot = 1 + iota
	tagTransport
)

const (
	virtioVersion = 1
	// transportLimit bounds the state of one device, in bytes.
	transportLimit = 1 << 20
)

// virtioState is a virtio device in a State.
type virtioState struct {
	slot      uint32
	transport []byte // virtio.State
}

func (s *virtioState) parts() []part {
	return []part{fixed(tagSlot, &s.slot), raw(tagTransport, &s.transport, transportLimit)}
}

func (vm *VM) saveVirtio() ([]DeviceState, error) {
	var out []DeviceState
	for _, d := range vm.virtio {
		state, err := d.transport.Save()
		if err != nil {
			return nil, fmt.Errorf("device %s: %w", d.name, err)
		}
		s := virtioState{slot: d.slot}
		if s.transport, err = state.MarshalBinary(); err != nil {
			return nil, fmt.Errorf("device %s: %w", d.name, err)
		}
		out = append(out, DeviceState{Name: d.name, Version: virtioVersion, Data: encodeParts(s.parts())})
	}
	return out, nil
}

// rosterOf is where the virtio devices of a State are, whose other devices it
// leaves out.
func rosterOf(devices []DeviceState) ([]place, error) {
	var places []place
	var taken [maxVirtio]bool
	for _, d := range devices {
		if d.Name == deviceSerial || d.Name == deviceGenID {
			continue
		}
		s, err := decodeVirtio(d)
		if err != nil {
			return nil, err
		}
		if s.slot >= maxVirtio || taken[s.slot] {
			return nil, stateErrorf(sectionDevice+d.Name, "slot %d", s.slot)
		}
		taken[s.slot] = true
		places = append(places, place{d.Name, s.slot})
	}
	return places, nil
}

func decodeVirtio(d DeviceState) (virtioState, error) {
	var s virtioState
	section := sectionDevice + d.Name
	if d.Version == 0 || d.Version > virtioVersion {
		return s, newerError(section, d.Version, virtioVersion)
	}
	return s, sectionError(section, decodeParts(d.Data, s.parts()))
}

// restoreVirtio sets the state of the device that newVM made for it.
func (vm *VM) restoreVirtio(d DeviceState) error {
	encoded, err := decodeVirtio(d)
	if err != nil {
		return err
	}
	section := sectionDevice + d.Name
	var state virtio.State
	if err := state.UnmarshalBinary(encoded.transport); err != nil {
		return virtioError(section, err)
	}
	for _, have := range vm.virtio {
		if have.name == d.Name {
			return virtioError(section, have.transport.Restore(state))
		}
	}
	return stateErrorf(section, "it was not made")
}

func virtioError(section string, err error) error {
	if newer, ok := errors.AsType[*virtio.StateVersionError](err); ok {
		return newerError(section, uint32(newer.Version), uint32(newer.Newest))
	}
	if err != nil {
		return stateErrorf(section, "%v", err)
	}
	return nil
}

// acpiVirtio is how the guest is told where its devices are.
func (vm *VM) acpiVirtio() []acpi.VirtioMMIO {
	var out []acpi.VirtioMMIO
	for _, d := range vm.virtio {
		out = append(out, acpi.VirtioMMIO{Base: uint32(d.base()), Size: virtio.RegionSize, GSI: d.gsi(), Trigger: acpi.Edge})
	}
	return out
}

// SetBalloon asks the guest to give up that much memory, in bytes, rounded down to
// whole pages. It does what it can, in its own time. The wish is part of the
// machine's state. ErrConfig: the machine has no balloon.
func (vm *VM) SetBalloon(bytes uint64) error {
	if vm.balloon == nil {
		return fmt.Errorf("%w: the machine has no balloon; one that boots Linux has", ErrConfig)
	}
	vm.balloon.SetTarget(uint32(min(bytes/balloon.PageSize, math.MaxUint32)))
	return nil
}

// Balloon returns how many bytes of memory the guest says it has given up at the
// wish of SetBalloon. What it gives up without being asked, because it is free, is
// not counted.
func (vm *VM) Balloon() uint64 {
	if vm.balloon == nil {
		return 0
	}
	return uint64(vm.balloon.Actual()) * balloon.PageSize
}
