package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"filippo.io/age"
	"github.com/spf13/cobra"
	"golang.org/x/sys/cpu"

	"github.com/cryovisor/cryovisor/confine"
	"github.com/cryovisor/cryovisor/internal/testvm"
	"github.com/cryovisor/cryovisor/lifecycle"
	"github.com/cryovisor/cryovisor/memory"
	"github.com/cryovisor/cryovisor/snapshot"
	"github.com/cryovisor/cryovisor/vmm"
)

const (
	demoStageVerb = "demo-stage"
	demoIdentity  = "identity.txt"
	demoSection   = "demo/guest" // what the demo itself has to remember of the guest

	// demoEvery is how many steps the guest makes from one report to the next.
	demoEvery = 64
	// demoReports is how many reports each vCPU makes before a pause, and before
	// and after it is compared.
	demoReports = 100
	// demoWorkingSet is how much of its memory the guest works on, in bytes.
	demoWorkingSet = 64 << 20
)

// stageInput tells a process of the demo what to do.
type stageInput struct {
	Dir     string      `json:"dir"`
	Memory  uint64      `json:"memory"`
	VCPUs   int         `json:"vcpus"`
	Seed    uint64      `json:"seed"`
	Eager   bool        `json:"eager"`
	Confine bool        `json:"confine"`
	Resume  snapshot.ID `json:"resume"` // zero: boot
	Final   bool        `json:"final"`  // compare, and do not pause again
}

// stageOutput is what it says.
type stageOutput struct {
	PID          int              `json:"pid"`
	ContentBytes uint64           `json:"content_bytes"` // that a booted guest was loaded with
	Enter        time.Duration    `json:"enter"`         // from opening the snapshot to entering the guest
	First        time.Duration    `json:"first"`         // ... to its first sign of life
	Faults       uint64           `json:"faults"`
	PagesFetched uint64           `json:"pages_fetched"`
	Exact        bool             `json:"exact"`
	Steps        uint64           `json:"steps"` // the first vCPU's, at the end
	Pause        lifecycle.Paused `json:"pause"`
}

func newDemoStageCommand() *cobra.Command {
	return &cobra.Command{
		Use: demoStageVerb, Hidden: true, Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var in stageInput
			if err := json.NewDecoder(io.LimitReader(cmd.InOrStdin(), 1<<20)).Decode(&in); err != nil {
				return err
			}
			out, err := runStage(cmd.Context(), in)
			if err != nil {
				return err
			}
			return json.NewEncoder(cmd.OutOrStdout()).Encode(out)
		},
	}
}

// stage is the demo's guest in one process.
type stage struct {
	in      stageInput
	out     stageOutput
	store   *snapshot.Store
	key     *age.X25519Identity
	worker  *testvm.Worker
	content testvm.Content
	model   *testvm.Model
	device  *testvm.Device
	machine *lifecycle.Machine

	reports atomic.Int64
	seen    sync.Once     // the guest's first access to a port
	alive   chan struct{} // closed by it
}

func runStage(ctx context.Context, in stageInput) (out *stageOutput, err error) {
	s := &stage{in: in, alive: make(chan struct{})}
	s.out.PID = os.Getpid()
	if err := s.prepare(); err != nil {
		return nil, err
	}
	if in.Resume.IsZero() {
		err = s.boot(ctx)
	} else {
		err = s.resume(ctx)
	}
	if s.machine != nil {
		defer func() { err = errors.Join(err, s.machine.Close()) }()
	}
	if err != nil {
		return nil, err
	}
	if err := s.work(ctx); err != nil {
		return nil, err
	}
	if !in.Resume.IsZero() {
		if err := s.compare(ctx); err != nil {
			return nil, err
		}
	}
	if !in.Final {
		err = s.pause(ctx)
	}
	s.out.Steps = s.device.State()[0].Last.Step
	return &s.out, err
}

func (s *stage) prepare() error {
	keys := keyFlags{identityFiles: []string{filepath.Join(s.in.Dir, demoIdentity)}}
	ids, err := keys.fileIdentities()
	if err != nil {
		return err
	}
	var ok bool
	if s.key, ok = ids[0].(*age.X25519Identity); !ok {
		return fmt.Errorf("%s holds no X25519 identity", keys.identityFiles[0])
	}
	if s.store, err = snapshot.OpenStore(filepath.Join(s.in.Dir, "store")); err != nil {
		return err
	}
	s.worker, err = testvm.NewWorker(testvm.WorkerConfig{
		Memory: s.in.Memory, VCPUs: s.in.VCPUs, Seed: s.in.Seed, Every: demoEvery,
		WorkingSet: demoWorkingSet, AVX2: cpu.X86.HasAVX2,
	})
	if err != nil {
		return err
	}
	program, err := testvm.ProgramCorpus()
	if err != nil {
		return err
	}
	s.content = testvm.NewCorpus(s.in.Seed, program)
	s.model = testvm.NewModel(s.worker, s.content)
	return s.confine()
}

// confine leaves this process the store and the machine that it will make.
func (s *stage) confine() error {
	if err := s.store.Make(); err != nil {
		return err
	}
	flag := confineFlag{s.in.Confine}
	return flag.apply(confine.Rules{ReadWrite: []string{s.store.Dir()}}, func(string, ...any) {}) // the demo is no place to tell of Landlock
}

