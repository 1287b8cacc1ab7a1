package server

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"

	"github.com/cryovisor/cryovisor/internal/testvm"
	"github.com/cryovisor/cryovisor/lifecycle"
	"github.com/cryovisor/cryovisor/vmm"
)

// BaseTemplate is the name of the built-in template: what a create without a template gets.
const BaseTemplate = "base"

// baseMemory is its RAM, in bytes.
const baseMemory = 128 << 20

// EnsureBase makes the template BaseTemplate if there is none: a guest that needs no operating system, sleeps, counts seconds, and says every
// ten of them on its console how many there were, through all pauses. It shows that a server works, on every KVM.
func EnsureBase(ctx context.Context, m *lifecycle.Manager) error {
	if _, err := m.Template(BaseTemplate); err == nil {
		return nil
	}
	guest, err := testvm.Beacon(testvm.BeaconConfig{Memory: baseMemory, Period: 1e9, Every: 10})
	if err != nil {
		return err
	}
	_, err = m.CreateTemplate(ctx, lifecycle.TemplateConfig{
		Name: BaseTemplate, VM: vmm.Config{MemoryBytes: baseMemory, Boot: guest.Program()},
	})
	return err
}

// LabelVsock, in a template's labels, is the CID of its machines' vsock device.
const LabelVsock = "vsock"

// Hardware connects machines of templates by their labels: a vsock device is served at DIR/run/ID.sock, which only the server's user can use.
// It is for ManagerOptions.Connect.
func Hardware(dir string) func(context.Context, lifecycle.Start) (lifecycle.Connection, error) {
	return func(_ context.Context, start lifecycle.Start) (lifecycle.Connection, error) {
		cid := start.Template.Labels[LabelVsock]
		if cid == "" {
			return lifecycle.Connection{}, nil
		}
		n, err := strconv.ParseUint(cid, 10, 32)
		if err != nil {
			return lifecycle.Connection{}, fmt.Errorf("template %s: label %s: %w", start.Template.ID, LabelVsock, err)
		}
		run, err := MakeRunDir(dir)
		if err != nil {
			return lifecycle.Connection{}, err
		}
		return lifecycle.Connection{Hardware: vmm.Hardware{Vsock: &vmm.Vsock{CID: uint32(n), Path: filepath.Join(run, start.Sandbox.ID+".sock")}}}, nil
	}
}

// MakeRunDir makes the directory, in a data directory, for the sockets of sandboxes.
func MakeRunDir(dir string) (string, error) {
	run := filepath.Join(dir, "run")
	return run, os.MkdirAll(run, 0o700)
}
