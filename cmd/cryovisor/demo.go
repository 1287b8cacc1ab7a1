package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"filippo.io/age"
	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"github.com/cryovisor/cryovisor/snapshot"
	"github.com/cryovisor/cryovisor/vmm"
)

// demoOptions are the flags of the demo.
type demoOptions struct {
	ram     string
	dir     string
	cycles  int
	vcpus   int
	eager   bool
	json    bool
	confine confineFlag
}

func newDemoCommand() *cobra.Command {
	o := demoOptions{}
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "Freeze a microVM in one process and thaw it in another",
		Long: `Boot a microVM on /dev/kvm, let it work on its memory, pause it in the middle of
that to an encrypted and compressed snapshot on disk, end the process, and
resume it in a new one, which reads memory only as the guest touches it.

The guest is a small program that keeps a running checksum over its memory, its
registers and its input and output. A model of it, which knows nothing of
snapshots, predicts every report that it makes and every byte of its memory:
"exact" means that all of it was compared and is the same.

A pause is timed from the call until the snapshot is durable; a resume from
opening the snapshot until the guest's first instruction that can be seen from
outside. With --cycles the guest is paused and resumed several times, each time
in a new process; pauses after the first store only what the guest wrote since.`,
		Example: "  cryovisor demo\n  cryovisor demo --ram 4GiB --cycles 20 --dir /dev/shm/demo --json",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return demo(cmd.Context(), cmd.OutOrStdout(), o)
		},
	}
	cmd.Flags().StringVar(&o.ram, "ram", "256MiB", "the guest's memory")
	cmd.Flags().StringVar(&o.dir, "dir", "", "directory for the key and the snapshots, kept afterwards (default: a temporary one, removed)")
	cmd.Flags().IntVar(&o.cycles, "cycles", 1, "how often to pause and resume")
	cmd.Flags().IntVar(&o.vcpus, "vcpus", 1, "the guest's processors")
	cmd.Flags().BoolVar(&o.eager, "eager", false, "load all of the memory before the guest runs on")
	o.confine.add(cmd)
	cmd.Flags().BoolVar(&o.json, "json", false, "print one JSON object instead of a story")
	return cmd
}

// demoResult is what --json prints. Times are of the first pause, which stores
// all of the memory, and of the first resume; Runs has those of every cycle.
type demoResult struct {
	RAMBytes     uint64    `json:"ram_bytes"`
	ContentBytes uint64    `json:"content_bytes"` // of the guest's memory, that is not zero
	StoredBytes  uint64    `json:"stored_bytes"`
	PauseSeconds float64   `json:"pause_seconds"`
	FreezeMS     float64   `json:"freeze_ms"`
	ResumeMS     float64   `json:"resume_ms"`
	Faults       uint64    `json:"faults"`
	PagesFetched uint64    `json:"pages_fetched"`
	Exact        bool      `json:"exact"`
	Cycles       int       `json:"cycles"`
	Lazy         bool      `json:"lazy"`
	VCPUs        int       `json:"vcpus"`
	Runs         []demoRun `json:"runs"`
	elapsed      time.Duration
}

// demoRun is one cycle: a pause in one process, a resume in the next.
type demoRun struct {
	Snapshot     snapshot.ID `json:"snapshot"`
	Parent       snapshot.ID `json:"parent"`
	PausePID     int         `json:"pause_pid"`
	ResumePID    int         `json:"resume_pid"`
	DirtyBytes   uint64      `json:"dirty_bytes"`
	StoredBytes  uint64      `json:"stored_bytes"`
	PauseSeconds float64     `json:"pause_seconds"`
	FreezeMS     float64     `json:"freeze_ms"`
	Stages       demoStages  `json:"pause_stages"`
	EnterMS      float64     `json:"enter_ms"`
	ResumeMS     float64     `json:"resume_ms"`
	Faults       uint64      `json:"faults"`
	PagesFetched uint64      `json:"pages_fetched"`
	Exact        bool        `json:"exact"`
}

// demoStages are where a pause's time went. The first three are sums over the
// workers, which run at the same time.
type demoStages struct {
	ScanMS     float64 `json:"scan_ms"`
	CompressMS float64 `json:"compress_ms"`
	SealMS     float64 `json:"seal_ms"`
	SyncMS     float64 `json:"sync_ms"`
	ManifestMS float64 `json:"manifest_ms"`
}

func demo(ctx context.Context, out io.Writer, o demoOptions) (err error) {
	ram, err := humanize.ParseBytes(o.ram)
	if err != nil || o.cycles < 1 {
		return fmt.Errorf("--ram %q, --cycles %d: want a size such as 1GiB and at least one cycle", o.ram, o.cycles)
	}
	host, err := vmm.Probe()
	if err != nil {
		return err
	}
	dir, cleanup, err := demoDir(o.dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, cleanup()) }()
	story := io.Discard
	if !o.json {
		story = out
	}
	d := &demoRunner{story: story, dir: dir, first: stageInput{
		Dir: dir, Memory: ram, VCPUs: o.vcpus, Eager: o.eager, Confine: o.confine.on, Seed: uint64(time.Now().UnixNano()),
	}}
	d.explain(&host, o)
	result, err := d.run(ctx, o.cycles)
	if err != nil {
		return err
	}
	if o.json {
		return json.NewEncoder(out).Encode(result)
	}
	d.summary(result)
	return nil
}

// demoDir returns the directory to work in, with a new identity in it, and how
// to remove what should not stay.
func demoDir(dir string) (string, func() error, error) {
	keep := func() error { return nil }
	if dir == "" {
		tmp, err := os.MkdirTemp("", "cryovisor-demo-")
		if err != nil {
			return "", nil, err
		}
		dir, keep = tmp, func() error { return os.RemoveAll(tmp) }
	}
	path := filepath.Join(dir, demoIdentity)
	if _, err := os.Stat(path); err == nil {
		return dir, keep, nil
	}
	id, err := age.GenerateX25519Identity()
	if err == nil {
		err = writeIdentity(path, id, id.Recipient())
	}
	return dir, keep, err
}

