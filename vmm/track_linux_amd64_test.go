package vmm_test

import (
	"encoding/binary"
	"errors"
	"hash/maphash"
	"slices"
	"sync"
	"testing"

	"github.com/cryovisor/cryovisor/internal/testvm"
	"github.com/cryovisor/cryovisor/internal/testvm/kvmlab"
	"github.com/cryovisor/cryovisor/memory"
	"github.com/cryovisor/cryovisor/vmm"
)

// A follower has a copy of a machine's memory, of which it keeps hashes, and brings it up to date with
// what TakeDirty says and nothing else.
type follower struct {
	seed  maphash.Seed
	pages map[uint64]uint64 // by address; what is not in it is zero
}

// follow copies all memory of a paused machine.
func follow(t testing.TB, mem *memory.Memory) *follower {
	t.Helper()
	f := &follower{maphash.MakeSeed(), make(map[uint64]uint64)}
	dirty, err := mem.Dirty(t.Context())
	must(t, err)
	f.read(t, mem, dirty)
	return f
}

func (f *follower) read(t testing.TB, mem *memory.Memory, ranges []memory.Range) {
	t.Helper()
	buf := make([]byte, memory.PageSize)
	for _, r := range ranges {
		for gpa := r.GPA; gpa < r.End(); gpa += memory.PageSize {
			_, err := mem.ReadAt(buf, int64(gpa))
			must(t, err)
			f.pages[gpa] = maphash.Bytes(f.seed, buf)
		}
	}
}

// take brings the copy up to date, and returns the answer of TakeDirty, which is in order.
func (f *follower) take(t testing.TB, vm *vmm.VM) []memory.Range {
	t.Helper()
	dirty, err := vm.TakeDirty()
	must(t, err)
	for i := range dirty {
		if i > 0 && dirty[i].GPA <= dirty[i-1].End() {
			t.Fatalf("%x after %x", dirty[i], dirty[i-1])
		}
	}
	f.read(t, vm.Memory(), dirty)
	return dirty
}

// check compares the copy with all memory of a paused machine.
func (f *follower) check(t testing.TB, vm *vmm.VM) {
	t.Helper()
	now := &follower{f.seed, make(map[uint64]uint64)}
	dirty, err := vm.Memory().Dirty(t.Context())
	must(t, err)
	now.read(t, vm.Memory(), dirty)
	zero := maphash.Bytes(f.seed, make([]byte, memory.PageSize))
	for gpa, hash := range now.pages {
		if have, ok := f.pages[gpa]; ok && have != hash || !ok && hash != zero {
			t.Fatalf("page %#x was written, and TakeDirty did not say so", gpa)
		}
	}
}

// bytesOf is how much memory the ranges are.
func bytesOf(ranges []memory.Range) (n uint64) {
	for _, r := range ranges {
		n += r.Len
	}
	return n
}

// TestLinuxTrackDirty runs TestTrackDirty and its likes on KVM with a processor behind it.
func TestLinuxTrackDirty(t *testing.T) {
	kvmlab.RunTest(t, kvmlab.Config{}, func(t *testing.T) {
		t.Run("epochs", TestTrackDirty)
		t.Run("lazy", TestTrackDirtyOfALazyMachine)
		t.Run("clock", TestTrackDirtySeesKVM)
		t.Run("stuck", TestTrackDirtyIsNotInTheWayOfClose)
	})
}

