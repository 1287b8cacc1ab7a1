//go:build !(linux && amd64)

package uffd

// An FD does not exist on this system: Open fails.
type FD struct{}

// An Event is never read on this system.
type Event struct{}

// Open returns ErrKernel.
func Open() (*FD, error) { return nil, ErrKernel }

// Close does nothing.
func (d *FD) Close() error { return nil }

// Register returns ErrKernel.
func (d *FD) Register(addr, length uintptr, mode uint64) error { return ErrKernel }

// Wake returns ErrKernel.
func (d *FD) Wake(addr, length uintptr) error { return ErrKernel }

// ZeroPage returns ErrKernel.
func (d *FD) ZeroPage(addr, length uintptr) (pages int, err error) { return 0, ErrKernel }

// CanWriteProtect returns ErrNoWriteProtect.
func (d *FD) CanWriteProtect() error { return ErrNoWriteProtect }

// WriteProtect returns ErrKernel.
func (d *FD) WriteProtect(addr, length uintptr, on bool) error { return ErrKernel }

// Read returns ErrKernel.
func (d *FD) Read(events []Event) (int, error) { return 0, ErrKernel }

// Fault is never ok.
func (e *Event) Fault() (addr uintptr, write, ok bool) { return 0, false, false }

// Protected is never true.
func (e *Event) Protected() bool { return false }
