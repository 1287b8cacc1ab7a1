package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"github.com/cryovisor/cryovisor/lifecycle"
)

const disksEnv = "CRYOVISOR_DISKS"

// diskDirFlag is the flag of verbs that use the directory for running disks.
type diskDirFlag struct{ dir string }

func (d *diskDirFlag) add(cmd *cobra.Command) {
	cmd.Flags().StringVar(&d.dir, "disk-dir", "",
		"directory for what guests write to their disks while they run, not encrypted (default $"+disksEnv+", else .local/state/cryovisor/disks in your home directory)")
}

func (d *diskDirFlag) path() (string, error) {
	if d.dir != "" {
		return d.dir, nil
	}
	if dir := os.Getenv(disksEnv); dir != "" {
		return dir, nil
	}
	home, err := os.UserHomeDir()
	return filepath.Join(home, ".local", "state", "cryovisor", "disks"), err
}

// diskFlags are the flags of verbs that run a guest with copy-on-write disks.
type diskFlags struct {
	dir             diskDirFlag
	images, overlay []string
	blank           []string
}

// addBoot adds the flags that name the disks of a guest that is booted.
func (d *diskFlags) addBoot(cmd *cobra.Command) {
	d.dir.add(cmd)
	d.addNew(cmd)
}

// addNew adds those that name disks, for a verb that has a directory of its own for what guests write.
func (d *diskFlags) addNew(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringArrayVar(&d.images, "disk", nil, "a disk that pauses store, as NAME=FILE of an image (raw, qcow2) that is never written; once for each")
	f.StringArrayVar(&d.overlay, "disk-overlay", nil, "a disk that pauses store, as NAME=FILE of a file that 'disk create' or an earlier guest made")
	f.StringArrayVar(&d.blank, "disk-blank", nil, "a blank disk that pauses store, as NAME=SIZE")
}

// addResume adds the flags of a resume, which knows the disks.
func (d *diskFlags) addResume(cmd *cobra.Command) {
	d.dir.add(cmd)
	cmd.Flags().StringArrayVar(&d.images, "image", nil, "where the image under a disk is now, as NAME=FILE (default: where it was)")
}

// boot is what the flags say of the disks of a guest that is booted.
func (d *diskFlags) boot() (lifecycle.Disks, error) {
	out := lifecycle.Disks{}
	for _, arg := range d.images {
		name, file, err := cutName("--disk", arg, "FILE")
		if err != nil {
			return out, err
		}
		out.Boot = append(out.Boot, lifecycle.Disk{Name: name, Image: file})
	}
	for _, arg := range d.overlay {
		name, file, err := cutName("--disk-overlay", arg, "FILE")
		if err != nil {
			return out, err
		}
		out.Boot = append(out.Boot, lifecycle.Disk{Name: name, Overlay: file})
	}
	for _, arg := range d.blank {
		name, text, err := cutName("--disk-blank", arg, "SIZE")
		if err != nil {
			return out, err
		}
		size, err := parseSize("--disk-blank", text)
		if err != nil {
			return out, err
		}
		out.Boot = append(out.Boot, lifecycle.Disk{Name: name, Size: size})
	}
	var err error
	if len(out.Boot) > 0 {
		out.Dir, err = d.dir.path()
	}
	return out, err
}

// resume is what the flags say of the disks of a guest that is resumed.
func (d *diskFlags) resume() (lifecycle.Disks, error) {
	out := lifecycle.Disks{Images: map[string]string{}}
	for _, arg := range d.images {
		name, file, err := cutName("--image", arg, "FILE")
		if err != nil {
			return out, err
		}
		out.Images[name] = file
	}
	var err error
	out.Dir, err = d.dir.path()
	return out, err
}

// cutName takes NAME=VALUE apart.
func cutName(flag, arg, what string) (name, value string, err error) {
	name, value, ok := strings.Cut(arg, "=")
	if !ok || value == "" {
		return "", "", fmt.Errorf("%s %q: want NAME=%s", flag, arg, what)
	}
	return name, value, nil
}

// parseSize parses the size of a disk.
func parseSize(flag, text string) (int64, error) {
	n, err := humanize.ParseBytes(text)
	if err != nil || n == 0 || n > 1<<48 {
		return 0, fmt.Errorf("%s %q: want a size such as 10GiB", flag, text)
	}
	return int64(n), nil
}
