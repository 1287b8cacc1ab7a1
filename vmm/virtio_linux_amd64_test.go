package vmm_test

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"
	"testing"

	"github.com/cryovisor/cryovisor/blockdev"
	"github.com/cryovisor/cryovisor/internal/testvm"
	"github.com/cryovisor/cryovisor/vmm"
)

// disk is a disk of zeros whose flushes can be made to fail, or to hang until hold is closed.
type disk struct {
	size    int64
	flushes atomic.Int64
	broken  atomic.Bool
	hold    chan struct{}
}

var errBroken = errors.New("the disk is broken")

func (d *disk) ReadAt(p []byte, _ int64) (int, error)  { clear(p); return len(p), nil }
func (d *disk) WriteAt(p []byte, _ int64) (int, error) { return len(p), nil }
func (d *disk) Discard(int64, int64) error             { return nil }
func (d *disk) WriteZeroes(int64, int64) error         { return nil }
func (d *disk) Size() int64                            { return d.size }
func (d *disk) BlockSize() int                         { return blockdev.MinBlockSize }
func (d *disk) ReadOnly() bool                         { return false }

func (d *disk) Flush() error {
	d.flushes.Add(1)
	if d.hold != nil {
		<-d.hold
	}
	if d.broken.Load() {
		return errBroken
	}
	return nil
}

func withDisk(t *testing.T, d *disk) *worker {
	t.Helper()
	needKVM(t)
	g := newWorker(t, testvm.WorkerConfig{Every: 8})
	g.more.Disks = []vmm.Disk{{Name: "data", Device: d}}
	return g
}

// TestDevicesThroughMachines moves a machine with devices that its guest does not use, several times.
func TestDevicesThroughMachines(t *testing.T) {
	d := &disk{size: 1 * mib}
	g := withDisk(t, d)
	g.more.Vsock = &vmm.Vsock{CID: 3, Path: filepath.Join(t.TempDir(), "vsock")}
	vm := g.boot(t, testvm.NoLimit)
	must(t, vm.Start())
	for i := range 3 {
		g.work(t, vm, 5)
		pause(t, vm)
		if n := d.flushes.Load(); n != int64(i+1) {
			t.Errorf("%d flushes of the disk, want %d", n, i+1)
		}
		var names []string
		for _, dev := range encoded(t, vm).Devices {
			names = append(names, dev.Name)
		}
		if want := []string{"serial0", "disk/data", "vsock"}; !slices.Equal(names, want) {
			t.Errorf("devices %q, want %q", names, want)
		}
		vm = move(t, vm, g.hardware(testvm.NoLimit))
		must(t, vm.Resume())
		conn, err := net.Dial("unix", g.more.Vsock.Path)
		must(t, err)
		must(t, conn.Close())
	}
	if err := vm.SetBalloon(1 << 20); !errors.Is(err, vmm.ErrConfig) || vm.Balloon() != 0 {
		t.Errorf("a machine without a balloon: %v, %d bytes in it", err, vm.Balloon())
	}
	g.check(t, vm)
}

// TestPauseFailsWithTheDisk: a disk that can't be flushed fails the pause, and the guest runs on.
func TestPauseFailsWithTheDisk(t *testing.T) {
	d := &disk{size: 1 * mib}
	g := withDisk(t, d)
	vm := g.boot(t, testvm.NoLimit)
	must(t, vm.Start())
	d.broken.Store(true)
	for range 3 {
		if err := vm.Pause(testContext(t)); !errors.Is(err, errBroken) || vm.Paused() {
			t.Fatalf("paused %t, %v", vm.Paused(), err)
		}
		g.work(t, vm, 5)
	}
	d.broken.Store(false)
	pause(t, vm)
	vm = move(t, vm, g.hardware(testvm.NoLimit))
	must(t, vm.Resume())
	g.work(t, vm, 5)
	g.check(t, vm)
}

