package uffd

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// An FD is a userfaultfd. All methods are safe for concurrent use.
type FD struct {
	f        *os.File
	raw      syscall.RawConn
	features uint64 // what the kernel has
}

// Open makes a userfaultfd, from /dev/userfaultfd if that may be opened and
// from the system call otherwise. The error matches ErrNotPermitted or
// ErrKernel when it is one of these.
func Open() (*FD, error) {
	fd, err := openDevice()
	if err != nil {
		fd, err = openSyscall(err)
	}
	if err != nil {
		return nil, err
	}
	// The handshake comes before the descriptor joins the netpoller: polling
	// one that has not had it reports an error.
	features, err := handshake(fd)
	if err != nil {
		return nil, fmt.Errorf("userfaultfd: agree on the API: %w", errors.Join(err, unix.Close(fd)))
	}
	return wrap(fd, features)
}

// handshake asks for write protection too, and goes without where the kernel has
// never heard of it. It returns what the kernel has.
func handshake(fd int) (features uint64, err error) {
	hello := api{version: apiVersion, features: missingShmem | writeProtection}
	err = ioctl(uintptr(fd), reqAPI, &hello)
	if errors.Is(err, unix.EINVAL) {
		hello = api{version: apiVersion, features: missingShmem}
		err = ioctl(uintptr(fd), reqAPI, &hello)
	}
	if errors.Is(err, unix.EINVAL) {
		err = ErrKernel
	}
	return hello.features, err
}

func openDevice() (int, error) {
	dev, err := os.OpenFile("/dev/userfaultfd", os.O_RDWR, 0)
	if err != nil {
		return -1, err
	}
	defer dev.Close()
	fd, _, errno := unix.Syscall(unix.SYS_IOCTL, dev.Fd(), iocNew, unix.O_CLOEXEC|unix.O_NONBLOCK)
	if errno != 0 {
		return -1, errno
	}
	return int(fd), nil
}

// openSyscall is the way without the device, which could not be opened because
// of device.
func openSyscall(device error) (int, error) {
	fd, _, errno := unix.Syscall(unix.SYS_USERFAULTFD, unix.O_CLOEXEC|unix.O_NONBLOCK, 0, 0)
	switch errno {
	case 0:
		return int(fd), nil
	case unix.EPERM:
		return -1, fmt.Errorf("%w (%w)", ErrNotPermitted, device)
	case unix.ENOSYS:
		return -1, ErrKernel
	}
	return -1, fmt.Errorf("userfaultfd: %w", errno)
}

// wrap hands fd to the netpoller: Close wakes a reader that waits there, and
// would not wake one that is blocked in read(2).
func wrap(fd int, features uint64) (*FD, error) {
	f := os.NewFile(uintptr(fd), "userfaultfd")
	if err := f.SetReadDeadline(time.Time{}); err != nil {
		f.Close()
		return nil, fmt.Errorf("userfaultfd: wait for events: %w", err)
	}
	raw, err := f.SyscallConn()
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("userfaultfd: %w", err)
	}
	return &FD{f, raw, features}, nil
}

// Close ends all reads, and lets go of every registered range: a thread that
// waits for a page of it faults again as if the range had never been
// registered. It is idempotent.
func (d *FD) Close() error {
	if err := d.f.Close(); err != nil && !errors.Is(err, os.ErrClosed) {
		return fmt.Errorf("userfaultfd: close: %w", err)
	}
	return nil
}

// Register has the faults of [addr, addr+length), one or more whole mappings or
// a part of one, reported here instead of being served by the kernel.
func (d *FD) Register(addr, length uintptr, mode uint64) error {
	arg := register{span: span{uint64(addr), uint64(length)}, mode: mode}
	if err := control(d, reqRegister, &arg); err != nil {
		return fmt.Errorf("userfaultfd: register %d bytes: %w", length, err)
	}
	return nil
}

// Wake has all threads that wait for a page in the range look again.
func (d *FD) Wake(addr, length uintptr) error {
	if err := control(d, reqWake, &span{uint64(addr), uint64(length)}); err != nil {
		return fmt.Errorf("userfaultfd: wake %d bytes: %w", length, err)
	}
	return nil
}

