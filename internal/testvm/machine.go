package testvm

import (
	"bytes"
	"fmt"
	"io"
	"runtime"

	"golang.org/x/sync/errgroup"

	"github.com/cryovisor/cryovisor/memory"
	"github.com/cryovisor/cryovisor/vmm"
)

// Program is the guest as something for a VM to boot.
func (im Image) Program() vmm.Program {
	return vmm.Program{Load: im.Load, Start: func(vcpu int) vmm.CPUStart { return im.VCPUs[vcpu] }}
}

// Ports are the device's I/O ports, for a VM's hardware.
func (d *Device) Ports() vmm.Ports {
	first, last := d.w.PortRange()
	return vmm.Ports{First: first, Last: last, Device: d}
}

// DifferenceError is the first page in a stretch of memory that is not what the
// model predicts.
type DifferenceError struct{ GPA uint64 }

func (e *DifferenceError) Error() string {
	return fmt.Sprintf("the page at GPA %#x differs from the model", e.GPA)
}

// Compare compares every byte of ram with the model's. The vCPUs hold at the
// reports that Report returns. The error is a *DifferenceError, or ram's.
func (m *Model) Compare(ram io.ReaderAt, ranges []memory.Range) error {
	const block = 1 << 20
	var g errgroup.Group
	g.SetLimit(runtime.GOMAXPROCS(0))
	for _, r := range ranges {
		for gpa := r.GPA; gpa < r.End(); gpa += block {
			g.Go(func() error { return m.compare(ram, gpa, min(block, r.End()-gpa)) })
		}
	}
	return g.Wait()
}

func (m *Model) compare(ram io.ReaderAt, gpa, n uint64) error {
	got, want := make([]byte, n), make([]byte, n)
	if _, err := ram.ReadAt(got, int64(gpa)); err != nil {
		return err
	}
	m.Expect(gpa, want)
	for i := uint64(0); i < n; i += pageSize {
		if !bytes.Equal(got[i:i+pageSize], want[i:i+pageSize]) {
			return &DifferenceError{gpa + i}
		}
	}
	return nil
}
