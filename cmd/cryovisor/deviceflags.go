package main

import (
	"errors"
	"fmt"
	"net"
	"os"

	"github.com/spf13/cobra"

	"github.com/cryovisor/cryovisor/blockdev"
	"github.com/cryovisor/cryovisor/vmm"
)

// deviceFlags are the flags that name what is behind a guest's devices. At a resume they name it again.
type deviceFlags struct {
	rw, readOnly    []string
	disks           diskFlags
	tap, mac, vsock string
	overcommit      bool
	advance         bool

	opened []*blockdev.File
	tapFD  *os.File
}

// The names of devices that have none on the command line, and the guest's address.
const (
	nicName  = "eth0"
	guestCID = 3
)

func (d *deviceFlags) add(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringArrayVar(&d.rw, "disk-rw", nil, "a raw image that the guest writes to and that pauses don't store, as NAME=FILE; once for each")
	f.StringArrayVar(&d.readOnly, "disk-ro", nil, "a raw image that the guest can only read, as NAME=FILE")
	f.StringVar(&d.tap, "tap", "", "network: an existing tap interface that you may use")
	f.StringVar(&d.mac, "mac", "02:00:00:00:00:01", "the network device's address; a resumed guest keeps its own")
	f.StringVar(&d.vsock, "vsock", "", "a path for the unix socket of the guest's vsock")
	f.BoolVar(&d.overcommit, "overcommit", false, "allow more guest memory than the host has")
}

// addBoot adds the flags of a verb that boots.
func (d *deviceFlags) addBoot(cmd *cobra.Command) {
	d.add(cmd)
	d.disks.addBoot(cmd)
}

// addResume adds the flags of a verb that resumes.
func (d *deviceFlags) addResume(cmd *cobra.Command) {
	d.add(cmd)
	d.disks.addResume(cmd)
	cmd.Flags().BoolVar(&d.advance, "advance-clock", true, "move the guest's clocks on by the time for which it was paused")
}

// hardware opens what the flags name; the caller closes it with close.
func (d *deviceFlags) hardware() (vmm.Hardware, error) {
	hw := vmm.Hardware{AllowOvercommit: d.overcommit, AdvanceClock: d.advance}
	err := d.open(&hw)
	if err != nil {
		err = errors.Join(err, d.close())
	}
	return hw, err
}

func (d *deviceFlags) open(hw *vmm.Hardware) error {
	for _, list := range []struct {
		flag     string
		disks    []string
		readOnly bool
	}{{"--disk-rw", d.rw, false}, {"--disk-ro", d.readOnly, true}} {
		for _, arg := range list.disks {
			name, file, err := cutName(list.flag, arg, "FILE")
			if err != nil {
				return err
			}
			disk, err := blockdev.OpenFile(file, blockdev.Options{ReadOnly: list.readOnly})
			if err != nil {
				return err
			}
			d.opened = append(d.opened, disk)
			hw.Disks = append(hw.Disks, vmm.Disk{Name: name, Device: disk})
		}
	}
	if d.vsock != "" {
		hw.Vsock = &vmm.Vsock{CID: guestCID, Path: d.vsock}
	}
	if d.tap == "" {
		return nil
	}
	mac, err := net.ParseMAC(d.mac)
	if err != nil {
		return fmt.Errorf("--mac: %w", err)
	}
	if d.tapFD, err = vmm.OpenTap(d.tap); err != nil {
		return err
	}
	hw.NICs = []vmm.NIC{{Name: nicName, Tap: d.tapFD, MAC: mac}}
	return nil
}

func (d *deviceFlags) close() error {
	var errs []error
	for _, disk := range d.opened {
		errs = append(errs, disk.Close())
	}
	if d.tapFD != nil {
		errs = append(errs, d.tapFD.Close())
	}
	d.opened, d.tapFD = nil, nil
	return errors.Join(errs...)
}