// TestRestoreNeedsItsDevices: those that the guest was booted with, of the same size.
func TestRestoreNeedsItsDevices(t *testing.T) {
	g := withDisk(t, &disk{size: 1 * mib})
	vm := g.boot(t, testvm.NoLimit)
	must(t, vm.Start())
	pause(t, vm)
	state := encoded(t, vm)
	same := g.hardware(testvm.NoLimit)
	must(t, vmm.CheckHost(state, same))
	for name, tc := range map[string]struct {
		change func(*vmm.Hardware)
		want   error
	}{
		"no disk":       {func(hw *vmm.Hardware) { hw.Disks = nil }, vmm.ErrConfig},
		"another name":  {func(hw *vmm.Hardware) { hw.Disks = []vmm.Disk{{Name: "root", Device: &disk{size: 1 * mib}}} }, vmm.ErrConfig},
		"one too many":  {func(hw *vmm.Hardware) { hw.Vsock = &vmm.Vsock{CID: 3, Path: "never"} }, vmm.ErrConfig},
		"another size":  {func(hw *vmm.Hardware) { hw.Disks = []vmm.Disk{{Name: "data", Device: &disk{size: 2 * mib}}} }, vmm.ErrState},
		"unusable size": {func(hw *vmm.Hardware) { hw.Disks = []vmm.Disk{{Name: "data", Device: &disk{size: 100}}} }, vmm.ErrConfig},
	} {
		t.Run(name, func(t *testing.T) {
			hw := same
			tc.change(&hw)
			restoreFails(t, state, hw, tc.want)
		})
	}
	for i, d := range state.Devices {
		if d.Name == "disk/data" {
			state.Devices = append(slices.Clone(state.Devices), d)
			restoreFails(t, state, same, vmm.ErrState)
			state.Devices = state.Devices[:len(state.Devices)-1]
			state.Devices[i].Data = d.Data[:len(d.Data)-1]
			restoreFails(t, state, same, vmm.ErrState)
		}
	}
}

// TestPauseGivesUpOnASlowDisk: the context ends a pause that a disk holds up, and the guest runs on.
func TestPauseGivesUpOnASlowDisk(t *testing.T) {
	d := &disk{size: 1 * mib, hold: make(chan struct{})}
	g := withDisk(t, d)
	vm := g.boot(t, testvm.NoLimit)
	must(t, vm.Start())
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		waitFor(t, vm, func() bool { return d.flushes.Load() > 0 })
		cancel()
	}()
	if err := vm.Pause(ctx); !errors.Is(err, context.Canceled) || vm.Paused() {
		t.Fatalf("paused %t, %v", vm.Paused(), err)
	}
	g.work(t, vm, 5)
	close(d.hold)
	pause(t, vm)
	must(t, vm.Resume())
	g.work(t, vm, 5)
	g.check(t, vm)
}

// TestDisconnect: another machine can have the sockets of one of which KVM still has its own.
func TestDisconnect(t *testing.T) {
	needKVM(t)
	g := newWorker(t, testvm.WorkerConfig{})
	g.more.Vsock = &vmm.Vsock{CID: 3, Path: filepath.Join(t.TempDir(), "vsock")}
	open := openVMs(t)
	vm := g.boot(t, testvm.NoLimit)
	must(t, vm.Start())
	g.work(t, vm, 5)
	must(t, vm.Disconnect())
	must(t, vm.Disconnect())
	if err := vm.TrackDirty(true); !errors.Is(err, vmm.ErrClosed) {
		t.Errorf("tracking: %v", err)
	}
	if n := openVMs(t); n != open+1 {
		t.Errorf("%d VMs are open, want %d", n, open+1)
	}
	next := newWorker(t, testvm.WorkerConfig{})
	next.more.Vsock = g.more.Vsock
	another := next.boot(t, testvm.NoLimit)
	must(t, another.Start())
	next.work(t, another, 5)
	must(t, vm.Close())
	must(t, vm.Close())
	if n := openVMs(t); n != open+1 {
		t.Errorf("%d VMs are open when one is closed, want %d", n, open+1)
	}
	next.work(t, another, 5)
	must(t, another.Close())
}

// openVMs is how many VMs of KVM's this process has.
func openVMs(t *testing.T) (n int) {
	t.Helper()
	files, err := os.ReadDir("/proc/self/fd")
	must(t, err)
	for _, f := range files {
		if to, err := os.Readlink(filepath.Join("/proc/self/fd", f.Name())); err == nil && to == "anon_inode:kvm-vm" {
			n++
		}
	}
	return n
}

// TestVsockPathInUse: a second machine may not take the first one's socket.
func TestVsockPathInUse(t *testing.T) {
	needKVM(t)
	g := newWorker(t, testvm.WorkerConfig{})
	g.more.Vsock = &vmm.Vsock{CID: 3, Path: filepath.Join(t.TempDir(), "vsock")}
	g.boot(t, testvm.NoLimit)
	_, err := vmm.New(vmm.Config{
		MemoryBytes: g.Config().Memory, VCPUs: g.Config().VCPUs, Boot: g.Image().Program(), Hardware: g.hardware(testvm.NoLimit),
	})
	if !errors.Is(err, vmm.ErrConfig) {
		t.Errorf("%v, want ErrConfig", err)
	}
}