// hardware connects the guest's ports to a device that goes on from saved.
func (s *stage) hardware(saved []testvm.VCPUState) vmm.Hardware {
	s.device = testvm.NewDevice(s.worker, saved, testvm.NoLimit, func(testvm.Report) { s.reports.Add(1) })
	ports := s.device.Ports()
	ports.Device = s
	return vmm.Hardware{Ports: []vmm.Ports{ports}}
}

// In and Out pass the guest's port accesses on to its device, and note the first.
func (s *stage) In(port uint16, data []byte) {
	s.seen.Do(func() { close(s.alive) })
	s.device.In(port, data)
}

func (s *stage) Out(port uint16, data []byte) {
	s.seen.Do(func() { close(s.alive) })
	s.device.Out(port, data)
}

func (s *stage) boot(ctx context.Context) error {
	m, err := lifecycle.Boot(ctx, vmm.Config{
		MemoryBytes: s.in.Memory, VCPUs: s.in.VCPUs, Boot: s.worker.Image().Program(), Hardware: s.hardware(nil),
	}, lifecycle.Disks{})
	if err != nil {
		return err
	}
	s.machine = m
	var loaded atomic.Uint64
	mem := m.VM.Memory()
	bar := newProgress(os.Stderr, "filling the guest's memory")
	err = s.worker.Load(s.content, func(gpa uint64, data []byte) error {
		loaded.Add(uint64(len(data)))
		bar.add(uint64(len(data)), s.in.Memory*3/4) // a quarter of it is zero
		_, err := mem.WriteAt(data, int64(gpa))
		return err
	})
	bar.finish()
	if err != nil {
		return err
	}
	s.out.ContentBytes = loaded.Load()
	return m.VM.Start()
}

func (s *stage) resume(ctx context.Context) error {
	saved, err := s.savedDevice(ctx)
	if err != nil {
		return err
	}
	hardware := s.hardware(saved)
	began := time.Now()
	m, err := lifecycle.Resume(ctx, s.store, s.in.Resume, lifecycle.ResumeOptions{
		Identities: []age.Identity{s.key}, Hardware: hardware, Eager: s.in.Eager,
	})
	if err != nil {
		return err
	}
	s.machine = m
	if err := m.VM.Resume(); err != nil {
		return err
	}
	s.out.Enter = time.Since(began)
	select {
	case <-s.alive:
	case <-m.VM.Ended():
		return m.VM.Wait(ctx)
	case <-ctx.Done():
		return ctx.Err()
	}
	s.out.First = time.Since(began)
	return nil
}

// savedDevice reads what the demo's own device has to remember.
func (s *stage) savedDevice(ctx context.Context) ([]testvm.VCPUState, error) {
	r, err := s.store.Open(ctx, s.in.Resume, s.key)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	section, err := r.ReadSection(demoSection)
	if err != nil {
		return nil, err
	}
	var saved []testvm.VCPUState
	return saved, json.Unmarshal(section.Data, &saved)
}

// work waits until the running guest has made a number of reports.
func (s *stage) work(ctx context.Context) error {
	want := s.reports.Load() + int64(demoReports*max(s.in.VCPUs, 1))
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for s.reports.Load() < want {
		select {
		case <-tick.C:
		case <-s.machine.VM.Ended():
			return s.machine.VM.Wait(ctx)
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

// compare lets the guest come to a report and compares it, and every byte of its
// memory, with the model; then it sets the guest working again.
func (s *stage) compare(ctx context.Context) error {
	stats := s.machine.VM.Memory().Stats() // before comparing fetches the rest
	s.out.Faults, s.out.PagesFetched = stats.Faults, stats.PagesFetched
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	go func() { cancel(s.machine.VM.Wait(ctx)) }()
	s.device.SetLimit(0)
	reports, err := s.device.WaitHeld(ctx)
	if err != nil {
		return err
	}
	for _, r := range reports {
		if err := s.model.Check(r); err != nil {
			return err
		}
	}
	mem := s.machine.VM.Memory()
	bar := newProgress(os.Stderr, "comparing every byte")
	err = s.model.Compare(countedReads{mem, bar}, mem.Ranges())
	bar.finish()
	if err != nil {
		return err
	}
	s.out.Exact = true
	if s.in.Final {
		return nil
	}
	s.device.SetLimit(testvm.NoLimit)
	return s.work(ctx)
}

// countedReads shows the progress of reading all of a guest's memory.
type countedReads struct {
	mem *memory.Memory
	bar *progress
}

func (c countedReads) ReadAt(p []byte, off int64) (int, error) {
	c.bar.add(uint64(len(p)), c.mem.Size())
	return c.mem.ReadAt(p, off)
}

// pause stores the guest, in the middle of its work, with what its device has to
// remember.
func (s *stage) pause(ctx context.Context) (err error) {
	bar := newProgress(os.Stderr, "pausing")
	defer bar.finish()
	s.out.Pause, err = s.machine.Pause(ctx, s.store, lifecycle.PauseOptions{
		Recipients: []age.Recipient{s.key.Recipient()},
		Progress:   bar.update,
		Extra: func() ([]snapshot.Section, error) {
			data, err := json.Marshal(s.device.State())
			return []snapshot.Section{{Name: demoSection, Version: 1, Data: data}}, err
		},
	})
	return err
}
