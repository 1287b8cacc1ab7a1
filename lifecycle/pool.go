package lifecycle

import (
	"errors"
	"fmt"
	"sync"

	"github.com/cryovisor/cryovisor/vmm"
)

// Pool keeps VMs of KVM's that were made in advance, for machines with so many bytes of memory whichever they are, for
// ResumeOptions.Pool. It pays where the memory is large: KVM's tables for it are there already. Each VM takes what KVM needs for
// them: 10 bytes for each page of memory where KVM shadows page tables, little where the processor nests them, and
// some files of this process. A VM that is used is replaced in the background. Its methods may be called from any number of goroutines.
type Pool struct {
	memoryBytes uint64
	ready       chan *vmm.Shell
	want        chan struct{} // one for each VM to be made
	filler      sync.WaitGroup

	mu     sync.Mutex // held while something is put into ready
	closed bool
	err    error // why the last could not be made
}

// NewPool makes a pool of n VMs, from 1 to 1024, and returns when they are ready. Errors: those of vmm.NewShell, vmm.ErrConfig.
func NewPool(memoryBytes uint64, n int) (*Pool, error) {
	if n < 1 || n > 1024 {
		return nil, fmt.Errorf("%w: a pool of %d VMs", vmm.ErrConfig, n)
	}
	p := &Pool{memoryBytes: memoryBytes, ready: make(chan *vmm.Shell, n), want: make(chan struct{}, n)}
	for range n {
		p.fill()
	}
	if p.err != nil {
		return nil, errors.Join(p.err, p.Close())
	}
	p.filler.Go(func() {
		for range p.want {
			p.fill()
		}
	})
	return p, nil
}

// Err is why the last VM that was to replace another could not be made, or nil. Whoever finds the pool empty makes a VM by himself.
func (p *Pool) Err() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.err
}

// Ready is how many VMs are ready.
func (p *Pool) Ready() int { return len(p.ready) }

// Close gives up what is ready. Machines go on. It is idempotent.
func (p *Pool) Close() error {
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		return nil
	}
	p.closed = true
	close(p.want)
	p.mu.Unlock()
	p.filler.Wait()
	close(p.ready)
	var err error
	for shell := range p.ready {
		err = errors.Join(err, shell.Close())
	}
	return err
}

// fill makes a VM.
func (p *Pool) fill() {
	shell, err := vmm.NewShell()
	if err == nil {
		if err = shell.Reserve(p.memoryBytes); err != nil {
			err = errors.Join(err, shell.Close())
		}
	}
	p.mu.Lock()
	p.err = err
	p.mu.Unlock()
	if err == nil {
		p.put(shell)
	}
}

// take takes a VM, or makes one.
func (p *Pool) take() *pendingShell {
	if p == nil {
		return makeShell()
	}
	select {
	case shell, ok := <-p.ready:
		if !ok {
			return makeShell()
		}
		made := make(chan struct{})
		close(made)
		return &pendingShell{made: made, shell: shell, pool: p}
	default:
		if p.Err() != nil {
			p.replace()
		}
		return makeShell()
	}
}

// replace has a VM made for one that was taken, unless enough are on their way.
func (p *Pool) replace() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return
	}
	select {
	case p.want <- struct{}{}:
	default:
	}
}

// put takes a VM that is ready, unless there are enough.
func (p *Pool) put(shell *vmm.Shell) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.closed {
		select {
		case p.ready <- shell:
			return
		default:
		}
	}
	_ = shell.Close() // nobody knows of it
}
