package main

import (
	"errors"
	"fmt"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/cryovisor/cryovisor/blockdev"
	"github.com/cryovisor/cryovisor/confine"
	"github.com/cryovisor/cryovisor/lifecycle"
	"github.com/cryovisor/cryovisor/server"
)

// confineFlag is the flag of verbs that run guests.
type confineFlag struct{ on bool }

func (c *confineFlag) add(cmd *cobra.Command) {
	cmd.Flags().BoolVar(&c.on, "confine", true,
		"before a guest runs, give up what that does not need: other files, other programs, the network; =false to turn it off (not done where a recipient is a plugin)")
}

// apply confines this process, unless the user does not want that. Where Landlock is missing it goes on without, and has say tell of it.
func (c *confineFlag) apply(r confine.Rules, say func(format string, args ...any)) error {
	if !c.on {
		return nil
	}
	level, err := confine.Apply(r)
	if errors.Is(err, confine.ErrUnsupported) {
		return fmt.Errorf("%w; with --confine=false the guest runs without", err)
	}
	if err == nil && level.Landlock == 0 {
		say("this kernel has no Landlock, or it is not turned on: system calls are confined, files are not")
	}
	return err
}

// managerFiles are what a Manager and its sandboxes use of a data directory once it is open.
func managerFiles(data string, m *lifecycle.Manager) ([]string, error) {
	run, err := server.MakeRunDir(data)
	if err != nil {
		return nil, err
	}
	files, err := m.Files()
	return append(files, run), err
}

// allowDisks adds what is read and written when machines with these disks are booted.
func allowDisks(r *confine.Rules, disks []lifecycle.Disk) error {
	for _, d := range disks {
		if d.Image != "" {
			r.ReadOnly = append(r.ReadOnly, d.Image)
		}
		if d.Overlay == "" {
			continue
		}
		info, err := blockdev.ReadOverlay(d.Overlay)
		if err != nil {
			return err
		}
		if info.Lower.Kind == lifecycle.LowerImage {
			r.ReadOnly = append(r.ReadOnly, info.Lower.Name)
		}
		r.ReadWrite = append(r.ReadWrite, d.Overlay)
		r.Remove = append(r.Remove, filepath.Dir(d.Overlay)) // when a snapshot has what is in it
	}
	return nil
}
