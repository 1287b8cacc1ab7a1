// Package nic is the virtio network device (virtio 1.2, section 5.1) in front of a tap of the host, with one pair
// of queues and a control queue.
//
// Nothing is offloaded, so that the header before each frame has one value in each direction, and a frame is
// what was on the wire. Mergeable receive buffers are not offered either: the chains of one frame would have to
// become visible to the driver at once, and without offloads a frame fits in one chain anyway. There are no filters:
// the driver gets every frame that the host sends to the tap.
//
// # Frames and snapshots
//
// One goroutine reads the tap while the device is started. What it has read waits in a backlog of a few
// frames for buffers of the driver; when that is full nothing more is read, and the host's own queue decides what is
// dropped. The backlog outlives Stop and Reset: within a process a frame that was read is delivered. It is not part
// of a saved state, so that what it holds is lost in a snapshot, as frames are on any network.
//
// A restored device has its driver announce the machine to the network (section 5.1.6.5.4), since it may
// be behind another port of a switch now.
package nic
