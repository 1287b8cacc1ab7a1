//go:build linux && amd64

package bench

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"filippo.io/age"
	"golang.org/x/sys/cpu"

	"github.com/cryovisor/cryovisor/internal/testvm"
	"github.com/cryovisor/cryovisor/lifecycle"
	"github.com/cryovisor/cryovisor/snapshot"
	"github.com/cryovisor/cryovisor/vmm"
)

const (
	seed = 7
	// every is how many steps the guest makes from one report to the next.
	every = 64
)

var sizes = []uint64{1 << 30, 4 << 30}

// fitting are sizes, and 16 GiB where there is room for the guest, three quarters of which are not zero, and for its snapshot.
func fitting(b *testing.B) []uint64 {
	b.Helper()
	const large, room = 16 << 30, 20 << 30
	if have := available(b); have < room {
		b.Logf("%d MiB of memory are available, not enough for a guest of 16 GiB", have>>20)
		return sizes
	}
	return append(slices.Clone(sizes), large)
}

// rig is a guest, a key and a store.
type rig struct {
	b       *testing.B
	worker  *testvm.Worker
	content testvm.Content
	store   *snapshot.Store
	key     *age.X25519Identity
	device  *testvm.Device // of the machine that was made last
	// states are what the devices knew when the snapshots were made: the guest may have been in the midst of a report.
	states  map[snapshot.ID][]testvm.VCPUState
	reports atomic.Int64
}

func needKVM(b *testing.B) {
	b.Helper()
	if _, err := vmm.Probe(); errors.Is(err, vmm.ErrNoKVM) || errors.Is(err, vmm.ErrPermission) {
		b.Skip(err)
	} else if err != nil {
		b.Fatal(err)
	}
}

// newDir makes a directory for what is measured, until the benchmark is over.
func newDir(b *testing.B) string {
	b.Helper()
	dir, err := os.MkdirTemp(cmp.Or(os.Getenv("CRYOVISOR_BENCH_DIR"), "/dev/shm"), "cryovisor-bench-")
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

func newRig(b *testing.B, ram, workingSet uint64) *rig {
	b.Helper()
	needKVM(b)
	dir := newDir(b)
	var err error
	r := &rig{b: b, states: make(map[snapshot.ID][]testvm.VCPUState)}
	r.worker, err = testvm.NewWorker(testvm.WorkerConfig{
		Memory: ram, Seed: seed, Every: every, WorkingSet: workingSet, AVX2: cpu.X86.HasAVX2,
	})
	r.must(err)
	program, err := testvm.ProgramCorpus()
	r.must(err)
	r.content = testvm.NewCorpus(seed, program)
	r.store, err = snapshot.OpenStore(dir)
	r.must(err)
	r.key, err = age.GenerateX25519Identity()
	r.must(err)
	return r
}

func (r *rig) must(err error) {
	r.b.Helper()
	if err != nil {
		r.b.Fatal(err)
	}
}

// boot makes a guest whose memory is loaded, so that the host's first touch of
// it is not part of what is measured.
func (r *rig) boot() *lifecycle.Machine {
	r.b.Helper()
	r.device = testvm.NewDevice(r.worker, nil, testvm.NoLimit, func(testvm.Report) { r.reports.Add(1) })
	m, err := lifecycle.Boot(r.b.Context(), vmm.Config{
		MemoryBytes: r.worker.Config().Memory, Boot: r.worker.Image().Program(),
		Hardware: vmm.Hardware{Ports: []vmm.Ports{r.device.Ports()}, AllowOvercommit: true},
	}, lifecycle.Disks{})
	r.must(err)
	mem := m.VM.Memory()
	r.must(r.worker.Load(r.content, func(gpa uint64, data []byte) error {
		_, err := mem.WriteAt(data, int64(gpa))
		return err
	}))
	r.must(m.VM.Start())
	return m
}

// work lets a running guest make n reports.
func (r *rig) work(n int64) {
	for want := r.reports.Load() + n; r.reports.Load() < want; {
		runtime.Gosched()
	}
}

func (r *rig) options() lifecycle.PauseOptions {
	return lifecycle.PauseOptions{Recipients: []age.Recipient{r.key.Recipient()}}
}

func (r *rig) pause(m *lifecycle.Machine) lifecycle.Paused {
	r.b.Helper()
	p, err := m.Pause(context.Background(), r.store, r.options())
	r.must(err)
	r.states[p.ID] = r.device.State()
	return p
}

func (r *rig) delete(id snapshot.ID) {
	r.b.Helper()
	r.must(r.store.Delete(context.Background(), id))
}

// firstSign notes a guest's first port access.
type firstSign struct {
	vmm.PortDevice
	once sync.Once
	seen chan struct{}
}

func (f *firstSign) In(port uint16, data []byte) {
	f.once.Do(func() { close(f.seen) })
	f.PortDevice.In(port, data)
}

func (f *firstSign) Out(port uint16, data []byte) {
	f.once.Do(func() { close(f.seen) })
	f.PortDevice.Out(port, data)
}

// hardware is that of a machine that is resumed. The guest may have more memory than the host, of which it uses little.
func (r *rig) hardware(id snapshot.ID) (vmm.Hardware, *firstSign) {
	r.device = testvm.NewDevice(r.worker, r.states[id], testvm.NoLimit, func(testvm.Report) { r.reports.Add(1) })
	ports := r.device.Ports()
	f := &firstSign{PortDevice: ports.Device, seen: make(chan struct{})}
	ports.Device = f
	return vmm.Hardware{Ports: []vmm.Ports{ports}, AllowOvercommit: true}, f
}

// resume resumes a snapshot and returns how long it took until the guest was
// entered, and until it gave its first sign.
func (r *rig) resume(id snapshot.ID, eager bool) (m *lifecycle.Machine, entered, sign time.Duration) {
	r.b.Helper()
	return r.resumeWith(id, lifecycle.ResumeOptions{Eager: eager})
}

func (r *rig) resumeWith(id snapshot.ID, opts lifecycle.ResumeOptions) (m *lifecycle.Machine, entered, sign time.Duration) {
	r.b.Helper()
	hw, f := r.hardware(id)
	opts.Identities, opts.Hardware = []age.Identity{r.key}, hw
	began := time.Now()
	m, err := lifecycle.Resume(context.Background(), r.store, id, opts)
	r.must(err)
	r.must(m.VM.Resume())
	entered = time.Since(began)
	<-f.seen
	return m, entered, time.Since(began)
}

func gib(bytes uint64) string { return fmt.Sprintf("%dGiB", bytes>>30) }

func percentile(d []time.Duration, p float64) float64 {
	slices.Sort(d)
	return float64(d[int(p*float64(len(d)-1))].Microseconds()) / 1000
}
