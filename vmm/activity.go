package vmm

import "time"

// Activity is what a guest has done since its machine was made, as far as it shows from outside.
type Activity struct {
	VCPU   time.Duration // processor time of its vCPUs' threads
	Frames uint64        // frames and packets through virtio-net and vsock, in both directions
}
