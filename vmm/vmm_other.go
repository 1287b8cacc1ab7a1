//go:build !(linux && amd64)

package vmm

import (
	"context"
	"errors"
	"os"

	"github.com/cryovisor/cryovisor/memory"
)

// VM is a virtual machine; there are none on this system.
type VM struct{}

// Probe returns ErrNotSupported on this system.
func Probe() (Host, error) { return Host{}, ErrNotSupported }

// New returns ErrNotSupported on this system.
func New(cfg Config) (*VM, error) { return nil, errors.Join(cfg.check(), ErrNotSupported) }

// Restore returns ErrNotSupported on this system.
func Restore(*State, *memory.Memory, Hardware) (*VM, error) { return nil, ErrNotSupported }

// CheckHost returns ErrNotSupported on this system.
func CheckHost(*State, Hardware) error { return ErrNotSupported }

// Shell is what a virtual machine is made in; there are none on this system.
type Shell struct{}

// NewShell returns ErrNotSupported on this system, as these do.
func NewShell() (*Shell, error)                                      { return nil, ErrNotSupported }
func (*Shell) CheckHost(*State, Hardware) error                      { return ErrNotSupported }
func (*Shell) Restore(*State, *memory.Memory, Hardware) (*VM, error) { return nil, ErrNotSupported }
func (*Shell) Reserve(uint64) error                                  { return ErrNotSupported }
func (*Shell) Reservation() *memory.Reservation                      { return nil }
func (*Shell) Close() error                                          { return nil }

// OpenTap returns ErrNotSupported on this system.
func OpenTap(string) (*os.File, error) { return nil, ErrNotSupported }

// CheckLazy returns ErrNotSupported on this system.
func CheckLazy() error { return ErrNotSupported }

// Start returns ErrNotSupported on this system, as all of these do.
func (*VM) Start() error                { return ErrNotSupported }
func (*VM) Resume() error               { return ErrNotSupported }
func (*VM) Pause(context.Context) error { return ErrNotSupported }
func (*VM) State() (*State, error)      { return nil, ErrNotSupported }
func (*VM) Wait(context.Context) error  { return ErrNotSupported }
func (*VM) Close() error                { return nil }
func (*VM) Disconnect() error           { return nil }
func (*VM) Memory() *memory.Memory      { return nil }
func (*VM) Paused() bool                { return false }
func (*VM) Launches() uint64            { return 0 }
func (*VM) VCPUs() int                  { return 0 }
func (*VM) Activity() Activity          { return Activity{} }
func (*VM) SetBalloon(uint64) error     { return ErrNotSupported }
func (*VM) Balloon() uint64             { return 0 }
func (*VM) Ended() <-chan struct{}      { return nil }
func (*VM) TrackDirty(bool) error       { return ErrNotSupported }

// TakeDirty returns ErrNotSupported on this system.
func (*VM) TakeDirty() ([]memory.Range, error) { return nil, ErrNotSupported }
