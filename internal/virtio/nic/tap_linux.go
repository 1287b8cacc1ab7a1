package nic

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

const tunDevice = "/dev/net/tun"

// tapFlags is what a tap must have been opened with: frames, without packet information, behind a header.
const tapFlags = unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR

// OpenTap is AttachTap and NewTap.
func OpenTap(name string) (Tap, error) {
	fd, err := AttachTap(name)
	if err != nil {
		return nil, err
	}
	return NewTap(fd)
}

// AttachTap opens a descriptor of the tap interface of that name in this thread's network namespace, for NewTap. If
// there is none it makes one, for which CAP_NET_ADMIN is needed, and which goes when the last descriptor is
// closed. An empty name lets the kernel choose.
func AttachTap(name string) (fd int, err error) {
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		return -1, fmt.Errorf("nic: tap %q: the name must be shorter than %d bytes: %w", name, unix.IFNAMSIZ, err)
	}
	fd, err = unix.Open(tunDevice, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return -1, fmt.Errorf("nic: tap %q: open %s: %w", name, tunDevice, err)
	}
	ifr.SetUint16(tapFlags)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr); err != nil {
		_ = unix.Close(fd)
		return -1, fmt.Errorf("nic: attach to tap %q (it may be in use, be no tap, or need CAP_NET_ADMIN): %w", name, err)
	}
	return fd, nil
}

// NewTap uses a descriptor of /dev/net/tun that is attached to a tap with IFF_TAP, IFF_NO_PI and
// IFF_VNET_HDR, as a more privileged process may have passed it. The descriptor belongs to the Tap from now on,
// and is closed if NewTap fails. NewTap makes it non-blocking and turns offloads off.
func NewTap(fd int) (Tap, error) {
	if err := setUpTap(fd); err != nil {
		_ = unix.Close(fd)
		return nil, err
	}
	// Only now: the poller that os.File uses would not hear of a tap that was attached after the file was made.
	file := os.NewFile(uintptr(fd), tunDevice)
	return &fileTap{file}, nil
}

func setUpTap(fd int) error {
	ifr, err := unix.NewIfreq("")
	if err != nil {
		return fmt.Errorf("nic: %w", err)
	}
	if err := unix.IoctlIfreq(fd, unix.TUNGETIFF, ifr); err != nil {
		return fmt.Errorf("nic: descriptor %d is not attached to a tap: %w", fd, err)
	}
	if ifr.Uint16()&tapFlags != tapFlags {
		return fmt.Errorf("%w: interface %s has flags %#x, and needs IFF_TAP, IFF_NO_PI and IFF_VNET_HDR (%#x)",
			ErrConfig, ifr.Name(), ifr.Uint16(), tapFlags)
	}
	if err := unix.IoctlSetPointerInt(fd, unix.TUNSETVNETHDRSZ, headerSize); err != nil {
		return fmt.Errorf("nic: set the header size of %s: %w", ifr.Name(), err)
	}
	if err := unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, 0); err != nil {
		return fmt.Errorf("nic: turn the offloads of %s off: %w", ifr.Name(), err)
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		return fmt.Errorf("nic: make the descriptor of %s non-blocking: %w", ifr.Name(), err)
	}
	return nil
}

// fileTap is a non-blocking descriptor on which a read or write moves one frame.
type fileTap struct{ *os.File }

// Write makes one attempt, where that of os.File waits until the descriptor takes the frame.
func (t *fileTap) Write(p []byte) (int, error) {
	conn, err := t.SyscallConn()
	if err != nil {
		return 0, err
	}
	var n int
	var werr error
	err = conn.Write(func(fd uintptr) bool {
		n, werr = unix.Write(int(fd), p)
		return true
	})
	if err == nil {
		err = werr
	}
	return max(n, 0), err
}
