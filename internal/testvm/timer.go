package testvm

import (
	"bytes"
	_ "embed"
	"encoding/binary"
	"fmt"
	"sync"
)

//go:embed testdata/guests/timer.bin
var timerCode []byte

// TimerSource is what gives a timer guest its ticks.
type TimerSource uint64

// Sources of ticks.
const (
	TimerPeriodic TimerSource = iota // local APIC timer, periodic; Period in ns (KVM's APIC bus runs at 1 GHz)
	TimerDeadline                    // local APIC timer, TSC deadline; Period in TSC cycles
	TimerPIT                         // 8254 through the 8259; Period in 1/1193182 s, up to 65535
)

func (s TimerSource) String() string {
	switch s {
	case TimerPeriodic:
		return "APIC timer"
	case TimerDeadline:
		return "TSC deadline"
	case TimerPIT:
		return "PIT"
	}
	return fmt.Sprintf("TimerSource(%d)", uint64(s))
}

// TimerConfig describes a timer guest: kernel mode, interrupts, little memory use.
type TimerConfig struct {
	// Memory is the guest's RAM in bytes.
	Memory uint64
	// VCPUs is 1 or 2; 0 means 1. vCPU 1 counts the interrupts that vCPU 0 sends it.
	VCPUs  int
	Source TimerSource
	// Period of the timer, in the units of Source; 0 means about 1 ms. Ticks that
	// come faster than the guest can take them are merged.
	Period uint32
	// Every is the number of ticks from one report to the next; 0 means 10.
	Every uint64
	// Busy makes vCPU 0 spin rather than halt between interrupts.
	Busy bool
	// Seed is mixed into the checksums.
	Seed uint64
	// Ports is the first of 16 I/O ports for each vCPU; 0 means 0x4000.
	Ports uint16
}

const (
	timerBusy    = 1
	timerIPI     = 2
	timerReceive = 4
	magicTimer   = 0x52545643 // "CVTR"
)

// Timer returns a timer guest. It needs KVM's interrupt controllers, and the PIT
// for TimerPIT. The error is a *ConfigError.
func Timer(cfg TimerConfig) (Image, error) {
	cfg.setDefaults()
	if err := checkMachine(cfg.Memory, cfg.VCPUs, cfg.Ports); err != nil {
		return Image{}, err
	}
	switch {
	case cfg.VCPUs > 2:
		return Image{}, &ConfigError{"VCPUs", fmt.Sprintf("is %d; a timer guest has 1 or 2", cfg.VCPUs)}
	case cfg.Source > TimerPIT || cfg.Source == TimerPIT && cfg.Period > 65535:
		return Image{}, &ConfigError{"Source", fmt.Sprintf("%v can't have a period of %d", cfg.Source, cfg.Period)}
	}
	blocks := make([]byte, cfg.VCPUs*pageSize)
	im := Image{Load: []Segment{
		{GPA: gdtAddr, Data: gdt()},
		{GPA: tssAddr, Data: taskStates(cfg.VCPUs)},
		{GPA: codeAddr, Data: bytes.Clone(timerCode)},
		{GPA: blockAddr, Data: blocks},
		{GPA: tablesAddr, Data: identityTables(endOfRAM(cfg.Memory), false)},
	}}
	for v := range cfg.VCPUs {
		cfg.block(v, blocks[v*pageSize:])
		cpu := CPU{
			Sregs: longMode(v, false, false),
			Regs:  Regs{RIP: codeAddr, RSP: stackTop(v), R13: blockOf(v), RFLAGS: rflagsFixed},
		}
		cpu.Sregs.IDT = TableReg{} // the guest makes its own
		im.VCPUs = append(im.VCPUs, cpu)
	}
	return im, nil
}

func (c *TimerConfig) setDefaults() {
	if c.VCPUs == 0 {
		c.VCPUs = 1
	}
	if c.Every == 0 {
		c.Every = 10
	}
	if c.Ports == 0 {
		c.Ports = defaultPorts
	}
	if c.Period == 0 {
		c.Period = map[TimerSource]uint32{TimerPeriodic: 1e6, TimerDeadline: 2.5e6, TimerPIT: 1193}[c.Source]
	}
}

