package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"github.com/cryovisor/cryovisor/blockdev"
	"github.com/cryovisor/cryovisor/blockdev/qcow2"
	"github.com/cryovisor/cryovisor/lifecycle"
	"github.com/cryovisor/cryovisor/snapshot"
)

func newDiskCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "disk",
		Short: "Make disks for guests, look at those of snapshots, and get them out",
		Long: `A guest's disk is an image that is never written, and what the guest has changed: while it
runs, in a file that is not encrypted; when it is paused, in the snapshot. Any
number of guests and snapshots share an image, which must stay as it is.`,
	}
	cmd.AddCommand(newDiskCreateCommand(), newDiskShowCommand(), newDiskExportCommand(), newDiskCompactCommand())
	return cmd
}

func newDiskCreateCommand() *cobra.Command {
	var (
		dir         diskDirFlag
		image, size string
	)
	cmd := &cobra.Command{
		Use:   "create FILE",
		Short: "Make a disk that is as an image is, or blank",
		Long: `Make a file for 'run --disk-overlay NAME=FILE': it holds what guests change on the disk, and nothing
yet. A guest that powers off leaves its changes in it, for the next one. A pause moves
them to the snapshot, encrypted, and removes the file.

Without this, 'run --disk NAME=IMAGE' makes such a file for the guest that it boots.`,
		Example: "  cryovisor disk create root.disk --image debian-12.qcow2 --size 20GiB\n  cryovisor disk create data.disk --size 1TiB",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			disk := lifecycle.Disk{Image: image}
			var err error
			if size != "" {
				if disk.Size, err = parseSize("--size", size); err != nil {
					return err
				}
			} else if image == "" {
				return errors.New("give --image, --size, or both")
			}
			identities, err := dir.path()
			if err != nil {
				return err
			}
			return lifecycle.CreateOverlay(cmd.Context(), args[0], disk, identities)
		},
	}
	cmd.Flags().StringVar(&image, "image", "", "image under the disk: raw, qcow2 without a backing file, or a block device")
	cmd.Flags().StringVar(&size, "size", "", "size of the disk, not less than the image's (default: the image's)")
	dir.add(cmd)
	return cmd
}

// diskSource is the flags of verbs that read disks.
type diskSource struct {
	store storeFlag
	keys  keyFlags
}

func (s *diskSource) add(cmd *cobra.Command) {
	s.store.add(cmd)
	s.keys.addIdentity(cmd)
}

// open opens a snapshot.
func (s *diskSource) open(ctx context.Context, name string) (*snapshot.Reader, error) {
	store, id, err := s.store.find(name)
	if err != nil {
		return nil, err
	}
	ids, err := s.keys.identities()
	if err != nil {
		return nil, err
	}
	return store.Open(ctx, id, ids...)
}

