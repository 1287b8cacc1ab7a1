package nic

import "time"

// Tap is the host's side of the network. A Read or Write moves one frame behind a header of 12 bytes,
// struct virtio_net_hdr_v1. OpenTap and NewTap give one. Its methods are called from different goroutines,
// but each by one at a time.
type Tap interface {
	// Read waits for a frame. What is beyond p is lost. A deadline that passes ends the Read without losing a frame;
	// any other error means that there is nothing more to come.
	Read(p []byte) (int, error)
	// Write sends a frame and never waits. If the frame can't be sent now it fails, and the frame is dropped.
	Write(p []byte) (int, error)
	// SetReadDeadline is that of os.File: it ends a Read that waits.
	SetReadDeadline(t time.Time) error
	Close() error
}