// block writes a vCPU's parameters, in step with testdata/guests/timer.S.
func (c *TimerConfig) block(v int, b []byte) {
	le := binary.LittleEndian
	every, flags := c.Every, uint64(0)
	if c.Busy {
		flags |= timerBusy
	}
	switch {
	case v == 1:
		every, flags = 1, timerReceive
	case c.VCPUs == 2:
		flags |= timerIPI
	}
	for i, q := range []uint64{uint64(c.Source), uint64(c.Period), every, flags, timerSeed(c.Seed, v)} {
		le.PutUint64(b[i*8:], q)
	}
	port := uint32(c.Ports) + uint32(v*portsPerVCPU)
	le.PutUint32(b[offParams:], port+portReport)
	le.PutUint32(b[offParams+4:], port+portToken)
	le.PutUint64(b[offRecord:], magicTimer|uint64(v)<<32)
}

func timerSeed(seed uint64, vcpu int) uint64 { return scramble(seed + uint64(vcpu)) }

// TimerReport is what a timer guest's vCPU says: its sequence number from 1 on,
// how many ticks (vCPU 1: interrupts from vCPU 0) it has counted, a checksum of all
// counts it ever reported, and its time stamp counter.
type TimerReport struct {
	VCPU            int
	Seq, Count, Sum uint64
	TSC             uint64
}

// TimerState is what a TimerDevice knows of a vCPU; see VCPUState.
type TimerState struct {
	Partial []byte
	Last    TimerReport
}

// TimerDevice is the host's side of a timer guest's ports. It checks that each
// report follows from the one before: none lost, none repeated, no counter
// that went back or was damaged.
type TimerDevice struct {
	cfg      TimerConfig
	onReport func(TimerReport, error)

	mu    sync.Mutex
	hold  bool
	vcpus []TimerState
}

// NewTimerDevice makes the device of a guest that starts, or that goes on from
// saved. onReport is called with each report on the thread of the vCPU; the
// error, if any, is a *TimerError, *FaultError or *RecordError.
func NewTimerDevice(cfg TimerConfig, saved []TimerState, onReport func(TimerReport, error)) *TimerDevice {
	cfg.setDefaults()
	d := &TimerDevice{cfg: cfg, onReport: onReport, vcpus: make([]TimerState, cfg.VCPUs)}
	for v := range d.vcpus {
		d.vcpus[v].Last = TimerReport{VCPU: v, Sum: timerSeed(cfg.Seed, v)}
	}
	copy(d.vcpus, saved)
	return d
}

// State returns a copy of what is to be saved with the guest, which is paused.
func (d *TimerDevice) State() []TimerState {
	d.mu.Lock()
	defer d.mu.Unlock()
	s := make([]TimerState, len(d.vcpus))
	for v := range s {
		s[v] = TimerState{Partial: bytes.Clone(d.vcpus[v].Partial), Last: d.vcpus[v].Last}
	}
	return s
}

// Hold makes every vCPU hold at its next report, interrupts off, or go on.
func (d *TimerDevice) Hold(on bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.hold = on
}

// In gives orders.
func (d *TimerDevice) In(_ uint16, data []byte) {
	clear(data)
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.hold {
		data[0] = tokenHold
	}
}

// Out takes a part of a report.
func (d *TimerDevice) Out(port uint16, data []byte) {
	n := int(port) - int(d.cfg.Ports)
	if n < 0 || n/portsPerVCPU >= len(d.vcpus) || n%portsPerVCPU != portReport {
		return
	}
	if r, ok, err := d.take(n/portsPerVCPU, data); ok {
		d.onReport(r, err)
	}
}

func (d *TimerDevice) take(v int, data []byte) (r TimerReport, ok bool, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	s := &d.vcpus[v]
	s.Partial = append(s.Partial, data...)
	if len(s.Partial) < recordSize {
		return r, false, nil
	}
	defer func() { s.Partial = s.Partial[:0] }()
	q := words(s.Partial)
	if uint32(q(0)) != magicTimer {
		return r, true, badRecord(s.Partial)
	}
	r = TimerReport{VCPU: int(q(0) >> 32), Seq: q(1), Count: q(2), Sum: q(3), TSC: q(4)}
	if !r.follows(s.Last) {
		err = &TimerError{Before: s.Last, Got: r}
	}
	s.Last = r
	return r, true, err
}

func (r TimerReport) follows(last TimerReport) bool {
	return r.VCPU == last.VCPU && r.Seq == last.Seq+1 && r.Count > last.Count &&
		r.Sum == mix(last.Sum, r.Count) && (last.Seq == 0 || r.TSC > last.TSC)
}

// TimerError is a report that does not follow from the one before.
type TimerError struct{ Before, Got TimerReport }

func (e *TimerError) Error() string {
	return fmt.Sprintf("the timer guest reports %+v after %+v", e.Got, e.Before)
}
