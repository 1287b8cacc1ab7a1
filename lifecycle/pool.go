package lifecycle

import (
	"errors"
	"fmt"

	"github.com/cryovisor/cryovisor/vmm"
)

// maxPool bounds how many VMs are made in advance.
const maxPool = 1024

// Pool keeps VMs of KVM's that were made in advance, for machines with so many bytes of memory whichever they are, for
// ResumeOptions.Pool. It pays where the memory is large: KVM's tables for it are there already. A VM that is used is replaced in the
// background. Its methods may be called from any number of goroutines.
//
// A VM that waits takes two files of this process, and of the kernel's memory some 100 KiB and its tables: 10 bytes for each page of
// the machine's, 2.5 MiB for each GiB, where KVM shadows page tables, and next to nothing where the processor nests them. And as the
// kernel tells all VMs of a process what changes in its memory, each makes each page of any guest that is copied because it is written
// for the first time 0.2 us slower. So a few are better than many. bench's BenchmarkPoolIdle measures.
//
// A Manager has VMs for sandboxes of several sizes: ManagerOptions.Pool.
type Pool struct {
	shelf       *shelf
	memoryBytes uint64
}

// NewPool makes a pool of n VMs, from 1 to 1024, and returns when they are ready. Errors: those of vmm.NewShell, vmm.ErrConfig.
func NewPool(memoryBytes uint64, n int) (*Pool, error) {
	if n < 1 || n > maxPool {
		return nil, fmt.Errorf("%w: a pool of %d VMs", vmm.ErrConfig, n)
	}
	p := newShelf(n).pool(memoryBytes)
	p.shelf.expect(memoryBytes)
	p.shelf.fill()
	if err := p.Err(); err != nil {
		return nil, errors.Join(err, p.Close())
	}
	p.shelf.start()
	return p, nil
}

// Err is why the last VM that was to replace another could not be made, or nil. Whoever finds the pool empty makes a VM by himself.
func (p *Pool) Err() error { return p.shelf.stats().Err }

// Ready is how many VMs are ready.
func (p *Pool) Ready() int { return p.shelf.stats().Ready }

// Close gives up what is ready. Machines go on. It is idempotent.
func (p *Pool) Close() error { return p.shelf.close() }

// take takes a VM, or makes one.
func (p *Pool) take() *pendingShell {
	if p == nil {
		return makeShell()
	}
	if shell := p.shelf.take(p.memoryBytes); shell != nil {
		made := make(chan struct{})
		close(made)
		return &pendingShell{made: made, shell: shell, pool: p}
	}
	pending := makeShell()
	pending.pool = p
	return pending
}
