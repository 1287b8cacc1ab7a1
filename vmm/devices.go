package vmm

import (
	"fmt"
	"net"
	"os"
	"strings"

	"github.com/cryovisor/cryovisor/blockdev"
)

// Disk is a virtio block device.
type Disk struct {
	// Name identifies the disk in a State: at most 32 letters, digits, '-', '_'
	// and '.', unlike that of every other disk.
	Name string
	// Device is what is on the disk. It stays the caller's, who closes it after the
	// VM. When a Pause has returned without an error, all that the guest has
	// written is on it, durably unless it is Captured, and nothing is written before
	// Resume.
	Device blockdev.Device
	// Serial is the serial number that the guest reads, at most 20 bytes; Name, as
	// much of it as fits, if it is empty.
	Serial string
	// OnError, if not nil, is told of every operation of Device that failed; the
	// guest learns only that one did. It is called from several goroutines.
	OnError func(error)
	// Captured says that the caller stores what is on the disk with the State, so that
	// a Pause need not wait until it is durable on Device.
	Captured bool
}

// NIC is a virtio network device.
type NIC struct {
	// Name identifies the device in a State; the rule is that of Disk.Name.
	Name string
	// Tap is a descriptor of /dev/net/tun, attached to an interface with IFF_TAP,
	// IFF_NO_PI and IFF_VNET_HDR. The VM turns offloads off, makes it non-blocking
	// and uses a duplicate; this one stays the caller's. Frames that are in the tap
	// or on their way when a machine is stored are lost, as on any network; a
	// resumed guest announces itself to its neighbours.
	Tap *os.File
	// MAC is the device's address, 6 bytes. A resumed guest keeps the one that it
	// was booted with.
	MAC net.HardwareAddr
	// MTU is the longest packet in a frame, in bytes, from 68; 0 means 1500.
	MTU uint16
}

// Vsock is a virtio socket device: stream sockets between the guest and unix
// sockets of the host. A program on the host reaches the guest's port P when it
// connects to Path, writes "CONNECT P\n" and reads "OK <its own port>\n". A
// connection of the guest's to port P of CID 2, the host, arrives at the unix
// socket whose path is Path, "_" and P. (Firecracker's convention.)
type Vsock struct {
	// CID is the guest's address, 3 or above. It may change at a resume.
	CID uint32
	// Path is where to listen. The VM makes the socket, for the user alone, and
	// removes it.
	Path string
}

// Kinds of virtio devices, which begin their names in a State: the kind alone, or
// the kind, a slash and the name that the embedder gave.
const (
	kindEntropy = "rng"
	kindBalloon = "balloon"
	kindVsock   = "vsock"
	kindDisk    = "disk"
	kindNIC     = "nic"
)

// place is a virtio device and its slot, which says where the guest finds it.
type place struct {
	name string
	slot uint32
}

// maxVirtio is how many virtio devices there may be: each has an interrupt of its own.
const maxVirtio = 18

// roster are the virtio devices of a new machine. A machine that boots Linux has
// a source of entropy and a balloon in any case.
func (h *Hardware) roster(linux bool) ([]place, error) {
	var names []string
	for _, d := range h.Disks {
		names = append(names, kindDisk+"/"+d.Name)
	}
	for _, n := range h.NICs {
		names = append(names, kindNIC+"/"+n.Name)
	}
	if h.Vsock != nil {
		names = append(names, kindVsock)
	}
	if linux {
		names = append(names, kindEntropy, kindBalloon)
	}
	if len(names) > maxVirtio {
		return nil, fmt.Errorf("%w: %d virtio devices; at most %d", ErrConfig, len(names), maxVirtio)
	}
	var places []place
	for i, name := range names {
		places = append(places, place{name, uint32(i)})
	}
	return places, h.checkDevices()
}

// checkDevices checks what the embedder says of each device.
func (h *Hardware) checkDevices() error {
	seen := map[string]bool{}
	for _, d := range h.Disks {
		if err := checkName(seen, kindDisk, d.Name); err != nil {
			return err
		}
		if d.Device == nil {
			return fmt.Errorf("%w: disk %q has no Device", ErrConfig, d.Name)
		}
	}
	for _, n := range h.NICs {
		if err := checkName(seen, kindNIC, n.Name); err != nil {
			return err
		}
		if n.Tap == nil || len(n.MAC) != 6 {
			return fmt.Errorf("%w: network device %q: want a Tap and a MAC of 6 bytes, it has %d", ErrConfig, n.Name, len(n.MAC))
		}
	}
	if v := h.Vsock; v != nil && (v.CID < 3 || v.Path == "") {
		return fmt.Errorf("%w: vsock with CID %d and path %q; want a CID of 3 or above, and a path", ErrConfig, v.CID, v.Path)
	}
	return nil
}

// CheckDiskName returns an error that wraps ErrConfig if name can't be Disk.Name.
func CheckDiskName(name string) error { return checkName(map[string]bool{}, kindDisk, name) }

func checkName(seen map[string]bool, kind, name string) error {
	const allowed = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_."
	key := kind + "/" + name
	switch {
	case name == "" || len(name) > 32 || strings.Trim(name, allowed) != "":
		return fmt.Errorf("%w: %s name %q; want 1 to 32 letters, digits, '-', '_' and '.'", ErrConfig, kind, name)
	case seen[key]:
		return fmt.Errorf("%w: two devices are %s %q", ErrConfig, kind, name)
	}
	seen[key] = true
	return nil
}

// matches says whether the embedder gave just what the devices of a State need.
func (h *Hardware) matches(places []place) error {
	if err := h.checkDevices(); err != nil {
		return err
	}
	given, err := h.roster(false)
	if err != nil {
		return err
	}
	have := map[string]bool{}
	for _, p := range places {
		have[p.name] = true
	}
	for _, p := range given {
		if !have[p.name] {
			return fmt.Errorf("%w: the guest was booted without the device %s; resume it without", ErrConfig, p.name)
		}
		delete(have, p.name)
	}
	for _, p := range places {
		if have[p.name] && p.name != kindEntropy && p.name != kindBalloon {
			return fmt.Errorf("%w: the guest has the device %s; give it in Hardware", ErrConfig, p.name)
		}
	}
	return nil
}
