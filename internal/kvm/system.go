//go:build linux && amd64

package kvm

import (
	"errors"
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// DevicePath is where the kernel offers KVM.
const DevicePath = "/dev/kvm"

// APIVersion is the only version of KVM's interface since Linux 2.6.22.
const APIVersion = 12

// System is an open /dev/kvm.
type System struct {
	f        file
	mmapSize int
}

// Open opens the KVM device at path, usually DevicePath, and checks that it
// speaks APIVersion. The error matches fs.ErrNotExist where there is no KVM and
// fs.ErrPermission where the user may not use it.
func Open(path string) (*System, error) {
	fd, err := retryEINTR(func() (int, error) { return unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0) })
	if err != nil {
		return nil, &Error{Op: "open " + path, Err: err}
	}
	s := new(System)
	s.f.set(fd)
	if err := s.init(); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

func (s *System) init() error {
	const op = "KVM_GET_API_VERSION"
	v, err := ioctlVal(&s.f, op, reqGetAPIVersion, 0)
	if err != nil {
		return err
	}
	if v != APIVersion {
		return &Error{Op: op, Err: fmt.Errorf("version %d, want %d: %w", v, APIVersion, errors.ErrUnsupported)}
	}
	s.mmapSize, err = ioctlVal(&s.f, "KVM_GET_VCPU_MMAP_SIZE", reqGetVCPUMmapSize, 0)
	if err != nil {
		return err
	}
	if s.mmapSize < runSize {
		return &Error{Op: "KVM_GET_VCPU_MMAP_SIZE", Err: fmt.Errorf("%d bytes hold no kvm_run: %w", s.mmapSize, errors.ErrUnsupported)}
	}
	return nil
}

// Close releases the device. VMs made from it live on.
func (s *System) Close() error { return s.f.close("KVM device") }

// VCPUMmapSize returns the size in bytes of a vCPU's kvm_run mapping.
func (s *System) VCPUMmapSize() int { return s.mmapSize }

// CheckExtension returns what KVM says of a capability: 0 is absent, any other
// value is present and has a meaning of its own for some.
func (s *System) CheckExtension(c Cap) (int, error) {
	return ioctlVal(&s.f, "KVM_CHECK_EXTENSION "+c.String(), reqCheckExtension, uintptr(c))
}

// Require returns a *CapabilityError that names those of caps that are absent,
// or nil.
func (s *System) Require(caps ...Cap) error {
	var missing []Cap
	for _, c := range caps {
		v, err := s.CheckExtension(c)
		if err != nil {
			return err
		}
		if v == 0 {
			missing = append(missing, c)
		}
	}
	if missing != nil {
		return &CapabilityError{Missing: missing}
	}
	return nil
}

// CreateVM creates a machine without memory, devices and vCPUs.
func (s *System) CreateVM() (*VM, error) {
	// Registering the MMU notifier gives up when a signal is pending, and the
	// runtime sends signals of its own at any time.
	fd, err := retryEINTR(func() (int, error) {
		return ioctlVal(&s.f, "KVM_CREATE_VM", reqCreateVM, 0)
	})
	if err != nil {
		return nil, err
	}
	vm := &VM{mmapSize: s.mmapSize, slots: make(map[uint32]uint64)}
	vm.f.set(fd)
	// The size is a property of the VM's descriptor: of the process's
	// permissions for dynamic features, such as AMX, when it was created.
	if vm.xsaveSize, err = vm.CheckExtension(CapXSave2); err != nil {
		return nil, errors.Join(err, vm.Close())
	}
	return vm, nil
}

// MSRIndexList returns the model specific registers that this KVM saves and
// restores, in the kernel's order.
func (s *System) MSRIndexList() ([]uint32, error) {
	const op = "KVM_GET_MSR_INDEX_LIST"
	for n := 256; ; n *= 2 {
		list := make([]uint32, 1+n) // nmsrs, then the indices
		list[0] = uint32(n)
		_, err := ioctlPtr(&s.f, op, reqGetMSRIndexList, unsafe.SliceData(list))
		if errors.Is(err, unix.E2BIG) && n < maxList {
			continue
		}
		if err != nil {
			return nil, err
		}
		if int(list[0]) > n {
			return nil, &Error{Op: op, Err: fmt.Errorf("%d registers in a list of %d: %w", list[0], n, ErrShortBuffer)}
		}
		return list[1 : 1+list[0] : 1+list[0]], nil
	}
}

// SupportedCPUID returns the CPUID leaves that this KVM can show to a guest on
// this processor.
func (s *System) SupportedCPUID() ([]CPUIDEntry, error) {
	return getCPUID(&s.f, "KVM_GET_SUPPORTED_CPUID", reqGetSupportedCPUID)
}
