//go:build linux && amd64

package vmm

import (
	"os"

	"github.com/cryovisor/cryovisor/internal/virtio/nic"
)

// OpenTap opens the tap interface of that name, of this thread's network namespace,
// as a NIC needs it; the caller closes it. If there is no such interface it makes
// one, which takes CAP_NET_ADMIN, and which goes when the file is closed. An empty
// name lets the kernel choose.
func OpenTap(name string) (*os.File, error) {
	fd, err := nic.AttachTap(name)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), "tap "+name), nil
}
