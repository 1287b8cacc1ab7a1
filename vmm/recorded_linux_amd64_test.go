package vmm_test

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"path/filepath"
	"testing"

	"github.com/cryovisor/cryovisor/internal/testvm"
	"github.com/cryovisor/cryovisor/internal/virtio"
	"github.com/cryovisor/cryovisor/internal/virtio/balloon"
	"github.com/cryovisor/cryovisor/internal/virtio/rng"
	"github.com/cryovisor/cryovisor/memory"
	"github.com/cryovisor/cryovisor/vmm"
)

// recordedWorker is the guest of the recorded states.
func recordedWorker(t *testing.T) *worker {
	t.Helper()
	needKVM(t)
	cfg := testvm.WorkerConfig{Seed: 7, Memory: 4 * mib, VCPUs: 1, Every: 8}
	w, err := testvm.NewWorker(cfg)
	must(t, err)
	g := newWorker(t, testvm.WorkerConfig{})
	g.Worker, g.model = w, testvm.NewModel(w, g.content)
	return g
}

// withDevices gives the machine all that can be had without rights.
func (g *worker) withDevices(t *testing.T) {
	t.Helper()
	g.more.Disks = []vmm.Disk{{Name: "data", Device: &disk{size: mib}}}
	g.more.Vsock = &vmm.Vsock{CID: 3, Path: filepath.Join(t.TempDir(), "vsock")}
}

// TestRecordDevices records the states, with -record.
func TestRecordDevices(t *testing.T) {
	if !*record {
		t.Skip("only with -record")
	}
	g := recordedWorker(t)
	g.withDevices(t)
	vm := g.boot(t, testvm.NoLimit)
	must(t, vm.Start())
	g.work(t, vm, 4)
	g.check(t, vm) // and holds
	pause(t, vm)
	state := encoded(t, vm)
	must(t, vm.Close())
	state.Devices = append(state.Devices, linuxDevices(t, 2)...)
	// In the order of a machine that has them all.
	genid := state.Devices[3]
	state.Devices = append(append(state.Devices[:1:1], genid, state.Devices[1], state.Devices[2]), state.Devices[4:]...)

	device, err := json.Marshal(g.device.State())
	must(t, err)
	recordFile(t, recordedDevice, device)
	recordFile(t, recorded, packSections(state.Sections()))
	recordFile(t, recordedNewer, packSections(newer(state.Sections())))
	recordFile(t, recordedCritical, packSections(critical(state.Sections(), "vmm/vcpu/0")))
	recordFile(t, recordedOlder, packSections(older(state)))
}

// linuxDevices are the states of the devices that only machines have that boot Linux, in slots from first on. Not every host
// can boot that; so they are made as vmm makes them.
func linuxDevices(t *testing.T, first uint32) []vmm.DeviceState {
	t.Helper()
	le := binary.LittleEndian
	device := func(name string, parts ...[]byte) vmm.DeviceState {
		s := vmm.Section{}
		for i, p := range parts {
			addPart(uint16(i+1), string(p))(&s)
		}
		return vmm.DeviceState{Name: name, Version: 1, Data: s.Data}
	}
	fresh := func(dev virtio.Device) []byte {
		bell, err := virtio.NewEventFD()
		must(t, err)
		tr, err := virtio.New(dev, virtio.Config{Doorbell: bell, Interrupt: func() error { return nil }})
		must(t, err)
		must(t, tr.Quiesce(testContext(t)))
		state, err := tr.Save()
		must(t, err)
		b, err := state.MarshalBinary()
		must(t, err)
		must(t, tr.Close())
		return b
	}
	const genIDAddr, genIDGSI = 0xfe000, 23
	return []vmm.DeviceState{
		device("genid", le.AppendUint64(nil, genIDAddr), le.AppendUint32(nil, genIDGSI)),
		device("rng", le.AppendUint32(nil, first), fresh(rng.New(rng.Config{}))),
		device("balloon", le.AppendUint32(nil, first+1), fresh(balloon.New(balloon.Config{}))),
	}
}

// TestRecordedStatesRun restores each of the recorded states, and has the guest go on: every report and every byte of its
// memory is what it would have been.
func TestRecordedStatesRun(t *testing.T) {
	for _, name := range []string{recorded, recordedOlder, recordedNewer} {
		t.Run(name, func(t *testing.T) {
			g := recordedWorker(t)
			if name != recordedOlder {
				g.withDevices(t)
			}
			state, err := vmm.ParseState(readRecorded(t, name))
			must(t, err)
			var saved []testvm.VCPUState
			must(t, json.Unmarshal(readTestdata(t, recordedDevice), &saved))
			must(t, g.model.Check(saved[0].Last))
			hw := g.hardware(testvm.NoLimit)
			g.device = testvm.NewDevice(g.Worker, saved, testvm.NoLimit, func(testvm.Report) { g.reports.Add(1) })
			vm, err := vmm.Restore(state, modelMemory(t, g), hw)
			if errors.Is(err, vmm.ErrCPU) || errors.Is(err, vmm.ErrCapability) {
				t.Skip("recorded on another processor: ", err)
			}
			must(t, err)
			t.Cleanup(func() { closeVM(t, vm) })
			must(t, vm.Resume())
			g.work(t, vm, 10)
			g.checkBut(t, vm, state)
		})
	}
}

// modelMemory is a memory as the model has it.
func modelMemory(t *testing.T, g *worker) *memory.Memory {
	t.Helper()
	mem, err := memory.New(g.Config().Memory, memory.Options{})
	must(t, err)
	for _, r := range mem.Ranges() {
		b := make([]byte, r.Len)
		g.model.Expect(r.GPA, b)
		_, err := mem.WriteAt(b, int64(r.GPA))
		must(t, err)
	}
	return mem
}

// checkBut is check, but for the page with the generation ID of a machine that has one.
func (g *worker) checkBut(t *testing.T, vm *vmm.VM, state *vmm.State) {
	t.Helper()
	for _, d := range state.Devices {
		if d.Name == "genid" {
			addr := binary.LittleEndian.Uint64(d.Data[6:]) // its first part
			id, page := make([]byte, memory.PageSize), make([]byte, memory.PageSize)
			must(t, vm.Pause(testContext(t)))
			_, err := vm.Memory().ReadAt(id, int64(addr))
			must(t, err)
			g.model.Expect(addr, page)
			if bytes.Equal(id, page) {
				t.Error("the generation ID has not changed")
			}
			_, err = vm.Memory().WriteAt(page, int64(addr))
			must(t, err)
			must(t, vm.Resume())
		}
	}
	g.check(t, vm)
}
