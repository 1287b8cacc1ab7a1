package testvm

import (
	"bytes"
	"encoding/binary"
	"fmt"
)

// WorkerConfig describes a worker guest. Two equal configurations make the same
// guest, bit for bit.
type WorkerConfig struct {
	// Memory is the guest's RAM in bytes.
	Memory uint64
	// VCPUs is the number of vCPUs; 0 means 1. Each works on its own stripe.
	VCPUs int
	// Seed decides which pages are chosen, the initial registers and the answers.
	Seed uint64
	// Every is the number of steps from one report to the next; 0 means 1000.
	Every uint64
	// WorkingSet is how many bytes of memory, over all vCPUs, are worked on:
	// runs of 64 pages, evenly spread. 0 means all.
	WorkingSet uint64
	// Stride is the distance, in qwords, of the words that a step rewrites in its
	// page: a power of two from 1 (all of the page) to 512. 0 means 64.
	Stride int
	// AVX2 makes the guest use YMM registers. The processor must have AVX2 and the
	// guest must be allowed to use it.
	AVX2 bool
	// Fill makes the guest write NewPattern(Seed) to its memory first. Otherwise
	// the host loads some Content.
	Fill bool
	// Fault makes every vCPU execute ud2 instead of working.
	Fault bool
	// Ports is the first of 16 I/O ports for each vCPU; 0 means 0x4000.
	Ports uint16
	// PowerOff is the write that the guest makes when it is told to power off.
	PowerOff PortWrite
}

// PortWrite is a write of 1, 2 or 4 bytes to an I/O port.
type PortWrite struct {
	Port  uint16
	Width int
	Value uint32
}

// I/O ports of a vCPU, relative to its first.
const (
	portReport   = 0
	portToken    = 4
	portEcho     = 8
	portsPerVCPU = 16
	defaultPorts = 0x4000
)

// Offsets in a vCPU's block, in step with testdata/guests/worker.S.
const (
	offSeed     = 0x00
	offPRNG     = 0x08
	offParams   = 0x68 // dwords from here on
	offRecord   = 0x100
	offEcho     = 0x140
	offControl  = 0x158
	offVectors  = 0x200
	vectorStubs = 0x1000 // of the code

	flagAVX2  = 1
	flagFill  = 2
	flagFault = 4
)

const runPages = 64

// Worker is a worker guest: what to load, and where it works. It is immutable.
type Worker struct {
	cfg   WorkerConfig
	base  uint64 // GPA of content page 0
	pages uint64
	vcpus []stripe
}

// stripe is what one vCPU works on; pages count from content page 0.
type stripe struct {
	first, pages     uint64
	workset, spacing uint64
}

// NewWorker checks cfg and lays the guest out. The error is a *ConfigError.
func NewWorker(cfg WorkerConfig) (*Worker, error) {
	cfg.setDefaults()
	if err := checkMachine(cfg.Memory, cfg.VCPUs, cfg.Ports); err != nil {
		return nil, err
	}
	if s := cfg.Stride; s < 1 || s > 512 || s&(s-1) != 0 {
		return nil, &ConfigError{"Stride", fmt.Sprintf("is %d; it must be a power of two from 1 to 512", s)}
	}
	tables := uint64(len(identityTables(endOfRAM(cfg.Memory), true)))
	w := &Worker{cfg: cfg, base: (tablesAddr + tables + largePage - 1) &^ (largePage - 1)}
	w.pages = (cfg.Memory - w.base) / pageSize
	n := uint64(cfg.VCPUs)
	for v := range n {
		first, end := v*w.pages/n, (v+1)*w.pages/n
		s := stripe{first: first, pages: end - first, workset: end - first, spacing: runPages}
		if ws := cfg.WorkingSet / pageSize / n &^ (runPages - 1); cfg.WorkingSet > 0 && ws < s.pages {
			s.workset = max(ws, runPages)
			s.spacing = s.pages / (s.workset / runPages)
		}
		if s.pages < runPages {
			return nil, &ConfigError{"Memory", fmt.Sprintf("of %d bytes is too little for %d vCPUs", cfg.Memory, n)}
		}
		w.vcpus = append(w.vcpus, s)
	}
	return w, nil
}

