//go:build linux && amd64

package kvm

import (
	"errors"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// file is a descriptor that is closed at most once. After that it is -1, so a
// late call gets ErrClosed and never reaches a descriptor that was opened since.
type file struct{ fd atomic.Int32 }

func (f *file) set(fd int) { f.fd.Store(int32(fd)) }

func (f *file) get() uintptr { return uintptr(f.fd.Load()) }

func (f *file) close(what string) error {
	fd := f.fd.Swap(-1)
	if fd < 0 {
		return nil
	}
	if err := unix.Close(int(fd)); err != nil {
		return &Error{Op: "close " + what, Err: err}
	}
	return nil
}

// fail is the error of a request that the kernel refused.
func (f *file) fail(op string, errno unix.Errno) error {
	if errno == unix.EBADF && f.fd.Load() < 0 {
		return &Error{Op: op, Err: ErrClosed}
	}
	return &Error{Op: op, Err: errno}
}

// ioctlVal makes a request whose argument is a number or nothing.
func ioctlVal(f *file, op string, req, arg uintptr) (int, error) {
	r, _, errno := unix.Syscall(unix.SYS_IOCTL, f.get(), req, arg)
	if errno != 0 {
		return 0, f.fail(op, errno)
	}
	return int(r), nil
}

// ioctlPtr makes a request whose argument is *p. For a list, p is its header
// and the whole list must be reachable from p.
func ioctlPtr[T any](f *file, op string, req uintptr, p *T) (int, error) {
	r, _, errno := unix.Syscall(unix.SYS_IOCTL, f.get(), req, uintptr(unsafe.Pointer(p)))
	if errno != 0 {
		return 0, f.fail(op, errno)
	}
	return int(r), nil
}

// get makes a request that fills a T.
func get[T any](f *file, op string, req uintptr) (T, error) {
	var v T
	_, err := ioctlPtr(f, op, req, &v)
	return v, err
}

// put makes a request that takes a T.
func put[T any](f *file, op string, req uintptr, v T) error {
	_, err := ioctlPtr(f, op, req, &v)
	return err
}

// retryEINTR repeats call while a signal interrupts it.
func retryEINTR(call func() (int, error)) (int, error) {
	for {
		n, err := call()
		if !errors.Is(err, unix.EINTR) {
			return n, err
		}
	}
}
