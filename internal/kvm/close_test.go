//go:build linux && amd64

package kvm

import (
	"errors"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// held counts what this process has of KVM: descriptors and mappings.
func held(t *testing.T) (fds, mappings int) {
	t.Helper()
	for _, e := range must1(os.ReadDir("/proc/self/fd"))(t) {
		if target, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil && strings.Contains(target, "kvm") {
			fds++
		}
	}
	maps := must1(os.ReadFile("/proc/self/maps"))(t)
	return fds, strings.Count(string(maps), "kvm-vcpu")
}

func TestCloseReleasesAll(t *testing.T) {
	fds, mappings := held(t)
	for range 3 {
		s := openKVM(t)
		vm := must1(s.CreateVM())(t)
		must(t, vm.CreateIRQChip())
		a, b := must1(vm.CreateVCPU(0))(t), must1(vm.CreateVCPU(1))(t)
		if f, m := held(t); f != fds+4 || m != mappings+2 {
			t.Fatalf("a machine with two vCPUs holds %d descriptors and %d mappings", f-fds, m-mappings)
		}
		for _, c := range []interface{ Close() error }{a, vm, s, b, a, vm, s, b} { // in any order, and again
			must(t, c.Close())
		}
		if f, m := held(t); f != fds || m != mappings {
			t.Fatalf("%d descriptors and %d mappings are left", f-fds, m-mappings)
		}
	}
}

func TestFailuresReleaseAll(t *testing.T) {
	s := openKVM(t)
	vm := must1(s.CreateVM())(t)
	defer vm.Close()
	v := must1(vm.CreateVCPU(0))(t)
	defer v.Close()
	fds, mappings := held(t)
	if _, err := vm.CreateVCPU(0); !errors.Is(err, unix.EEXIST) {
		t.Errorf("the same vCPU again: %v", err)
	}
	if _, err := Open("/dev/null"); err == nil {
		t.Error("/dev/null is no KVM")
	}
	_ = must1(Interpreted(s))(t)
	if f, m := held(t); f != fds || m != mappings {
		t.Errorf("%d descriptors and %d mappings are left", f-fds, m-mappings)
	}
}

func TestUseAfterClose(t *testing.T) {
	s := openKVM(t)
	vm := must1(s.CreateVM())(t)
	v := must1(vm.CreateVCPU(0))(t)
	must(t, v.Close())
	must(t, vm.Close())
	if _, err := v.Run(); !errors.Is(err, ErrClosed) {
		t.Errorf("Run: %v", err)
	}
	if err := v.Kick(unix.Gettid()); !errors.Is(err, ErrClosed) {
		t.Errorf("Kick: %v", err)
	}
	v.SetImmediateExit(true)
	if _, err := v.Regs(); !errors.Is(err, ErrClosed) {
		t.Errorf("Regs: %v", err)
	}
	if _, err := vm.CreateVCPU(1); !errors.Is(err, ErrClosed) {
		t.Errorf("CreateVCPU: %v", err)
	}
}

// TestKickDuringClose has other goroutines kick and set immediate_exit while
// the owner unmaps the page that they write to.
func TestKickDuringClose(t *testing.T) {
	s := openKVM(t)
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	tid := unix.Gettid()
	for range 20 {
		vm := must1(s.CreateVM())(t)
		v := must1(vm.CreateVCPU(0))(t)
		var wg sync.WaitGroup
		started := make(chan struct{}, 2)
		wg.Go(func() {
			started <- struct{}{}
			for {
				if err := v.Kick(tid); errors.Is(err, ErrClosed) {
					return
				}
			}
		})
		wg.Go(func() {
			started <- struct{}{}
			for range 1000 {
				v.SetImmediateExit(false)
			}
		})
		<-started
		<-started
		must(t, v.Close())
		wg.Wait()
		must(t, vm.Close())
	}
}
