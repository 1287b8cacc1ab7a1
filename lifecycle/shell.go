package lifecycle

import "github.com/cryovisor/cryovisor/vmm"

// pendingShell is a VM that is being made.
type pendingShell struct {
	made  chan struct{} // closed when it is, or has failed
	shell *vmm.Shell
	err   error
	pool  *Pool // that was asked for it, or nil
}

func makeShell() *pendingShell {
	p := &pendingShell{made: make(chan struct{})}
	go func() {
		defer close(p.made)
		p.shell, p.err = vmm.NewShell()
	}()
	return p
}

func (p *pendingShell) wait() (*vmm.Shell, error) {
	<-p.made
	return p.shell, p.err
}

// put gives a VM that does not fit back to its pool, and makes another.
func (p *pendingShell) put() {
	p.pool.shelf.put(p.pool.memoryBytes, p.shell)
	another := makeShell()
	<-another.made
	p.made, p.shell, p.err = another.made, another.shell, another.err
}

// close gives the VM back unless it has been used, and has the pool replace it: not before, since that takes a processor.
func (p *pendingShell) close() {
	if shell, err := p.wait(); err == nil {
		shell.Close()
	}
	if p.pool != nil {
		p.pool.shelf.refill()
	}
}
