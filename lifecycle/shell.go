package lifecycle

import "github.com/cryovisor/cryovisor/vmm"

// pendingShell is a VM that is being made.
type pendingShell struct {
	made  chan struct{} // closed when it is, or has failed
	shell *vmm.Shell
	err   error
	pool  *Pool // that it was taken from; nil if it was made for somebody
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
	p.pool.put(p.shell)
	another := makeShell()
	<-another.made
	*p = *another
}

// close gives the VM back unless it has been used, and has its pool replace it: not before, since that takes a processor.
func (p *pendingShell) close() {
	if shell, err := p.wait(); err == nil {
		shell.Close()
	}
	if p.pool != nil {
		p.pool.replace()
	}
}
