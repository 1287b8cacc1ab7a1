package testvm

import (
	"context"
	"encoding/binary"
	"math"
	"sync"
)

// Device is the host's side of a worker's I/O ports: it collects reports, gives
// the answers, and tells the guest to hold or to power off. In and Out are what a
// VMM calls, from several vCPU threads at once.
type Device struct {
	w        *Worker
	onReport func(Report)

	mu      sync.Mutex
	limit   uint64
	off     bool
	vcpus   []portState
	err     error
	changed chan struct{} // closed and renewed when held or err changes
}

type portState struct {
	VCPUState
	held bool
}

// VCPUState is what a Device knows of a vCPU. It belongs to the guest's state:
// a VM that is resumed needs a Device that has it.
type VCPUState struct {
	// Partial is the part of a report that the guest has sent so far.
	Partial []byte
	// Last is the last complete report.
	Last Report
}

// NoLimit lets a worker go on without end.
const NoLimit = math.MaxUint64

// NewDevice makes the device for a guest that starts, or for one that goes on
// from saved, which State returned. A vCPU holds at its first report of step limit
// or later. onReport, which may be nil, is called with each report on the
// thread of the vCPU.
func NewDevice(w *Worker, saved []VCPUState, limit uint64, onReport func(Report)) *Device {
	d := &Device{w: w, onReport: onReport, limit: limit, vcpus: make([]portState, len(w.vcpus)), changed: make(chan struct{})}
	for v := range min(len(saved), len(d.vcpus)) {
		d.vcpus[v].VCPUState = saved[v]
	}
	return d
}

// State returns a copy of what is to be saved with the guest. The guest is to be
// paused.
func (d *Device) State() []VCPUState {
	d.mu.Lock()
	defer d.mu.Unlock()
	s := make([]VCPUState, len(d.vcpus))
	for v := range s {
		s[v] = VCPUState{Partial: append([]byte(nil), d.vcpus[v].Partial...), Last: d.vcpus[v].Last}
	}
	return s
}

// SetLimit changes the step from which on vCPUs hold. Holding vCPUs below it go
// on.
func (d *Device) SetLimit(step uint64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.limit = step
	for v := range d.vcpus {
		d.vcpus[v].held = false
	}
}

// PowerOff tells the guest to make its power-off write: every vCPU does, at its
// next report or from its hold.
func (d *Device) PowerOff() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.off = true
}

// WaitHeld waits until all vCPUs hold, and returns their reports. It fails with a
// *FaultError or *RecordError if the guest did, and with ctx's error.
func (d *Device) WaitHeld(ctx context.Context) ([]Report, error) {
	for {
		d.mu.Lock()
		changed, err := d.changed, d.err
		reports := make([]Report, 0, len(d.vcpus))
		for _, v := range d.vcpus {
			if v.held {
				reports = append(reports, v.Last)
			}
		}
		d.mu.Unlock()
		if err != nil {
			return nil, err
		}
		if len(reports) == len(d.vcpus) {
			return reports, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// Out takes a part of a report.
func (d *Device) Out(port uint16, data []byte) {
	v, at := d.decode(port)
	if v < 0 || at != portReport {
		return
	}
	if r, ok := d.take(v, data); ok && d.onReport != nil {
		d.onReport(r)
	}
}

func (d *Device) take(v int, data []byte) (Report, bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	s := &d.vcpus[v]
	s.Partial = append(s.Partial, data...)
	if len(s.Partial) < recordSize {
		return Report{}, false
	}
	r, err := decodeReport(s.Partial)
	s.Partial = s.Partial[:0]
	if err == nil && r.VCPU != v {
		err = &MismatchError{Got: r, Want: Report{VCPU: v}}
	}
	if err != nil {
		if d.err == nil {
			d.err = err
		}
		d.signal()
		return Report{}, false
	}
	s.Last = r
	return r, true
}

// In answers a vCPU's last report.
func (d *Device) In(port uint16, data []byte) {
	var answer [4]byte
	if v, at := d.decode(port); v >= 0 {
		d.mu.Lock()
		token, echo := answers(d.w.cfg.Seed, v, d.vcpus[v].Last.Step)
		switch at {
		case portToken:
			binary.LittleEndian.PutUint32(answer[:], token|d.orders(v))
		case portEcho:
			binary.LittleEndian.PutUint32(answer[:], echo)
		}
		d.mu.Unlock()
	}
	copy(data, answer[:])
}

// orders are the bits of a token that tell a vCPU to hold or to power off.
func (d *Device) orders(v int) uint32 {
	s := &d.vcpus[v]
	if d.off {
		return tokenOff
	}
	if s.Last.Step < d.limit {
		s.held = false
		return 0
	}
	if !s.held {
		s.held = true
		d.signal()
	}
	return tokenHold
}

func (d *Device) decode(port uint16) (vcpu, at int) {
	n := int(port) - int(d.w.cfg.Ports)
	if n < 0 || n >= len(d.vcpus)*portsPerVCPU {
		return -1, 0
	}
	return n / portsPerVCPU, n % portsPerVCPU
}

func (d *Device) signal() {
	close(d.changed)
	d.changed = make(chan struct{})
}
