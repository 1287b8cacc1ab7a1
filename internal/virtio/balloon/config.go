package balloon

import (
	"encoding/binary"

	"github.com/cryovisor/cryovisor/internal/virtio"
)

// The config space (section 5.5.4), little-endian: num_pages, actual. The fields after them belong to features
// that are not offered.
const (
	configActual = 4
	configSize   = 8
)

// stateVersion is the first byte of a saved state. num_pages, the num_pages that the driver was told of, and actual
// follow, 4 bytes each, little-endian.
const (
	stateVersion = 1
	stateSize    = 1 + 3*4
)

// config is the config space. d.mu is held.
func (d *Device) config() (b [configSize]byte) {
	binary.LittleEndian.PutUint32(b[:], d.target)
	binary.LittleEndian.PutUint32(b[configActual:], d.actual)
	return b
}

// ReadConfig implements virtio.Device.
func (d *Device) ReadConfig(off uint64, p []byte) {
	d.mu.Lock()
	defer d.mu.Unlock()
	clear(p)
	if b := d.config(); off < configSize {
		copy(p, b[off:])
	}
}

// WriteConfig implements virtio.Device. Only actual is the driver's to write (section 5.5.4).
func (d *Device) WriteConfig(off uint64, p []byte) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if b := d.config(); off < configSize {
		copy(b[off:], p)
		d.actual = binary.LittleEndian.Uint32(b[configActual:])
	}
}

// Save implements virtio.Device.
func (d *Device) Save() ([]byte, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	b := []byte{stateVersion}
	for _, v := range []uint32{d.target, d.announced, d.actual} {
		b = binary.LittleEndian.AppendUint32(b, v)
	}
	return b, nil
}

// Restore implements virtio.Device. The saved target takes the place of one that was set before.
func (d *Device) Restore(state []byte) error {
	if len(state) != stateSize || state[0] != stateVersion {
		return virtio.StateErrorf("%d bytes of a balloon that begin with %x: want version %d, %d bytes",
			len(state), state[:min(1, len(state))], stateVersion, stateSize)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.target = binary.LittleEndian.Uint32(state[1:])
	d.announced = binary.LittleEndian.Uint32(state[5:])
	d.actual = binary.LittleEndian.Uint32(state[9:])
	return nil
}