// TestTrackDirty has a copy follow a guest on both sides of the 32-bit hole: in epochs while it runs, and
// where it is paused, where the copy has to be the memory.
func TestTrackDirty(t *testing.T) {
	g := newWorker(t, testvm.WorkerConfig{Memory: 3<<30 + 256*mib, Every: 64, WorkingSet: 16 * mib, VCPUs: 2})
	g.more.AllowOvercommit = true // it touches little of that
	g.content = testvm.Content(zeros{})
	g.model = testvm.NewModel(g.Worker, g.content)
	vm := g.boot(t, testvm.NoLimit)
	if _, err := vm.TakeDirty(); !errors.Is(err, vmm.ErrRunState) {
		t.Errorf("before TrackDirty: %v", err)
	}
	must(t, vm.Start())
	g.work(t, vm, 10)
	for range 2 {
		// Off again and on: what was written in between is in no answer.
		pause(t, vm)
		must(t, vm.TrackDirty(true))
		f := follow(t, vm.Memory())
		if dirty := f.take(t, vm); dirty != nil {
			t.Errorf("%x, and the machine has not run", dirty)
		}
		followEpochs(t, g, vm, f)
		takeDeviceWrites(t, vm, f)
		must(t, vm.TrackDirty(false))
		must(t, vm.TrackDirty(false))
		if _, err := vm.TakeDirty(); !errors.Is(err, vmm.ErrRunState) {
			t.Errorf("after TrackDirty(false): %v", err)
		}
		must(t, vm.Resume())
		g.work(t, vm, 10)
	}
	if !testing.Short() && !kvmlab.Inside() { // to look at all bytes takes an emulated processor minutes
		g.check(t, vm)
	}
}

// followEpochs has a paused machine work, and pauses it again.
func followEpochs(t *testing.T, g *worker, vm *vmm.VM, f *follower) {
	t.Helper()
	var low, high bool
	for pauses := range 3 {
		must(t, vm.Resume())
		for range rounds(40) {
			g.work(t, vm, 1)
			must(t, vm.TrackDirty(true)) // forgets nothing
			f.take(t, vm)
		}
		must(t, vm.TrackDirty(true))
		g.work(t, vm, 40)
		pause(t, vm)
		dirty := f.take(t, vm)
		f.check(t, vm)
		if dirty := f.take(t, vm); dirty != nil {
			t.Errorf("%x were taken before, and the machine has not run", dirty)
		}
		for _, r := range dirty {
			low = low || r.GPA >= g.PageGPA(0) && r.End() <= 3<<30
			high = high || r.GPA >= 4<<30
		}
		// The guest's data, and the pages below, of which the processor's tables are the most.
		if n := bytesOf(dirty); n == 0 || n > 16*mib+g.PageGPA(0) {
			t.Errorf("pause %d: %d bytes are dirty, of a working set of 16 MiB", pauses, n)
		}
	}
	if !low || !high {
		t.Errorf("the guest's writes: some below 3 GiB %t, some above 4 GiB %t", low, high)
	}
}

// takeDeviceWrites writes what is there already, as a device would: these pages are in the answer, and no others.
func takeDeviceWrites(t *testing.T, vm *vmm.VM, f *follower) {
	t.Helper()
	for _, gpa := range []int64{memory.PageSize, 3<<30 - 2*memory.PageSize, 4<<30 + mib} {
		p := make([]byte, memory.PageSize)
		_, err := vm.Memory().ReadAt(p, gpa+100)
		must(t, err)
		_, err = vm.Memory().WriteAt(p, gpa+100)
		must(t, err)
		want := []memory.Range{{GPA: uint64(gpa), Len: 2 * memory.PageSize}}
		if dirty := f.take(t, vm); !slices.Equal(dirty, want) {
			t.Errorf("a device wrote %x, and %x are dirty", want, dirty)
		}
	}
}

// moveLazily moves a paused VM into a new one whose pages come as the guest needs them.
func moveLazily(t *testing.T, from *vmm.VM, state *vmm.State, g *worker) *vmm.VM {
	t.Helper()
	img, err := memory.NewImage(from.Memory().Size(), &badSource{mem: from.Memory(), bad: ^uint64(0)})
	must(t, err)
	mem, err := img.Map(t.Context(), memory.MapOptions{})
	if errors.Is(err, memory.ErrNotPermitted) || errors.Is(err, memory.ErrKernel) || errors.Is(err, memory.ErrHugeShmem) {
		must(t, img.Close())
		t.Skip(err)
	}
	must(t, errors.Join(err, img.Close()))
	vm, err := vmm.Restore(state, mem, g.hardware(testvm.NoLimit))
	must(t, err)
	t.Cleanup(func() { closeVM(t, vm) })
	return vm
}

