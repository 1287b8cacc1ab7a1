package virtio

import (
	"context"
	"encoding/binary"
)

// The registers of the MMIO transport (section 4.2.2), by offset in bytes.
const (
	regMagic          = 0x000
	regVersion        = 0x004
	regDeviceID       = 0x008
	regVendorID       = 0x00c
	regDeviceFeatures = 0x010
	regDeviceFeatSel  = 0x014
	regDriverFeatures = 0x020
	regDriverFeatSel  = 0x024
	regQueueSel       = 0x030
	regQueueSizeMax   = 0x034
	regQueueSize      = 0x038
	regQueueReady     = 0x044
	regQueueNotify    = 0x050
	regInterrupt      = 0x060
	regInterruptACK   = 0x064
	regStatus         = 0x070
	regQueueDesc      = 0x080 // low half; the high half follows, as for all addresses
	regQueueDriver    = 0x090
	regQueueDevice    = 0x0a0
	regSHMLen         = 0x0b0
	regSHMBase        = 0x0b8
	regGeneration     = 0x0fc
	regConfig         = 0x100
)

const (
	mmioMagic   = 0x74726976 // "virt"
	mmioVersion = 2
	// vendorID is this project's, "CRYO"; no list of them exists.
	vendorID = 0x4f595243
)

const (
	// RegionSize is the length in bytes of the registers and the config space, for the machine's address map.
	RegionSize = 0x200
	// NotifyOffset is where drivers write the index of a queue, as 4 bytes, to ring. The queues share one bell, so
	// that an ioeventfd needs no match of the value.
	NotifyOffset = regQueueNotify
)

// Read is a driver's read at off. Registers are 4 bytes wide (section 4.2.2.2): another access reads zeros. The config
// space may be read in any width.
func (t *Transport) Read(off uint64, p []byte) {
	if off >= regConfig {
		t.config.read(off-regConfig, p)
		return
	}
	clear(p)
	if len(p) == 4 {
		binary.LittleEndian.PutUint32(p, t.register(off))
	}
}

// Write is a driver's write at off. What is no register, or of the wrong width, is ignored.
func (t *Transport) Write(off uint64, p []byte) {
	switch {
	case off >= regConfig:
		t.dev.WriteConfig(off-regConfig, p)
	case len(p) == 4:
		t.setRegister(off, binary.LittleEndian.Uint32(p))
	}
}

func (t *Transport) register(off uint64) uint32 {
	switch off {
	case regMagic:
		return mmioMagic
	case regVersion:
		return mmioVersion
	case regDeviceID:
		return uint32(t.dev.Type())
	case regVendorID:
		return vendorID
	case regGeneration:
		return t.config.current()
	case regSHMLen, regSHMLen + 4, regSHMBase, regSHMBase + 4:
		return 0xffffffff // no such region
	}
	status, pending := t.line.get()
	switch off {
	case regInterrupt:
		return pending
	case regStatus:
		return status
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if off == regDeviceFeatures {
		return half(uint64(t.offered()), t.selected.deviceFeatures)
	}
	q := t.queue()
	if q == nil {
		return 0
	}
	switch off {
	case regQueueSizeMax:
		return uint32(q.max)
	case regQueueReady:
		if q.ready {
			return 1
		}
	}
	return 0
}

func (t *Transport) setRegister(off uint64, v uint32) {
	// The frequent ones need no lock that a reset may hold.
	switch off {
	case regQueueNotify:
		t.ring()
		return
	case regInterruptACK:
		t.line.acknowledge(v)
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return
	}
	switch off {
	case regStatus:
		t.setStatus(v)
	case regDeviceFeatSel:
		t.selected.deviceFeatures = v
	case regDriverFeatSel:
		t.selected.driverFeatures = v
	case regDriverFeatures:
		t.setFeatures(v)
	case regQueueSel:
		t.selected.queue = v
	default:
		if q := t.queue(); q != nil {
			t.setQueue(q, off, v)
		}
	}
}

func (t *Transport) offered() Feature { return t.dev.Features() | transportFeatures }

// queue is the selected queue, nil if there is none.
func (t *Transport) queue() *Queue {
	if uint64(t.selected.queue) >= uint64(len(t.queues)) {
		return nil
	}
	return t.queues[t.selected.queue]
}

// setFeatures sets 32 of the features that the driver accepts. They are fixed once both sides have agreed.
func (t *Transport) setFeatures(v uint32) {
	status, _ := t.line.get()
	if status&statusFeaturesOK == 0 && t.selected.driverFeatures < 2 {
		t.features = Feature(withHalf(uint64(t.features), t.selected.driverFeatures, v))
	}
}

// setStatus is the status protocol (sections 2.1 and 3.1.1). A driver only adds bits, or resets. FEATURES_OK
// does not stick if the driver accepted what was not offered, or is a legacy driver; without it there is no
// DRIVER_OK.
func (t *Transport) setStatus(v uint32) {
	if v == 0 {
		t.reset()
		return
	}
	status, _ := t.line.get()
	add := v & statusDrivers &^ status
	if t.features&^t.offered() != 0 || t.features&FeatureVersion1 == 0 {
		add &^= statusFeaturesOK
	}
	if (status|add)&statusFeaturesOK == 0 {
		add &^= statusDriverOK
	}
	t.line.add(add)
	t.start()
}

// setQueue sets a register of a queue. All but QueueReady are fixed while the queue is ready.
func (t *Transport) setQueue(q *Queue, off uint64, v uint32) {
	if off == regQueueReady {
		t.setReady(q, v&1 != 0)
		return
	}
	if q.ready {
		return
	}
	switch off {
	case regQueueSize:
		q.size = 0
		if v <= uint32(q.max) && validSize(uint16(v)) {
			q.size = uint16(v)
		}
	case regQueueDesc, regQueueDesc + 4:
		q.desc = withHalf(q.desc, uint32(off-regQueueDesc)/4, v)
	case regQueueDriver, regQueueDriver + 4:
		q.driver = withHalf(q.driver, uint32(off-regQueueDriver)/4, v)
	case regQueueDevice, regQueueDevice + 4:
		q.device = withHalf(q.device, uint32(off-regQueueDevice)/4, v)
	}
}

// setReady enables a queue, or takes it from the device, which is stopped for that if it works. A queue whose
// size or addresses are wrong does not become ready, which the driver reads back.
func (t *Transport) setReady(q *Queue, ready bool) {
	if ready == q.ready || ready && q.fits() != nil {
		return
	}
	// The error would be the context's.
	_ = t.stop(context.Background())
	q.ready = ready
	q.rewind()
	t.start()
}

// half returns the low 32 bits of v (i 0), the high ones (i 1), or 0.
func half(v uint64, i uint32) uint32 {
	if i > 1 {
		return 0
	}
	return uint32(v >> (32 * i))
}

// withHalf returns v with the half i, 0 or 1, replaced.
func withHalf(v uint64, i, h uint32) uint64 {
	return v&^(0xffffffff<<(32*i)) | uint64(h)<<(32*i)
}
