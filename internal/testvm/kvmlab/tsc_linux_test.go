//go:build linux && amd64

package kvmlab

import (
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// Requests of linux/kvm.h: _IO(0xAE, 0x01), _IO(0xAE, 0x41) and _IO(0xAE, 0xA3).
const (
	kvmCreateVM   = 0xAE01
	kvmCreateVCPU = 0xAE41
	kvmGetTSCKHz  = 0xAEA3
)

// TestTSCKHz compares the measured frequency with what the kernel knows.
func TestTSCKHz(t *testing.T) {
	fd, err := unix.Open("/dev/kvm", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Skipf("no KVM to ask: %v", err)
	}
	for _, request := range []uint{kvmCreateVM, kvmCreateVCPU} {
		file := os.NewFile(uintptr(fd), "kvm")
		defer file.Close()
		if fd, err = unix.IoctlRetInt(int(file.Fd()), request); err != nil {
			t.Fatal(err)
		}
	}
	vcpu := os.NewFile(uintptr(fd), "vcpu")
	defer vcpu.Close()
	want, err := unix.IoctlRetInt(int(vcpu.Fd()), kvmGetTSCKHz)
	if err != nil {
		t.Fatal(err)
	}
	got := int(tscKHz(sampleTSC()))
	if off := max(got-want, want-got); off > want/1000 {
		t.Errorf("measured %d kHz, the kernel says %d kHz", got, want)
	}
}