func (c *WorkerConfig) setDefaults() {
	if c.VCPUs == 0 {
		c.VCPUs = 1
	}
	if c.Every == 0 {
		c.Every = 1000
	}
	if c.Stride == 0 {
		c.Stride = 64
	}
	if c.Ports == 0 {
		c.Ports = defaultPorts
	}
}

// Config returns the configuration, defaults filled in.
func (w *Worker) Config() WorkerConfig { return w.cfg }

// Pages is the number of content pages: all RAM above the page tables, from the
// next multiple of 2 MiB on.
func (w *Worker) Pages() uint64 { return w.pages }

// PageGPA is the guest physical address of a content page.
func (w *Worker) PageGPA(page uint64) uint64 {
	gpa := w.base + page*pageSize
	if gpa >= holeStart {
		gpa += holeEnd - holeStart
	}
	return gpa
}

// PortRange is the first and the last I/O port that the guest uses with Device.
func (w *Worker) PortRange() (first, last uint16) {
	return w.cfg.Ports, w.cfg.Ports + uint16(w.cfg.VCPUs*portsPerVCPU) - 1
}

// Image returns what to load besides the content, and the start states.
func (w *Worker) Image() Image {
	blocks := make([]byte, len(w.vcpus)*pageSize)
	im := Image{Load: []Segment{
		{GPA: gdtAddr, Data: gdt()},
		{GPA: idtAddr, Data: idt(codeAddr + vectorStubs)},
		{GPA: tssAddr, Data: taskStates(len(w.vcpus))},
		{GPA: codeAddr, Data: bytes.Clone(workerCode)},
		{GPA: blockAddr, Data: blocks},
		{GPA: tablesAddr, Data: identityTables(endOfRAM(w.cfg.Memory), true)},
	}}
	for v := range w.vcpus {
		w.block(v, blocks[v*pageSize:])
		cpu := CPU{
			Sregs: longMode(v, true, w.cfg.AVX2),
			Regs: Regs{
				RIP: codeAddr, RSP: stackTop(v), R13: blockOf(v),
				RFLAGS: rflagsFixed | rflagsIF | rflagsIOPL3,
			},
		}
		cpu.Sregs.FS.Base = blockOf(v) + offSeed
		cpu.Sregs.GS.Base = blockOf(v) + offPRNG
		if w.cfg.AVX2 {
			cpu.XCR0 = xcr0AVX
		}
		im.VCPUs = append(im.VCPUs, cpu)
	}
	return im
}

// block writes a vCPU's parameters and its report of step 0.
func (w *Worker) block(v int, b []byte) {
	s, c := w.vcpus[v], &w.cfg
	start := newVCPUModel(w, v)
	for i, q := range []uint64{
		start.sum, start.prng, s.first, s.pages, s.workset, s.spacing,
		w.base, holeStart, holeEnd - holeStart, uint64(c.Stride), c.Every, w.flags(), c.Seed,
	} {
		binary.LittleEndian.PutUint64(b[offSeed+i*8:], q)
	}
	port := uint32(c.Ports) + uint32(v*portsPerVCPU)
	for i, d := range []uint32{
		port + portReport, port + portToken, port + portEcho,
		uint32(c.PowerOff.Port), c.PowerOff.Value, uint32(c.PowerOff.Width),
	} {
		binary.LittleEndian.PutUint32(b[offParams+i*4:], d)
	}
	binary.LittleEndian.PutUint64(b[offControl:], start.seldom[0])
	for i, reg := range start.vec {
		for l, q := range reg {
			binary.LittleEndian.PutUint64(b[offVectors+i*32+l*8:], q)
		}
	}
	start.report().encode(b[offRecord:])
}

func (w *Worker) flags() (f uint64) {
	if w.cfg.AVX2 {
		f |= flagAVX2
	}
	if w.cfg.Fill {
		f |= flagFill
	}
	if w.cfg.Fault {
		f |= flagFault
	}
	return f
}
