//go:build linux && amd64

package main

import (
	"context"
	"errors"
	"time"

	"filippo.io/age"
	"golang.org/x/sys/cpu"

	"github.com/cryovisor/cryovisor/internal/testvm"
	"github.com/cryovisor/cryovisor/lifecycle"
	"github.com/cryovisor/cryovisor/memory"
	"github.com/cryovisor/cryovisor/snapshot"
	"github.com/cryovisor/cryovisor/vmm"
)

// The guest is that of the benchmarks, but for this: it works only as far as the first report, so that all rounds have
// the same memory.
const (
	seed  = 7
	every = 64
)

// guest is a machine of ours that runs or is paused, and a store for it.
type guest struct {
	worker  *testvm.Worker
	device  *testvm.Device
	machine *lifecycle.Machine
	store   *snapshot.Store
	key     *age.X25519Identity
}

// bootGuest makes a guest whose memory is loaded, and which waits for ever in a loop.
func bootGuest(ctx context.Context, ram uint64, dir string) (*guest, error) {
	g := &guest{}
	err := g.setUp(ram, dir)
	if err == nil {
		err = g.boot(ctx)
	}
	if err != nil {
		return nil, errors.Join(err, g.close())
	}
	return g, nil
}

func (g *guest) setUp(ram uint64, dir string) (err error) {
	g.worker, err = testvm.NewWorker(testvm.WorkerConfig{Memory: ram, Seed: seed, Every: every, AVX2: cpu.X86.HasAVX2})
	if err != nil {
		return err
	}
	if g.store, err = snapshot.OpenStore(dir); err != nil {
		return err
	}
	g.key, err = age.GenerateX25519Identity()
	return err
}

func (g *guest) boot(ctx context.Context) (err error) {
	program, err := testvm.ProgramCorpus()
	if err != nil {
		return err
	}
	g.device = testvm.NewDevice(g.worker, nil, every, nil)
	g.machine, err = lifecycle.Boot(ctx, vmm.Config{
		MemoryBytes: g.worker.Config().Memory, Boot: g.worker.Image().Program(),
		Hardware: vmm.Hardware{Ports: []vmm.Ports{g.device.Ports()}},
	}, lifecycle.Disks{})
	if err != nil {
		return err
	}
	mem := g.machine.VM.Memory()
	err = g.worker.Load(testvm.NewCorpus(seed, program), func(gpa uint64, data []byte) error {
		_, err := mem.WriteAt(data, int64(gpa))
		return err
	})
	if err != nil {
		return err
	}
	if err := g.machine.VM.Start(); err != nil {
		return err
	}
	_, err = g.device.WaitHeld(ctx)
	return err
}

func (g *guest) close() error {
	if g.machine == nil {
		return nil
	}
	return g.machine.Close()
}

func (g *guest) memory() flatRAM { return flatRAM{g.machine.VM.Memory()} }

// pause stores the running guest. It stands still until the next pause, as its loop would take a core from the others.
func (g *guest) pause(ctx context.Context) (lifecycle.Paused, time.Duration, error) {
	if g.machine.VM.Paused() {
		if err := g.machine.Resume(); err != nil {
			return lifecycle.Paused{}, 0, err
		}
	}
	began := time.Now()
	p, err := g.machine.Pause(ctx, g.store, lifecycle.PauseOptions{Recipients: []age.Recipient{g.key.Recipient()}})
	return p, time.Since(began), err
}

// resume makes a second machine of what was stored.
func (g *guest) resume(ctx context.Context, id snapshot.ID, eager bool) (*lifecycle.Machine, time.Duration, error) {
	d := testvm.NewDevice(g.worker, g.device.State(), every, nil)
	began := time.Now()
	m, err := lifecycle.Resume(ctx, g.store, id, lifecycle.ResumeOptions{
		Identities: []age.Identity{g.key}, Hardware: vmm.Hardware{Ports: []vmm.Ports{d.Ports()}}, Eager: eager,
	})
	if err != nil {
		return nil, 0, err
	}
	if err := m.VM.Resume(); err != nil {
		return nil, 0, errors.Join(err, m.Close())
	}
	return m, time.Since(began), nil
}

// flatRAM is a guest's memory without its hole, as it lies in QEMU's file. Reads must not cross the hole's place.
type flatRAM struct{ *memory.Memory }

func (r flatRAM) ReadAt(p []byte, off int64) (int, error) {
	if off >= memory.HoleStart {
		off += memory.HoleEnd - memory.HoleStart
	}
	return r.Memory.ReadAt(p, off)
}