// TestTrackDirtyOfALazyMachine follows a guest that runs into missing pages. The copy begins as the
// machine that it was.
func TestTrackDirtyOfALazyMachine(t *testing.T) {
	g := newWorker(t, testvm.WorkerConfig{Memory: 32 * mib, Every: 16, VCPUs: 2})
	from := g.boot(t, testvm.NoLimit)
	must(t, from.Start())
	g.work(t, from, 4)
	pause(t, from)
	f := follow(t, from.Memory())
	vm := moveLazily(t, from, encoded(t, from), g)
	must(t, vm.TrackDirty(true))
	must(t, vm.Resume())
	for range rounds(40) {
		g.work(t, vm, 1)
		f.take(t, vm)
	}
	pause(t, vm)
	f.take(t, vm)
	f.check(t, vm)
	if vm.Memory().Stats().ChunksFetched == 0 {
		t.Error("no page was missing")
	}
	must(t, vm.Resume())
	g.check(t, vm)
}

// TestTrackDirtySeesKVM gives a guest kvmclock, whose page KVM writes and nobody else.
func TestTrackDirtySeesKVM(t *testing.T) {
	const msrSystemTime, clock = 0x4b564d01, 0x90000
	g := newWorker(t, testvm.WorkerConfig{Every: 16})
	vm := g.boot(t, testvm.NoLimit)
	must(t, vm.Start())
	g.work(t, vm, 4)
	pause(t, vm)
	state := encoded(t, vm)
	at := slices.IndexFunc(state.VCPUs[0].MSRs, func(m vmm.MSR) bool { return m.Index == msrSystemTime })
	if at < 0 {
		t.Skip("this KVM has no kvmclock")
	}
	state.VCPUs[0].MSRs[at].Value = clock | 1
	mem := copyMemory(t, vm.Memory())
	vm, err := vmm.Restore(state, mem, g.hardware(testvm.NoLimit))
	must(t, err)
	t.Cleanup(func() { closeVM(t, vm) })
	must(t, vm.TrackDirty(true))
	f := follow(t, mem)
	for range 3 {
		must(t, vm.Resume())
		g.work(t, vm, 1)
		pause(t, vm)
		dirty := f.take(t, vm)
		f.check(t, vm)
		if !slices.ContainsFunc(dirty, func(r memory.Range) bool { return r.GPA <= clock && clock < r.End() }) {
			t.Errorf("KVM wrote the clock's page, and %x are dirty", dirty)
		}
	}
	now := make([]byte, 4)
	_, err = mem.ReadAt(now, clock)
	must(t, err)
	if binary.LittleEndian.Uint32(now) == 0 {
		t.Error("there is no clock")
	}
}

// TestTrackDirtyIsNotInTheWayOfClose closes a machine whose vCPU waits for a page that never comes, so that
// KVM, which waits for the vCPU, does not get its slots changed.
func TestTrackDirtyIsNotInTheWayOfClose(t *testing.T) {
	needKVM(t)
	stuck := make(chan struct{})
	vm, _ := lazy(t, stuck)
	must(t, vm.Resume())
	<-stuck
	tracked := make(chan error, 1)
	go func() { tracked <- vm.TrackDirty(true) }()
	must(t, vm.Close())
	if err := <-tracked; err != nil && !errors.Is(err, vmm.ErrClosed) {
		t.Error(err)
	}
}

// TestTrackDirtyFromEverywhere tracks and takes from several goroutines while the machine is paused,
// resumed and at last closed.
func TestTrackDirtyFromEverywhere(t *testing.T) {
	g := newWorker(t, testvm.WorkerConfig{Every: 4, VCPUs: 2})
	vm := g.boot(t, testvm.NoLimit)
	must(t, vm.Start())
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			for n := 0; ; n++ {
				err := vm.TrackDirty(n%50 != i)
				if err == nil {
					_, err = vm.TakeDirty()
				}
				if errors.Is(err, vmm.ErrClosed) {
					return
				}
				if err != nil && !errors.Is(err, vmm.ErrRunState) {
					t.Error(err)
					return
				}
			}
		})
	}
	for range rounds(200) {
		pause(t, vm)
		must(t, vm.Resume())
		g.work(t, vm, 1)
	}
	g.check(t, vm)
	must(t, vm.Close())
	wg.Wait()
}
