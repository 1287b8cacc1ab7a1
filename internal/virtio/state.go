package virtio

import (
	"encoding/binary"
	"fmt"
)

// StateVersion is the version of the encoding that State.MarshalBinary writes. Devices version their own part.
const StateVersion = 1

// State is all of a Transport and its device that the driver can notice, besides guest memory.
type State struct {
	Type          DeviceType
	Status        uint8
	Interrupt     uint8  // interrupt status
	Generation    uint32 // of the config space
	DeviceFeatSel uint32
	DriverFeatSel uint32
	QueueSel      uint32
	Features      Feature // that the driver accepted
	Queues        []QueueState
	Device        []byte // what Device.Save returned
}

// QueueState is a queue: what its registers say, and the positions of the device in its rings.
type QueueState struct {
	Ready                bool
	Size                 uint16
	Next, Used           uint16
	Desc, Driver, Device uint64
}

// Save returns the state of a quiesced device: ErrBusy if it is not.
func (t *Transport) Save() (State, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	switch {
	case t.closed:
		return State{}, ErrClosed
	case !t.quiesced:
		return State{}, ErrBusy
	}
	status, pending := t.line.get()
	s := State{
		Type: t.dev.Type(), Status: uint8(status), Interrupt: uint8(pending), Generation: t.config.last(),
		DeviceFeatSel: t.selected.deviceFeatures, DriverFeatSel: t.selected.driverFeatures, QueueSel: t.selected.queue,
		Features: t.features,
	}
	for _, q := range t.queues {
		// A request that broke the protocol is never given back. Nothing of the queue is used before a reset then.
		if !q.idle() && status&statusNeedsReset == 0 {
			return State{}, fmt.Errorf("virtio: device type %d has kept a request of queue %d", t.dev.Type(), q.index)
		}
		s.Queues = append(s.Queues, q.save())
	}
	var err error
	s.Device, err = t.dev.Save()
	return s, err
}

// Restore puts s in place of the state of a Transport whose device was never started, or is quiesced, and leaves
// it quiesced: Resume sets it going, when all of the machine is restored. An error wraps ErrState, and the
// Transport is then good for Close only; or it is ErrBusy.
func (t *Transport) Restore(s State) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	switch {
	case t.closed:
		return ErrClosed
	case t.started:
		return ErrBusy
	}
	if err := t.check(&s); err != nil {
		return err
	}
	t.quiesced = true
	t.selected = selectors{deviceFeatures: s.DeviceFeatSel, driverFeatures: s.DriverFeatSel, queue: s.QueueSel}
	t.features = s.Features
	for i, q := range t.queues {
		q.restore(s.Queues[i])
	}
	t.line.set(uint32(s.Status), uint32(s.Interrupt))
	t.config.restore(s.Generation)
	return t.dev.Restore(s.Device)
}

// check says whether this device can have been in s. What the driver may set to any value is not checked.
func (t *Transport) check(s *State) error {
	switch {
	case s.Type != t.dev.Type():
		return StateErrorf("it is of device type %d, the device here is of type %d", s.Type, t.dev.Type())
	case s.Status&^uint8(statusAll&0xff) != 0 || s.Interrupt&^interruptAll != 0:
		return StateErrorf("device status %#x, interrupt status %#x", s.Status, s.Interrupt)
	case s.Status&statusDriverOK != 0 && s.Status&statusFeaturesOK == 0:
		return StateErrorf("device status %#x", s.Status)
	case s.Status&statusFeaturesOK != 0 && (s.Features&^t.offered() != 0 || s.Features&FeatureVersion1 == 0):
		return StateErrorf("the driver uses features %#x, and the device here offers %#x", s.Features, t.offered())
	case len(s.Queues) != len(t.queues):
		return StateErrorf("%d queues, the device here has %d", len(s.Queues), len(t.queues))
	}
	for i, q := range t.queues {
		if err := q.check(s.Queues[i]); err != nil {
			return err
		}
	}
	return nil
}

func (q *Queue) save() QueueState {
	q.mu.Lock()
	defer q.mu.Unlock()
	return QueueState{
		Ready: q.ready, Size: q.size, Next: q.next, Used: q.used,
		Desc: q.desc, Driver: q.driver, Device: q.device,
	}
}

func (q *Queue) restore(s QueueState) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.ready, q.size = s.Ready, s.Size
	q.desc, q.driver, q.device = s.Desc, s.Driver, s.Device
	q.next, q.used, q.notified, q.taken = s.Next, s.Used, s.Used, 0
}