// ZeroPage maps the zero page for every missing page of the range, which must
// lie in one mapping, and wakes all who wait there. Pages that are there
// already stay what they are. It returns how many it mapped; after an error
// that is a part of the range, from its start.
func (d *FD) ZeroPage(addr, length uintptr) (pages int, err error) {
	for done := uintptr(0); done < length; {
		arg := zeroPage{span: span{uint64(addr + done), uint64(length - done)}}
		err := control(d, reqZeroPage, &arg)
		if err == nil {
			arg.done = int64(length - done)
		}
		switch {
		case err == nil, errors.Is(err, unix.EAGAIN) && arg.done > 0:
			done += uintptr(arg.done)
			pages += int(arg.done / PageSize)
		case errors.Is(err, unix.EAGAIN):
			runtime.Gosched() // the mapping is being changed: try again
		case errors.Is(err, unix.EEXIST):
			// Somebody was faster. Who waits for that page may have missed it.
			if err := d.Wake(addr+done, PageSize); err != nil {
				return pages, err
			}
			done += PageSize
		default:
			return pages, fmt.Errorf("userfaultfd: zero %d bytes: %w", length-done, err)
		}
	}
	return pages, nil
}

// CanWriteProtect is nil if WriteProtect works for memory of all kinds, and
// otherwise ErrNoWriteProtect.
func (d *FD) CanWriteProtect() error {
	if d.features&writeProtection != writeProtection {
		return ErrNoWriteProtect
	}
	return nil
}

// WriteProtect has writes to the pages of the range that are there wait from now
// on, or takes that off again and lets those go that wait. The range must lie in
// one mapping that is registered with ModeWriteProtect. Pages of anonymous memory
// that are not there yet are not protected.
func (d *FD) WriteProtect(addr, length uintptr, on bool) error {
	arg := writeProtect{span: span{uint64(addr), uint64(length)}}
	if on {
		arg.mode = writeProtectOn
	}
	for {
		err := control(d, reqWriteProtect, &arg)
		if errors.Is(err, unix.EAGAIN) {
			runtime.Gosched() // the mapping is being changed: try again
			continue
		}
		if err != nil {
			return fmt.Errorf("userfaultfd: write protection of %d bytes: %w", length, err)
		}
		return nil
	}
}

// Read waits for faults and stores them in events, as many as there are. It
// returns ErrClosed after Close.
func (d *FD) Read(events []Event) (int, error) {
	if len(events) == 0 {
		return 0, nil
	}
	const size = unsafe.Sizeof(Event{})
	buf := unsafe.Slice((*byte)(unsafe.Pointer(&events[0])), uintptr(len(events))*size)
	for {
		n, err := d.f.Read(buf)
		switch {
		case err == nil:
			return n / int(size), nil
		case errors.Is(err, os.ErrClosed):
			return 0, ErrClosed
		case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EINTR):
		default:
			return 0, fmt.Errorf("userfaultfd: read: %w", err)
		}
	}
}

// Fault returns the page of a page fault and whether it was to be written. It
// is not ok for any other event; none are asked for.
func (e *Event) Fault() (addr uintptr, write, ok bool) {
	return uintptr(e.addr) &^ (PageSize - 1), e.flags&faultWrite != 0, e.event == eventPageFault
}

// Protected says whether a page fault is a write to a page that WriteProtect has
// protected: that page is there.
func (e *Event) Protected() bool { return e.flags&faultWP != 0 }

func ioctl[T any](fd, req uintptr, arg *T) error {
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, fd, req, uintptr(unsafe.Pointer(arg))); errno != 0 {
		return errno
	}
	return nil
}

// control is an ioctl on a descriptor that can't be closed meanwhile.
func control[T any](d *FD, req uintptr, arg *T) error {
	var err error
	cerr := d.raw.Control(func(fd uintptr) { err = ioctl(fd, req, arg) })
	if cerr != nil {
		return ErrClosed
	}
	return err
}
