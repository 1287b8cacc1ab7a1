package main

import (
	"encoding/json"
	"fmt"
	"io"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"github.com/cryovisor/cryovisor/snapshot"
)

// statusDamaged is the exit status of verify when it found damage.
const statusDamaged = 2

func newVerifyCommand() *cobra.Command {
	var (
		store  storeFlag
		keys   keyFlags
		asJSON bool
	)
	cmd := &cobra.Command{
		Use:   "verify SNAPSHOT",
		Short: "Read every byte of a snapshot and say what is damaged",
		Long: `Read, decrypt and decompress all that a snapshot consists of, the packs that it
shares with its ancestors included, and say what is damaged and which ranges of
the guest's memory and disks are lost by it. The exit status is 0 if nothing is, 2 if
something is, and 1 if that could not be found out.

SNAPSHOT is an id, the beginning of one, or the path of a manifest (*.cryo).`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			s, id, err := store.find(args[0])
			if err != nil {
				return err
			}
			ids, err := keys.identities()
			if err != nil {
				return err
			}
			r, err := s.Open(cmd.Context(), id, ids...)
			if err != nil {
				return err
			}
			defer r.Close()
			bar := newProgress(cmd.ErrOrStderr(), "verifying")
			report, err := r.Verify(cmd.Context(), bar.update)
			bar.finish()
			if err != nil {
				return err
			}
			return printVerification(cmd.OutOrStdout(), id, report, asJSON)
		},
	}
	store.add(cmd)
	keys.addIdentity(cmd)
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

type damageInfo struct {
	Pack   snapshot.ID      `json:"pack"`
	Path   string           `json:"path"`
	Chunk  int64            `json:"chunk"`
	Ranges []snapshot.Range `json:"ranges"`
	Error  string           `json:"error"`
}

func printVerification(out io.Writer, id snapshot.ID, r *snapshot.Report, asJSON bool) error {
	var damage []damageInfo
	for _, d := range r.Damage {
		damage = append(damage, damageInfo{d.Pack, d.Path, d.Chunk, d.Ranges, d.Err.Error()})
	}
	if asJSON {
		err := json.NewEncoder(out).Encode(map[string]any{
			"snapshot": id, "packs": r.Packs, "chunks": r.Chunks, "bytes": r.Bytes, "damage": damage,
		})
		if err != nil {
			return err
		}
	} else {
		for _, d := range damage {
			fmt.Fprintf(out, "damaged: %s", d.Error)
			for _, g := range d.Ranges {
				what := "guest memory"
				if g.GPA >= snapshot.DiskStride {
					what = fmt.Sprintf("disk %d, bytes", g.GPA/snapshot.DiskStride-1)
					g.GPA %= snapshot.DiskStride
				}
				fmt.Fprintf(out, "\n  lost: %s %#x-%#x", what, g.GPA, g.GPA+g.Len-1)
			}
			fmt.Fprintln(out)
		}
		fmt.Fprintf(out, "%v: %d packs, %d chunks, %s read, %d damaged\n", id, r.Packs, r.Chunks, humanize.IBytes(r.Bytes), len(damage))
	}
	if len(damage) > 0 {
		return fmt.Errorf("snapshot %v is damaged: %w", id, exitStatus(statusDamaged))
	}
	return nil
}
