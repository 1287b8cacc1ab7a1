//go:build !(linux && amd64)

package memory

import (
	"errors"
	"fmt"
	"os"
	"runtime"
)

// A mapping does not exist on this system: reserve fails, so that no method of
// it is ever reached.
type mapping struct{ mem []byte }

func errUnsupported() error {
	return fmt.Errorf("memory: guest memory on %s/%s: %w", runtime.GOOS, runtime.GOARCH, errors.ErrUnsupported)
}

func reserve(uint64) (*mapping, error)         { return nil, errUnsupported() }
func newImageFile(uint64) (*os.File, error)    { return nil, errUnsupported() }
func hugeShmem() (bool, error)                 { return false, errUnsupported() }
func checkImageFile(*os.File, uint64) error    { return errUnsupported() }
func dataIn(*os.File, Range) (Range, error)    { return Range{}, errUnsupported() }
func allocated(*os.File) (uint64, error)       { return 0, errUnsupported() }
func punch(*os.File, Range) error              { return errUnsupported() }
func (m *mapping) place(Range, *os.File) error { return errUnsupported() }
func (m *mapping) advise(Range, bool) error    { return errUnsupported() }
func (m *mapping) collapse(Range) error        { return errUnsupported() }
func (m *mapping) discard(Range) error         { return errUnsupported() }
func (m *mapping) deny(Range) error            { return errUnsupported() }
func (m *mapping) base() uintptr               { return 0 }
func (m *mapping) unmap() error                { return errUnsupported() }
func load(p, ram []byte)                       { copy(p, ram) }
func store(ram, p []byte)                      { copy(ram, p) }