func newDiskShowCommand() *cobra.Command {
	var (
		source diskSource
		asJSON bool
	)
	cmd := &cobra.Command{
		Use:   "show SNAPSHOT|FILE",
		Short: "Show the disks of a snapshot, their layers and sizes, or a disk file",
		Long: `Show the disks of a snapshot: the image under each, and how much of the disk which snapshot
of its history has stored. Or show a file that 'disk create' or a guest has made.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			disks, err := showDisks(cmd.Context(), &source, args[0])
			if err != nil {
				return err
			}
			if asJSON {
				enc := json.NewEncoder(cmd.OutOrStdout())
				enc.SetIndent("", "  ")
				return enc.Encode(disks)
			}
			return printDisks(cmd.OutOrStdout(), disks)
		},
	}
	source.add(cmd)
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

// shownDisk is what show says of a disk.
type shownDisk struct {
	lifecycle.DiskInfo
	Held   uint64               `json:"held"` // bytes in the snapshot's layers
	Layers []snapshot.LayerInfo `json:"layers,omitempty"`
	On     string               `json:"on,omitempty"` // what a disk file lies on
}

func showDisks(ctx context.Context, source *diskSource, name string) ([]shownDisk, error) {
	if info, err := blockdev.ReadOverlay(name); err == nil {
		on := strings.TrimSpace(info.Lower.Kind + " " + info.Lower.Name)
		return []shownDisk{{DiskInfo: lifecycle.DiskInfo{Name: name, Size: info.Size}, On: on}}, nil
	}
	r, err := source.open(ctx, name)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	infos, err := lifecycle.DisksOf(r)
	if err != nil {
		return nil, err
	}
	disks := []shownDisk{}
	for i, info := range infos {
		disk := shownDisk{DiskInfo: info, Layers: r.Disk(i).Layers()}
		for _, l := range disk.Layers {
			disk.Held += l.Blocks * snapshot.PageSize
		}
		disks = append(disks, disk)
	}
	return disks, nil
}

func printDisks(out io.Writer, disks []shownDisk) error {
	w := tabwriter.NewWriter(out, 0, 8, 2, ' ', 0)
	for _, d := range disks {
		fmt.Fprintf(w, "%s\t%s\n", d.Name, humanize.IBytes(uint64(d.Size)))
		for _, l := range d.Layers {
			fmt.Fprintf(w, "  snapshot %v\t%s in %d chunks of %s\n", l.Origin,
				humanize.IBytes(l.Blocks*snapshot.PageSize), l.Chunks, humanize.IBytes(l.Stored))
		}
		switch {
		case d.Base != nil:
			fmt.Fprintf(w, "  image %s\t%s, sha256 %s\n", d.Base.Path, humanize.IBytes(uint64(d.Base.Size)), d.Base.SHA256)
		case d.On != "":
			fmt.Fprintf(w, "  %s\n", d.On)
		default:
			fmt.Fprintf(w, "  zeros\n")
		}
	}
	return w.Flush()
}

func newDiskExportCommand() *cobra.Command {
	var (
		source              diskSource
		dir                 diskDirFlag
		name, image, format string
	)
	cmd := &cobra.Command{
		Use:   "export SNAPSHOT|FILE OUTPUT",
		Short: "Write a disk to an image that any program can read",
		Long: `Write all of a disk, with the image under it, to a new raw or qcow2 image. The disk is one of a
snapshot, or that of a file that 'disk create' or a guest that was not paused has left.

The image is not encrypted. The memory of a snapshot is exported by 'export'.`,
		Example: "  cryovisor disk export 3f9a root.img\n  cryovisor disk export --disk data --format qcow2 3f9a data.qcow2",
		Args:    cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			if format != "raw" && format != "qcow2" {
				return fmt.Errorf("--format %q: want raw or qcow2", format)
			}
			opts := lifecycle.OpenDiskOptions{Image: image}
			var err error
			if opts.Dir, err = dir.path(); err != nil {
				return err
			}
			disk, done, err := openDisk(cmd.Context(), &source, args[0], name, opts)
			if err != nil {
				return err
			}
			bar := newProgress(cmd.ErrOrStderr(), "exporting")
			if format == "qcow2" {
				err = qcow2.Write(cmd.Context(), args[1], disk)
			} else {
				err = blockdev.Export(cmd.Context(), args[1], disk, func(done, total int64) { bar.update(uint64(done), uint64(total)) })
			}
			bar.finish()
			return errors.Join(err, done())
		},
	}
	source.add(cmd)
	dir.add(cmd)
	cmd.Flags().StringVar(&name, "disk", "", "the disk, if the snapshot has several")
	cmd.Flags().StringVar(&image, "image", "", "where the image under the disk is now (default: where it was)")
	cmd.Flags().StringVar(&format, "format", "raw", "raw or qcow2")
	return cmd
}

// openDisk opens the disk of a disk file or of a snapshot; done gives it back.
func openDisk(
	ctx context.Context, source *diskSource, from, name string, opts lifecycle.OpenDiskOptions,
) (disk *lifecycle.OpenedDisk, done func() error, err error) {
	info, err := blockdev.ReadOverlay(from)
	if err == nil {
		if info.Lower.Kind == lifecycle.LowerSnapshot {
			if opts.Store, err = source.store.open(); err != nil {
				return nil, nil, err
			}
			if opts.Identities, err = source.keys.identities(); err != nil {
				return nil, nil, err
			}
		}
		disk, err = lifecycle.OpenOverlay(ctx, from, opts)
		if err != nil {
			return nil, nil, err
		}
		return disk, disk.Close, nil
	}
	r, err := source.open(ctx, from)
	if err != nil {
		return nil, nil, err
	}
	if name, err = chooseDisk(r, name); err == nil {
		disk, err = lifecycle.OpenDisk(ctx, r, name, opts)
	}
	if err != nil {
		return nil, nil, errors.Join(err, r.Close())
	}
	return disk, func() error { return errors.Join(disk.Close(), r.Close()) }, nil
}

// chooseDisk is the disk that the user named, or the only one.
func chooseDisk(r *snapshot.Reader, name string) (string, error) {
	if name != "" {
		return name, nil
	}
	infos, err := lifecycle.DisksOf(r)
	if err != nil {
		return "", err
	}
	if len(infos) == 1 {
		return infos[0].Name, nil
	}
	var names []string
	for _, d := range infos {
		names = append(names, d.Name)
	}
	if len(names) == 0 {
		return "", fmt.Errorf("snapshot %v has no disk: %w", r.Header().ID, snapshot.ErrNotFound)
	}
	return "", fmt.Errorf("choose one of the disks with --disk: %s", strings.Join(names, ", "))
}

func newDiskCompactCommand() *cobra.Command {
	var source diskSource
	cmd := &cobra.Command{
		Use:   "compact SNAPSHOT",
		Short: "Copy a snapshot so that it depends on no other",
		Long: `Copy a snapshot, its memory and its disks, to a new one in the same store that has one layer
for all of its history and needs none of its ancestors. Images under the disks stay
there. The id of the copy is printed; the snapshot stays too.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			to, err := source.keys.encryptTo()
			if err != nil {
				return err
			}
			store, _, err := source.store.find(args[0])
			if err != nil {
				return err
			}
			r, err := source.open(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			defer r.Close()
			info, err := store.Flatten(cmd.Context(), r, snapshot.Options{Recipients: to})
			if err != nil {
				return err
			}
			fmt.Fprintln(cmd.OutOrStdout(), info.ID)
			return nil
		},
	}
	source.add(cmd)
	source.keys.addRecipients(cmd, orOwn)
	return cmd
}
