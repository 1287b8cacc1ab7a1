package main

import (
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// entropy is what must differ between clones (random bytes of the kernel and of the machine's own source), and the
// boot id, which the clones share. The CID is what the host says.
func entropy() (string, error) {
	random := make([]byte, 32)
	if _, err := unix.Getrandom(random, 0); err != nil {
		return "", os.NewSyscallError("getrandom", err)
	}
	hw, err := hwrng()
	cid, cidErr := vsockCID()
	return fmt.Sprintf("random=%x hwrng=%s boot=%s cid=%s",
		random, hw, read("/proc/sys/kernel/random/boot_id"), cid), errors.Join(err, cidErr)
}

// buffered is more than Linux's driver of the machine's source of entropy, and the layer above it, fetch in advance. These
// bytes are in the memory of every clone.
const buffered = 480

// hwrng is what the machine's source of entropy gives when it is asked, or "none".
func hwrng() (string, error) {
	f, err := os.Open("/dev/hwrng")
	if err != nil { // without the device or its driver
		return "none", nil //nolint:nilerr // that is the answer
	}
	defer f.Close()
	b := make([]byte, buffered+32)
	_, err = io.ReadFull(f, b)
	return fmt.Sprintf("%x", b[buffered:]), err
}
