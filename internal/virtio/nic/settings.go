package nic

import (
	"encoding/binary"
	"fmt"

	"github.com/cryovisor/cryovisor/internal/virtio"
)

// The config space (section 5.1.4): MAC address (6 bytes), status (2), MTU (2). Between the
// last two is the number of queue pairs (2), a field of a feature that is not offered.
const (
	configSize   = 12
	configStatus = 6
	configMTU    = 10

	statusLinkUp   = 1 // VIRTIO_NET_S_LINK_UP
	statusAnnounce = 2 // VIRTIO_NET_S_ANNOUNCE
)

// settings is what the config space is made of, besides the link.
type settings struct {
	mac      [6]byte
	mtu      uint16
	features virtio.Feature // that were negotiated, once the driver is ready
	announce bool           // the device was restored, and the driver has not acknowledged that
}

func (s *settings) check() error {
	switch {
	case s.mac == [6]byte{} || s.mac[0]&1 != 0:
		return fmt.Errorf("MAC address %x is zero or a group's", s.mac)
	case s.mtu < minMTU:
		return fmt.Errorf("MTU %d is below %d", s.mtu, minMTU)
	}
	return nil
}

// ReadConfig copies the config space at off.
func (d *Device) ReadConfig(off uint64, p []byte) {
	var b [configSize]byte
	d.mu.Lock()
	s, up := d.cfg, d.link == nil
	d.mu.Unlock()
	copy(b[:], s.mac[:])
	var status uint16
	if up {
		status |= statusLinkUp
	}
	if s.announce && s.features&announceFeatures == announceFeatures {
		status |= statusAnnounce
	}
	binary.LittleEndian.PutUint16(b[configStatus:], status)
	binary.LittleEndian.PutUint16(b[configMTU:], s.mtu)
	clear(p)
	if off < configSize {
		copy(p, b[off:])
	}
}

// WriteConfig ignores the write: nothing is writable but to legacy drivers.
func (d *Device) WriteConfig(uint64, []byte) {}

// The saved state: version (1 byte), MAC address (6), MTU (2). Whatever else the driver can notice is new in a
// restored device.
const (
	stateVersion = 1
	stateSize    = 9
)

// Save returns what the driver believes of the device.
func (d *Device) Save() ([]byte, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	b := append([]byte{stateVersion}, d.cfg.mac[:]...)
	return binary.LittleEndian.AppendUint16(b, d.cfg.mtu), nil
}

// Restore makes the device that of a driver that may be on another network now.
func (d *Device) Restore(state []byte) error {
	if len(state) != stateSize || state[0] != stateVersion {
		return virtio.StateErrorf("a network device's state has version %d and %d bytes, this is %x",
			stateVersion, stateSize, state[:min(len(state), stateSize)])
	}
	s := settings{mac: [6]byte(state[1:7]), mtu: binary.LittleEndian.Uint16(state[7:]), announce: true}
	if err := s.check(); err != nil {
		return virtio.StateErrorf("network device: %v", err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.cfg = s
	return nil
}
