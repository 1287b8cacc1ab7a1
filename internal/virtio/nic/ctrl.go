package nic

import "github.com/cryovisor/cryovisor/internal/virtio"

// Commands of the control queue (section 5.1.6.5): a class (1 byte), a command (1), data; and the device's
// answer (1), which follows in its own buffer.
const (
	classAnnounce   = 3 // VIRTIO_NET_CTRL_ANNOUNCE
	commandAnnounce = 0 // VIRTIO_NET_CTRL_ANNOUNCE_ACK

	answerOK  = 0 // VIRTIO_NET_OK
	answerErr = 1 // VIRTIO_NET_ERR
)

// obey executes the driver's commands, at most as many as the queue holds.
func (d *Device) obey() (n int, err error) {
	if d.ctrl == nil {
		return 0, nil
	}
	for n < d.ctrl.Size() {
		c, err := d.ctrl.Pop()
		if err != nil {
			return n, err
		}
		if c == nil {
			break
		}
		n++
		if err = d.command(c); err != nil {
			return n, complete(d.ctrl, c, 0, err)
		}
		if err := complete(d.ctrl, c, 1, nil); err != nil {
			return n, err
		}
	}
	return n, d.ctrl.Notify()
}

// command executes one command and writes the answer. Commands for features that are not offered, receive
// filters among them, are refused.
func (d *Device) command(c *virtio.Chain) error {
	if c.Writable.Len() == 0 {
		return virtio.ProtocolErrorf("a command without room for the answer")
	}
	answer := [1]byte{answerErr}
	var head [2]byte
	if c.Readable.Len() >= int64(len(head)) {
		if err := c.Readable.ReadAt(head[:], 0); err != nil {
			return err
		}
		if head == [2]byte{classAnnounce, commandAnnounce} && d.acknowledge() {
			answer[0] = answerOK
		}
	}
	return c.Writable.WriteAt(answer[:], 0)
}

// acknowledge ends an announcement, if the driver knows of such a thing.
func (d *Device) acknowledge() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.cfg.features&FeatureAnnounce == 0 {
		return false
	}
	d.cfg.announce = false
	return true
}