func (q *Queue) check(s QueueState) error {
	as := Queue{index: q.index, max: q.max, size: s.Size, desc: s.Desc, driver: s.Driver, device: s.Device}
	if err := as.fits(); s.Ready && err != nil {
		return StateErrorf("%v", err)
	}
	if s.Size != 0 && (!validSize(s.Size) || s.Size > q.max) {
		return StateErrorf("queue %d: size %d", q.index, s.Size)
	}
	return nil
}

// Lengths of the encoding in bytes: of what precedes the queues, and of one queue.
const (
	stateHead  = 2 + 4 + 1 + 1 + 4 + 3*4 + 8 + 2
	stateQueue = 1 + 3*2 + 3*8
)

// MarshalBinary encodes s, little-endian: version (2 bytes), type (4), status (1), interrupt status (1), generation
// (4), the selectors of device features, driver features and queue (4 each), features (8), number of queues (2);
// for each queue: ready (1), size, next, used (2 each), the addresses of its areas (8 each); and the device's
// part: length (4), bytes.
func (s State) MarshalBinary() ([]byte, error) {
	if len(s.Queues) > 0xffff || uint64(len(s.Device)) > 0xffffffff {
		return nil, StateErrorf("%d queues and %d bytes of the device's", len(s.Queues), len(s.Device))
	}
	le := binary.LittleEndian
	b := make([]byte, 0, stateHead+stateQueue*len(s.Queues)+4+len(s.Device))
	b = le.AppendUint16(b, StateVersion)
	b = le.AppendUint32(b, uint32(s.Type))
	b = append(b, s.Status, s.Interrupt)
	b = le.AppendUint32(b, s.Generation)
	b = le.AppendUint32(b, s.DeviceFeatSel)
	b = le.AppendUint32(b, s.DriverFeatSel)
	b = le.AppendUint32(b, s.QueueSel)
	b = le.AppendUint64(b, uint64(s.Features))
	b = le.AppendUint16(b, uint16(len(s.Queues)))
	for _, q := range s.Queues {
		ready := byte(0)
		if q.Ready {
			ready = 1
		}
		b = append(b, ready)
		b = le.AppendUint16(b, q.Size)
		b = le.AppendUint16(b, q.Next)
		b = le.AppendUint16(b, q.Used)
		b = le.AppendUint64(b, q.Desc)
		b = le.AppendUint64(b, q.Driver)
		b = le.AppendUint64(b, q.Device)
	}
	b = le.AppendUint32(b, uint32(len(s.Device)))
	return append(b, s.Device...), nil
}

// UnmarshalBinary decodes what MarshalBinary wrote, and nothing else: every accepted encoding is the one that
// MarshalBinary gives. Whether a device can have been in that state is for Restore to say. Errors wrap
// ErrState or are a *StateVersionError.
func (s *State) UnmarshalBinary(b []byte) error {
	le := binary.LittleEndian
	if len(b) < 2 {
		return StateErrorf("%d bytes, too few for a version", len(b))
	}
	switch v := le.Uint16(b); {
	case v == 0:
		return StateErrorf("version 0")
	case v > StateVersion:
		return &StateVersionError{Version: v, Newest: StateVersion}
	}
	if len(b) < stateHead {
		return StateErrorf("%d bytes, fewer than %d", len(b), stateHead)
	}
	d := State{
		Type: DeviceType(le.Uint32(b[2:])), Status: b[6], Interrupt: b[7], Generation: le.Uint32(b[8:]),
		DeviceFeatSel: le.Uint32(b[12:]), DriverFeatSel: le.Uint32(b[16:]), QueueSel: le.Uint32(b[20:]),
		Features: Feature(le.Uint64(b[24:])),
	}
	queues, rest := int(le.Uint16(b[32:])), b[stateHead:]
	if len(rest) < queues*stateQueue+4 {
		return StateErrorf("%d bytes for %d queues", len(rest), queues)
	}
	for range queues {
		q, err := decodeQueue(rest)
		if err != nil {
			return err
		}
		d.Queues = append(d.Queues, q)
		rest = rest[stateQueue:]
	}
	if n := le.Uint32(rest); uint64(n) != uint64(len(rest)-4) {
		return StateErrorf("%d bytes of the device's, which should be %d", len(rest)-4, n)
	}
	if len(rest) > 4 {
		d.Device = append([]byte(nil), rest[4:]...)
	}
	*s = d
	return nil
}

func decodeQueue(b []byte) (QueueState, error) {
	le := binary.LittleEndian
	if b[0] > 1 {
		return QueueState{}, StateErrorf("flag %d", b[0])
	}
	return QueueState{
		Ready: b[0] == 1, Size: le.Uint16(b[1:]), Next: le.Uint16(b[3:]), Used: le.Uint16(b[5:]),
		Desc: le.Uint64(b[7:]), Driver: le.Uint64(b[15:]), Device: le.Uint64(b[23:]),
	}, nil
}
