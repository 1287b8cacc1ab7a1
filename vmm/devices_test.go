package vmm

import (
	"errors"
	"net"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/cryovisor/cryovisor/blockdev"
)

// noDisk is a disk that nothing is asked of.
type noDisk struct{ blockdev.Device }

func fullHardware() Hardware {
	return Hardware{
		Disks: []Disk{{Name: "root", Device: noDisk{}}, {Name: "data", Device: noDisk{}}},
		NICs:  []NIC{{Name: "eth0", Tap: os.Stdin, MAC: net.HardwareAddr{2, 0, 0, 0, 0, 1}}},
		Vsock: &Vsock{CID: 3, Path: "sandbox.sock"},
	}
}

func TestRoster(t *testing.T) {
	hw := fullHardware()
	places, err := hw.roster(true)
	if err != nil {
		t.Fatal(err)
	}
	want := []place{{"disk/root", 0}, {"disk/data", 1}, {"nic/eth0", 2}, {"vsock", 3}, {"rng", 4}, {"balloon", 5}}
	if !slices.Equal(places, want) {
		t.Errorf("%v, want %v", places, want)
	}
	if places, err := (&Hardware{}).roster(false); len(places) != 0 || err != nil {
		t.Errorf("a machine that asks for nothing has %v, %v", places, err)
	}
}

func TestHardwareRefused(t *testing.T) {
	for name, change := range map[string]func(*Hardware){
		"disk without a name":    func(h *Hardware) { h.Disks[0].Name = "" },
		"disk name with a slash": func(h *Hardware) { h.Disks[0].Name = "a/b" },
		"long disk name":         func(h *Hardware) { h.Disks[0].Name = strings.Repeat("a", 33) },
		"two disks of a name":    func(h *Hardware) { h.Disks[0].Name = "data" },
		"disk without a device":  func(h *Hardware) { h.Disks[1].Device = nil },
		"tap missing":            func(h *Hardware) { h.NICs[0].Tap = nil },
		"MAC of 8 bytes":         func(h *Hardware) { h.NICs[0].MAC = make(net.HardwareAddr, 8) },
		"reserved CID":           func(h *Hardware) { h.Vsock.CID = 2 },
		"vsock without a path":   func(h *Hardware) { h.Vsock.Path = "" },
		"too many disks": func(h *Hardware) {
			for len(h.Disks) < maxVirtio {
				h.Disks = append(h.Disks, Disk{Name: "d" + strings.Repeat("x", len(h.Disks)), Device: noDisk{}})
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			hw := fullHardware()
			change(&hw)
			if _, err := hw.roster(true); !errors.Is(err, ErrConfig) {
				t.Errorf("%v, want ErrConfig", err)
			}
		})
	}
}

// TestHardwareMatches: what a guest was booted with, no less and no more, in any order.
func TestHardwareMatches(t *testing.T) {
	hw := fullHardware()
	places, err := hw.roster(true)
	if err != nil {
		t.Fatal(err)
	}
	slices.Reverse(hw.Disks)
	if err := hw.matches(places); err != nil {
		t.Error("in another order: ", err)
	}
	for name, change := range map[string]func(*Hardware){
		"disk missing":    func(h *Hardware) { h.Disks = h.Disks[1:] },
		"disk of another": func(h *Hardware) { h.Disks[0].Name = "other" },
		"a disk more":     func(h *Hardware) { h.Disks = append(h.Disks, Disk{Name: "more", Device: noDisk{}}) },
		"no vsock":        func(h *Hardware) { h.Vsock = nil },
		"no network":      func(h *Hardware) { h.NICs = nil },
	} {
		t.Run(name, func(t *testing.T) {
			hw := fullHardware()
			change(&hw)
			if err := hw.matches(places); !errors.Is(err, ErrConfig) {
				t.Errorf("%v, want ErrConfig", err)
			}
		})
	}
}
