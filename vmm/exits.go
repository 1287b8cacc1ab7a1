//go:build linux && amd64

package vmm

import (
	"errors"
	"fmt"

	"github.com/cryovisor/cryovisor/internal/kvm"
)

// serveExit serves what the guest stopped for. An error ends the VM.
func (c *vcpu) serveExit(exit kvm.Exit) error {
	switch exit.Reason {
	case kvm.ExitIO:
		io, err := exit.IO()
		if err != nil {
			return c.failed(&ExitError{Kind: ErrRun, Cause: err})
		}
		return c.servePort(io)
	case kvm.ExitMMIO:
		mmio, err := exit.MMIO()
		if err != nil {
			return c.failed(&ExitError{Kind: ErrRun, Cause: err})
		}
		return c.serveMMIO(mmio)
	case kvm.ExitShutdown:
		return c.failed(&ExitError{Kind: ErrTripleFault})
	case kvm.ExitSystemEvent:
		return c.serveSystemEvent(exit.SystemEvent())
	case kvm.ExitInternalError:
		return c.internalError(exit.InternalError())
	case kvm.ExitFailEntry:
		f := exit.FailEntry()
		return c.failed(&ExitError{Kind: ErrRun, Detail: fmt.Sprintf("the processor refused the guest's state (reason %#x, host CPU %d)", f.Reason, f.CPU)})
	default:
		return c.failed(&ExitError{Kind: ErrRun, Detail: "unexpected " + exit.Reason.String()})
	}
}

func (c *vcpu) servePort(io kvm.IO) error {
	for i := 0; i < len(io.Data); i += io.Size {
		data := io.Data[i : i+io.Size]
		if !io.Out {
			c.vm.pio.read(uint64(io.Port), data)
			continue
		}
		if err := c.vm.pio.write(uint64(io.Port), data); err != nil {
			return c.ended(err)
		}
	}
	return nil
}

// serveMMIO serves an access outside of RAM. One inside is KVM's answer to a page
// that could not be had, and completing it would make its contents up.
func (c *vcpu) serveMMIO(m kvm.MMIO) error {
	for _, r := range c.vm.mem.Ranges() {
		if m.Addr >= r.GPA && m.Addr < r.End() {
			return c.failed(&ExitError{Kind: ErrGuestMemory, Cause: c.vm.mem.Err()})
		}
	}
	if !m.Write {
		c.vm.mmio.read(m.Addr, m.Data)
		return nil
	}
	if err := c.vm.mmio.write(m.Addr, m.Data); err != nil {
		return c.ended(err)
	}
	return nil
}

func (c *vcpu) serveSystemEvent(e kvm.SystemEvent) error {
	switch e.Type {
	case kvm.EventShutdown:
		return c.failed(&ExitError{Kind: ErrPowerOff, Detail: "KVM system event"})
	case kvm.EventReset:
		return c.failed(&ExitError{Kind: ErrReset, Detail: "KVM system event"})
	default:
		return c.failed(&ExitError{Kind: ErrRun, Detail: fmt.Sprintf("KVM system event %d", e.Type)})
	}
}

func (c *vcpu) internalError(e kvm.InternalError) error {
	if e.Suberror == kvm.InternalEmulation {
		return &EmulationError{VCPU: c.id, RIP: c.rip(), Suberror: e.Suberror, Insn: e.Insn}
	}
	return c.failed(&ExitError{Kind: ErrRun, Detail: fmt.Sprintf("KVM internal error %d %#x", e.Suberror, e.Data)})
}

// ended adds to the error of a device where the guest was.
func (c *vcpu) ended(err error) error {
	var e *ExitError
	if !errors.As(err, &e) {
		e = &ExitError{Kind: ErrRun, Cause: err}
	}
	return c.failed(e)
}

func (c *vcpu) failed(e *ExitError) error {
	e.VCPU, e.RIP = c.id, c.rip()
	return e
}

// rip is for messages: 0 where it can't be read.
func (c *vcpu) rip() uint64 {
	regs, err := c.cpu.Regs()
	if err != nil {
		return 0
	}
	return regs.RIP
}
