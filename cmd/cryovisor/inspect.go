package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"github.com/cryovisor/cryovisor/lifecycle"
	"github.com/cryovisor/cryovisor/snapshot"
	"github.com/cryovisor/cryovisor/vmm"
)

func newInspectCommand() *cobra.Command {
	var (
		store  storeFlag
		keys   keyFlags
		asJSON bool
	)
	cmd := &cobra.Command{
		Use:   "inspect SNAPSHOT",
		Short: "Show what is in a snapshot",
		Long: `Show a snapshot: without a key, its header, which is in the clear; with the key
(--identity), also what is encrypted: the machine's processors and devices, and
where its memory lies.

SNAPSHOT is an id, the beginning of one, or the path of a manifest (*.cryo).`,
		Example: "  cryovisor inspect 3f9a\n  cryovisor inspect --identity my.key --json 3f9a",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			s, id, err := store.find(args[0])
			if err != nil {
				return err
			}
			report, err := inspect(cmd, s, id, &keys)
			if err != nil {
				return err
			}
			if asJSON {
				enc := json.NewEncoder(cmd.OutOrStdout())
				enc.SetIndent("", "  ")
				return enc.Encode(report)
			}
			return report.print(cmd.OutOrStdout())
		},
	}
	store.add(cmd)
	keys.addIdentity(cmd)
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

// inspection is what inspect shows. The parts from Machine on need the key.
type inspection struct {
	Entry    snapshot.Entry       `json:"header"`
	Verified bool                 `json:"verified"` // the header was authenticated with the key
	Machine  *machineInfo         `json:"machine,omitempty"`
	Sections []sectionInfo        `json:"sections,omitempty"`
	Disks    []lifecycle.DiskInfo `json:"disks,omitempty"`
	Chunks   int64                `json:"chunks,omitempty"`
}

type machineInfo struct {
	MemoryBytes uint64     `json:"memory_bytes"`
	VCPUs       []vcpuInfo `json:"vcpus"`
}

type vcpuInfo struct {
	Regs vmm.Regs `json:"regs"`
	CR3  uint64   `json:"cr3"`
	TSC  uint32   `json:"tsc_khz"`
	MSRs int      `json:"msrs"`
}

type sectionInfo struct {
	Name     string `json:"name"`
	Version  uint32 `json:"version"`
	Critical bool   `json:"critical"`
	Bytes    int    `json:"bytes"`
}

// inspect reads the header, and the rest if an identity was named or lies where
// keygen puts it.
func inspect(cmd *cobra.Command, s *snapshot.Store, id snapshot.ID, keys *keyFlags) (*inspection, error) {
	entry, err := s.Header(id)
	if err != nil {
		return nil, err
	}
	report := &inspection{Entry: entry}
	ids, err := keys.identities()
	if err != nil {
		if len(keys.identityFiles) > 0 {
			return nil, err
		}
		return report, nil
	}
	r, err := s.Open(cmd.Context(), id, ids...)
	if errors.Is(err, snapshot.ErrKey) && len(keys.identityFiles) == 0 {
		return report, nil
	}
	if err != nil {
		return nil, err
	}
	defer r.Close()
	return report, report.open(r)
}

func (i *inspection) open(r *snapshot.Reader) error {
	i.Verified, i.Chunks = true, r.Chunks()
	var state []vmm.Section
	for _, s := range r.Sections() {
		i.Sections = append(i.Sections, sectionInfo{s.Name, s.Version, s.Critical, len(s.Data)})
		state = append(state, vmm.Section{Name: s.Name, Version: s.Version, Data: s.Data})
	}
	var err error
	if i.Disks, err = lifecycle.DisksOf(r); err != nil {
		return err
	}
	st, err := vmm.ParseState(state)
	if err != nil {
		return err
	}
	i.Machine = &machineInfo{MemoryBytes: st.Machine.MemoryBytes}
	for _, c := range st.VCPUs {
		i.Machine.VCPUs = append(i.Machine.VCPUs, vcpuInfo{c.Regs, c.Sregs.CR3, c.TSCKHz, len(c.MSRs)})
	}
	return nil
}

func (i *inspection) print(out io.Writer) error {
	w := tabwriter.NewWriter(out, 0, 8, 2, ' ', 0)
	h := i.Entry.Header
	parent := "none: it is complete in itself"
	if !h.Parent.IsZero() {
		parent = h.Parent.String()
	}
	row := func(name, format string, args ...any) { fmt.Fprintf(w, name+"\t"+format+"\n", args...) }
	row("snapshot", "%v", h.ID)
	row("manifest", "%s", i.Entry.Path)
	row("parent", "%s", parent)
	row("created", "%s (%s)", h.Created.Format(time.RFC3339), humanize.Time(h.Created))
	row("format version", "%d", h.Version)
	row("guest memory", "%s, %s of it not zero", humanize.IBytes(h.RAMBytes), humanize.IBytes(h.PagesMapped*snapshot.PageSize))
	row("disks", "%s held", humanize.IBytes(h.BlocksMapped*snapshot.PageSize))
	row("stored", "%s for %s of memory and disks", humanize.IBytes(i.Entry.StoredBytes()), humanize.IBytes(h.PagesStored*snapshot.PageSize))
	row("packs", "%d", len(h.Packs))
	if i.Machine == nil {
		row("key", "none that fits: the header above is not authenticated, and the rest is encrypted")
		return w.Flush()
	}
	row("chunks", "%d", i.Chunks)
	for n, c := range i.Machine.VCPUs {
		row(fmt.Sprintf("vCPU %d", n), "RIP %#x, RSP %#x, CR3 %#x, TSC %d kHz, %d MSRs", c.Regs.RIP, c.Regs.RSP, c.CR3, c.TSC, c.MSRs)
	}
	for _, d := range i.Disks {
		under := "zeros"
		if d.Base != nil {
			under = d.Base.Path
		}
		row("disk "+d.Name, "%s, on %s", humanize.IBytes(uint64(d.Size)), under)
	}
	var names []string
	for _, s := range i.Sections {
		names = append(names, fmt.Sprintf("%s (v%d, %d bytes)", s.Name, s.Version, s.Bytes))
	}
	row("sections", "%s", strings.Join(names, ", "))
	return w.Flush()
}
