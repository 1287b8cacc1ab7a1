package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"github.com/cryovisor/cryovisor/lifecycle"
)

func newExportCommand() *cobra.Command {
	var (
		source diskSource
		output string
		paging bool
		force  bool
	)
	cmd := &cobra.Command{
		Use:   "export SNAPSHOT -o FILE",
		Short: "Write a snapshot's memory and processors to a core file, for gdb and crash",
		Long: fmt.Sprintf(`Write the memory of a guest and the registers of its processors to an ELF core file, as QEMU's
dump-guest-memory does. gdb shows each processor as a thread; crash wants the guest's
vmlinux, with debug information, too. The guest need not be resumed.

In gdb, addresses are the guest's virtual ones, by the page tables that its processors
use; where two processors are in different processes, those of the first come first.
Guest physical address A is at %#x + A. With --paging=false, addresses are
physical, and page tables are not looked at. crash finds its way with either.

FILE is as long as the guest's memory, and takes as much room as is not zero. It is not
encrypted: it holds all that was in the guest's memory, keys and passwords included.

The disks of a snapshot are exported by 'disk export'.`, uint64(lifecycle.CorePhysical)),
		Example: "  cryovisor export 3f9a -o core.elf\n  gdb vmlinux core.elf            # without a vmlinux: gdb --core=core.elf\n  crash vmlinux core.elf",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			r, err := source.open(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			defer r.Close()
			bar := newProgress(cmd.ErrOrStderr(), "exporting")
			info, err := lifecycle.ExportCore(cmd.Context(), output, r, lifecycle.CoreOptions{
				Physical: !paging, Overwrite: force, Progress: bar.update,
			})
			bar.finish()
			if errors.Is(err, fs.ErrExist) {
				return fmt.Errorf("%w; choose another file, or replace it with --force", err)
			}
			if err != nil {
				return err
			}
			sayExported(cmd.ErrOrStderr(), output, info, paging)
			return nil
		},
	}
	source.add(cmd)
	cmd.Flags().StringVarP(&output, "output", "o", "", "file to write")
	cmd.Flags().BoolVar(&paging, "paging", true, "show memory at the guest's virtual addresses; =false: at physical ones")
	cmd.Flags().BoolVar(&force, "force", false, "replace FILE if it is there")
	_ = cmd.MarkFlagRequired("output") // it is there
	return cmd
}

// sayExported tells a person what is in a core.
func sayExported(w io.Writer, path string, info lifecycle.CoreInfo, paging bool) {
	addresses := fmt.Sprintf("ranges of virtual addresses: %d", info.Mappings)
	if info.Mappings == 0 {
		addresses = "physical addresses"
	}
	fmt.Fprintf(w, "%s: %s of memory, vCPUs: %d, %s\n", path, humanize.IBytes(info.MemoryBytes), info.VCPUs, addresses)
	switch {
	case info.Incomplete:
		fmt.Fprintf(w, "the guest maps more than a core has room for: some virtual addresses are missing, of processes first; %#x + physical ones are all there\n",
			uint64(lifecycle.CorePhysical))
	case paging && info.Mappings == 0:
		fmt.Fprintln(w, "no vCPU has 64-bit page tables that map memory")
	}
}
