//go:build linux && amd64

package linuxvm

import "github.com/cryovisor/cryovisor/internal/testvm/kvmlab"

// deviceModules are the drivers of all of the machine's virtio devices, and ext4, as far as a kernel has them as modules.
func deviceModules(kernel string) []string {
	modules := []string{
		"virtio_mmio", "virtio_blk", "virtio_rng", "virtio_balloon", "virtio_net", "vmw_vsock_virtio_transport",
	}
	if kernel == kvmlab.Generic {
		// ext4 asks for the checksum by name, so that no module depends on it.
		modules = append(modules, "crc32c_generic", "ext4")
	}
	return modules
}
