package virtio

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// EventFD is a Doorbell that KVM can ring (KVM_IOEVENTFD), and a bell that can raise an interrupt
// (KVM_IRQFD). Use NewEventFD.
type EventFD struct {
	file *os.File
	fd   int
}

// NewEventFD returns an eventfd that has not been rung. Close it.
func NewEventFD() (*EventFD, error) {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("virtio: eventfd: %w", err)
	}
	// Non-blocking, so that os.File waits for it in the poller and Close wakes who waits.
	return &EventFD{file: os.NewFile(uintptr(fd), "eventfd"), fd: fd}, nil
}

// FD is the file descriptor. It belongs to the EventFD and is valid until Close.
func (e *EventFD) FD() int { return e.fd }

// Ring implements Doorbell.
func (e *EventFD) Ring() error {
	conn, err := e.file.SyscallConn()
	if err != nil {
		return fmt.Errorf("virtio: ring an eventfd: %w", err)
	}
	var one [8]byte
	binary.NativeEndian.PutUint64(one[:], 1)
	var werr error
	err = conn.Control(func(fd uintptr) {
		_, werr = unix.Write(int(fd), one[:])
	})
	// EAGAIN says that the counter is full of rings that nobody has heard yet.
	if werr != nil && !errors.Is(werr, syscall.EAGAIN) {
		err = werr
	}
	if err != nil {
		return fmt.Errorf("virtio: ring an eventfd: %w", err)
	}
	return nil
}

// Wait implements Doorbell.
func (e *EventFD) Wait() error {
	var count [8]byte
	if _, err := e.file.Read(count[:]); err != nil {
		return fmt.Errorf("virtio: wait for an eventfd: %w", err)
	}
	return nil
}

// Close implements Doorbell.
func (e *EventFD) Close() error { return e.file.Close() }
