package vmm

import (
	"errors"
	"fmt"
	"io/fs"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/cryovisor/cryovisor/internal/kvm"
	"github.com/cryovisor/cryovisor/memory"
)

// requiredCaps is what every machine needs of KVM.
var requiredCaps = []kvm.Cap{
	kvm.CapIRQChip, kvm.CapUserMemory, kvm.CapSetTSSAddr, kvm.CapExtCPUID, kvm.CapMPState,
	kvm.CapPIT2, kvm.CapPITState2, kvm.CapSetIdentityMapAddr, kvm.CapAdjustClock, kvm.CapVCPUEvents,
	kvm.CapDebugRegs, kvm.CapXSave, kvm.CapXCRS, kvm.CapGetTSCKHz, kvm.CapImmediateExit,
}

// Probe looks at what this machine can do. It fails with a HostError of kind
// ErrNoKVM, ErrPermission or ErrCapability when no VM can run on it.
func Probe() (Host, error) {
	sys, err := openKVM(kvm.DevicePath)
	if err != nil {
		return Host{}, err
	}
	defer sys.Close()
	h := Host{MemoryBytes: hostMemory()}
	if h.MaxVCPUs, err = sys.CheckExtension(kvm.CapMaxVCPUs); err != nil {
		return Host{}, err
	}
	h.MaxVCPUs = min(max(h.MaxVCPUs, 1), MaxVCPUs)
	h.Interpreted = checkInterpreted(sys)
	if h.Interpreted != nil && !errors.Is(h.Interpreted, ErrInterpreted) {
		return Host{}, h.Interpreted
	}
	h.Lazy = CheckLazy()
	return h, nil
}

// openKVM opens the KVM device at path and checks that it has what every machine
// needs.
func openKVM(path string) (*kvm.System, error) {
	sys, err := kvm.Open(path)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO):
		return nil, &HostError{
			Kind: ErrNoKVM, What: path, Cause: err,
			Do: "switch virtualization on in the firmware and load kvm-intel or kvm-amd; in a container, pass the device in",
		}
	case errors.Is(err, fs.ErrPermission):
		return nil, &HostError{
			Kind: ErrPermission, What: path, Cause: err,
			Do: "run as root or as a member of the group that owns it (usually kvm)",
		}
	case err != nil:
		return nil, &HostError{
			Kind: ErrNoKVM, What: path, Cause: err,
			Do: "check that it is the device of a KVM with API version 12 (character device 10, 232)",
		}
	}
	if err := sys.Require(requiredCaps...); err != nil {
		return nil, errors.Join(&HostError{
			Kind: ErrCapability, Cause: err, Do: "use Linux 4.16 or later with in-kernel interrupt controllers",
		}, sys.Close())
	}
	return sys, nil
}

// interpreted caches what the probe found, which needs a VM of its own.
var interpreted struct {
	sync.Mutex
	known  bool
	answer bool
}

// checkInterpreted returns a HostError if this KVM interprets kernel-mode code.
func checkInterpreted(sys *kvm.System) error {
	interpreted.Lock()
	defer interpreted.Unlock()
	if !interpreted.known {
		answer, err := kvm.Interpreted(sys)
		if err != nil {
			return err
		}
		interpreted.known, interpreted.answer = true, answer
	}
	if !interpreted.answer {
		return nil
	}
	return &HostError{
		Kind: ErrInterpreted, What: "it has no VT-x or SVM to run on",
		Do: "boot operating systems on a host with VT-x or SVM, or with nested virtualization switched on",
	}
}

// CheckLazy returns nil if guest memory can be paged in while the guest runs, and
// otherwise a HostError of kind ErrNoUserfaultfd.
func CheckLazy() error {
	err := memory.LazySupport()
	if err == nil {
		return nil
	}
	return &HostError{
		Kind: ErrNoUserfaultfd, Cause: err,
		Do: "an eager resume works without it", // the cause says how to get it
	}
}

func hostMemory() uint64 {
	var si unix.Sysinfo_t
	if err := unix.Sysinfo(&si); err != nil {
		return 0
	}
	return si.Totalram * uint64(si.Unit)
}

func checkHostMemory(guest uint64, overcommit bool) error {
	host := hostMemory()
	if overcommit || host == 0 || guest <= host {
		return nil
	}
	return &HostError{
		Kind: ErrHostMemory, What: fmt.Sprintf("the guest has %d MiB, the host %d MiB", guest>>20, host>>20),
		Do: "use a larger host, or allow overcommitment if the guest touches little of it",
	}
}