// demoRunner drives the processes of a demo.
type demoRunner struct {
	story io.Writer
	dir   string
	first stageInput
	begun time.Time
}

func (d *demoRunner) run(ctx context.Context, cycles int) (*demoResult, error) {
	d.begun = time.Now()
	in := d.first
	booted, err := d.stage(ctx, in)
	if err != nil {
		return nil, err
	}
	res := &demoResult{
		RAMBytes: in.Memory, ContentBytes: booted.ContentBytes, Cycles: cycles, VCPUs: max(in.VCPUs, 1),
		Lazy: !in.Eager, Exact: true,
	}
	last := booted
	for i := range cycles {
		in.Resume, in.Final = last.Pause.ID, i == cycles-1
		d.tellPause(last)
		next, err := d.stage(ctx, in)
		if err != nil {
			return nil, err
		}
		d.tellResume(next)
		res.Runs = append(res.Runs, newDemoRun(last, next))
		res.Exact = res.Exact && next.Exact
		last = next
	}
	run := res.Runs[0]
	res.StoredBytes, res.PauseSeconds, res.FreezeMS = run.StoredBytes, run.PauseSeconds, run.FreezeMS
	res.ResumeMS, res.Faults, res.PagesFetched = run.ResumeMS, run.Faults, run.PagesFetched
	res.elapsed = time.Since(d.begun)
	return res, nil
}

func newDemoRun(paused, resumed *stageOutput) demoRun {
	return demoRun{
		Snapshot: paused.Pause.ID, Parent: paused.Pause.Parent, PausePID: paused.PID, ResumePID: resumed.PID,
		DirtyBytes: paused.Pause.CandidateBytes, StoredBytes: paused.Pause.StoredBytes,
		PauseSeconds: paused.Pause.Total.Seconds(), FreezeMS: milliseconds(paused.Pause.Freeze),
		Stages: demoStages{
			ScanMS: milliseconds(paused.Pause.Scan), CompressMS: milliseconds(paused.Pause.Compress),
			SealMS: milliseconds(paused.Pause.Seal), SyncMS: milliseconds(paused.Pause.Sync),
			ManifestMS: milliseconds(paused.Pause.Manifest),
		},
		EnterMS: milliseconds(resumed.Enter), ResumeMS: milliseconds(resumed.First),
		Faults: resumed.Faults, PagesFetched: resumed.PagesFetched, Exact: resumed.Exact,
	}
}

func milliseconds(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// stage runs one stage in a process of its own.
func (d *demoRunner) stage(ctx context.Context, in stageInput) (*stageOutput, error) {
	exe, err := os.Executable()
	if err != nil {
		return nil, err
	}
	input, err := json.Marshal(in)
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, exe, demoStageVerb)
	cmd.Stdin, cmd.Stderr = bytes.NewReader(input), os.Stderr
	output, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("the demo's process failed: %w", err)
	}
	var res stageOutput
	if err := json.Unmarshal(output, &res); err != nil {
		return nil, fmt.Errorf("the demo's process gave no result: %w", err)
	}
	return &res, nil
}

func (d *demoRunner) explain(host *vmm.Host, o demoOptions) {
	fmt.Fprintf(d.story, "A microVM with %s of memory, %d vCPU(s), keys and snapshots in %s\n",
		humanize.IBytes(d.first.Memory), max(o.vcpus, 1), d.dir)
	if host.Interpreted != nil {
		fmt.Fprintln(d.story, "  note: this KVM interprets kernel-mode guest code; the demo's guest runs in user mode, at full speed")
	}
	if host.Lazy != nil && !o.eager {
		fmt.Fprintf(d.story, "  note: %v\n  loading eagerly instead\n", host.Lazy)
		d.first.Eager = true
	}
}

func (d *demoRunner) tellPause(p *stageOutput) {
	kind := "everything"
	if !p.Pause.Parent.IsZero() {
		kind = "what changed since its resume"
	}
	fmt.Fprintf(d.story, "process %d  paused at step %d: %s, %s -> %s stored, durable after %.0f ms (freeze %.1f ms)\n",
		p.PID, p.Steps, kind, humanize.IBytes(p.Pause.CandidateBytes), humanize.IBytes(p.Pause.StoredBytes),
		milliseconds(p.Pause.Total), milliseconds(p.Pause.Freeze))
}

func (d *demoRunner) tellResume(r *stageOutput) {
	verdict := "EXACT: every report and every byte of memory as predicted"
	if !r.Exact {
		verdict = "NOT COMPARED"
	}
	fmt.Fprintf(d.story, "process %d resumed: guest runs after %.1f ms, %d faults, %d pages fetched by step %d; %s\n",
		r.PID, milliseconds(r.First), r.Faults, r.PagesFetched, r.Steps, verdict)
}

func (d *demoRunner) summary(r *demoResult) {
	fmt.Fprintf(d.story, "\n%s of memory, %s of it not zero, stored encrypted in %s\n",
		humanize.IBytes(r.RAMBytes), humanize.IBytes(r.ContentBytes), humanize.IBytes(r.StoredBytes))
	gib := float64(r.RAMBytes) / (1 << 30)
	fmt.Fprintf(d.story, "pause %.2f s (%.2f s/GiB), resume %.1f ms, %d cycle(s), all of it in %.1f s\n",
		r.PauseSeconds, r.PauseSeconds/gib, r.ResumeMS, r.Cycles, r.elapsed.Seconds())
}
