package lifecycle

import "github.com/cryovisor/cryovisor/vmm"

// pendingShell is a VM that is being made.
type pendingShell struct {
	made  chan struct{} // closed when it is, or has failed
	shell *vmm.Shell
	err   error
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

// close gives the VM back unless it has been used.
func (p *pendingShell) close() {
	if shell, err := p.wait(); err == nil {
		shell.Close()
	}
}
