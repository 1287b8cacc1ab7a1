package testvm

import (
	"encoding/binary"
	"fmt"
	"math/bits"
)

// Content is what a worker's memory holds before its first step.
type Content interface {
	// Page fills dst, 4096 bytes, with a content page, and reports whether the
	// page has a byte that is not zero. It is safe for concurrent use.
	Page(page uint64, dst []byte) bool
}

// Model predicts a worker: every report and every byte of its memory. It shares
// nothing with the engine under test. Different vCPUs may be advanced at the
// same time; Expect only while none is.
type Model struct {
	w       *Worker
	content Content
	// Rewriting a page XORs rotations of one word into it. Rotations of XORed words
	// are XORed rotations, so one word per page sums up all that was done to it.
	delta []uint64
	vcpus []*vcpuModel
	image []Segment
}

// vcpuModel is a vCPU that has made a report and has not read the answer.
type vcpuModel struct {
	w         *Worker
	id        int
	sum, prng uint64
	step      uint64
	vec       [16][4]uint64
	acc       [3]uint64 // r9 to r11
	x87       uint64
	seldom    [3]uint64 // controls, and the words at the segment bases
	lanes     [4]uint64
	echo      uint32
	echoed    bool
	page      [pageSize]byte
}

const (
	multiplier = 0x9e3779b97f4a7c15 // 2^64 / golden ratio, odd
	xorshiftMu = 0x2545f4914f6cdd1d // Vigna, xorshift64*

	// Round to zero, unlike after a reset; all exceptions masked (Intel SDM,
	// volume 1, 8.1.5 and 10.2.3).
	x87Control = 0x0f7f
	mxcsr      = 0x7f80
)

// NewModel returns a model of w at the reports of step 0, which every vCPU makes
// before it works. content is what the host loaded, or NewPattern(Seed) if the
// guest fills its memory.
func NewModel(w *Worker, content Content) *Model {
	m := &Model{w: w, content: content, delta: make([]uint64, w.pages), image: w.Image().Load}
	for v := range w.vcpus {
		m.vcpus = append(m.vcpus, newVCPUModel(w, v))
	}
	return m
}

func newVCPUModel(w *Worker, v int) *vcpuModel {
	r := splitmix(w.cfg.Seed ^ uint64(v)<<56)
	c := &vcpuModel{w: w, id: v, sum: r.next(), prng: r.next() | 1}
	c.x87, c.seldom = c.sum, [3]uint64{x87Control | mxcsr<<32, c.sum, c.prng}
	lanes := 2
	if w.cfg.AVX2 {
		lanes = 4
	}
	for i := range c.vec {
		for l := range lanes {
			c.vec[i][l] = r.next()
		}
	}
	return c
}

// Report is the report that a vCPU made last.
func (m *Model) Report(vcpu int) Report { return m.vcpus[vcpu].report() }

// Next lets a vCPU read the answer to its report and work until its next report,
// which it returns.
func (m *Model) Next(vcpu int) Report {
	c := m.vcpus[vcpu]
	c.answer()
	for range m.w.cfg.Every {
		c.work(m)
	}
	return c.report()
}

// Check advances the vCPU that made r to r's step, if it is not there yet, and
// compares. The error is a *MismatchError.
func (m *Model) Check(r Report) error {
	if r.VCPU < 0 || r.VCPU >= len(m.vcpus) {
		return &MismatchError{Got: r}
	}
	want := m.Report(r.VCPU)
	for want.Step < r.Step && r.Step%m.w.cfg.Every == 0 {
		want = m.Next(r.VCPU)
	}
	if want != r {
		return &MismatchError{Got: r, Want: want}
	}
	return nil
}

// MismatchError is a report that is not what the model predicts.
type MismatchError struct{ Got, Want Report }

func (e *MismatchError) Error() string {
	return fmt.Sprintf("the guest reports %+v, the model %+v", e.Got, e.Want)
}

// Expect fills dst with the bytes that guest memory has at gpa, while every vCPU
// holds at the report that Report returns. gpa and len(dst) are multiples of
// 4096, and the range is RAM.
func (m *Model) Expect(gpa uint64, dst []byte) {
	for ; len(dst) > 0; gpa, dst = gpa+pageSize, dst[pageSize:] {
		if gpa < m.w.base {
			m.system(gpa, dst[:pageSize])
			continue
		}
		page := (gpa - m.w.base) / pageSize
		if gpa >= holeEnd {
			page -= (holeEnd - holeStart) / pageSize
		}
		m.current(page, dst[:pageSize])
	}
}

// system is a page below the content: the image and the guest's records.
func (m *Model) system(gpa uint64, dst []byte) {
	clear(dst)
	for _, s := range m.image {
		if end := s.GPA + uint64(len(s.Data)); gpa >= s.GPA && gpa < end {
			copy(dst, s.Data[gpa-s.GPA:])
		}
	}
	if v := int(gpa-blockAddr) / pageSize; gpa >= blockAddr && v < len(m.vcpus) {
		c := m.vcpus[v]
		c.report().encode(dst[offRecord:])
		if c.echoed {
			for i := range 4 {
				binary.LittleEndian.PutUint32(dst[offEcho+i*4:], c.echo)
			}
		}
	}
}

// current is a content page as it is now.
func (m *Model) current(page uint64, dst []byte) {
	m.content.Page(page, dst)
	if d := m.delta[page]; d != 0 {
		m.rewrite(page, d, dst)
	}
}

func (m *Model) rewrite(page, word uint64, dst []byte) {
	stride := m.w.cfg.Stride
	for i := int(page) & (stride - 1); i < 512; i += stride {
		q := binary.LittleEndian.Uint64(dst[i*8:]) ^ bits.RotateLeft64(word, i&63)
		binary.LittleEndian.PutUint64(dst[i*8:], q)
	}
}

func mix(sum, q uint64) uint64 { return bits.RotateLeft64((sum^q)*multiplier, 29) }

func (c *vcpuModel) report() Report {
	return Report{VCPU: c.id, Step: c.step, Sum: c.sum, State: c.prng, Lanes: c.lanes}
}

func (c *vcpuModel) answer() {
	token, echo := answers(c.w.cfg.Seed, c.id, c.step)
	c.echo, c.echoed = echo, true
	c.sum = mix(c.sum, uint64(token))
	both := uint64(echo)<<32 | uint64(echo)
	c.sum = mix(mix(c.sum, both), both)
	c.sum = mix(c.sum, c.x87)
	c.x87 = c.sum
	for _, q := range c.seldom {
		c.sum = mix(c.sum, q)
	}
}

func (c *vcpuModel) work(m *Model) {
	s := m.w.vcpus[c.id]
	c.prng ^= c.prng >> 12
	c.prng ^= c.prng << 25
	c.prng ^= c.prng >> 27
	r, _ := bits.Mul64(c.prng*xorshiftMu, s.workset)
	page := s.first + r/runPages*s.spacing + r%runPages

	m.current(page, c.page[:])
	sum := c.sum
	for i := 0; i < pageSize; i += 8 {
		sum = mix(sum, binary.LittleEndian.Uint64(c.page[i:]))
	}
	c.turn(c.page[c.step*64%pageSize:])
	for _, lane := range c.lanes {
		sum = mix(sum, lane)
	}
	c.acc[0] += sum
	c.acc[1] ^= c.acc[0]
	c.acc[2] += c.acc[1]
	c.sum = mix(sum, c.acc[2])
	c.step++
	m.delta[page] ^= c.sum
}

// turn is what a step does to the vector registers, with 32 bytes of the page.
func (c *vcpuModel) turn(data []byte) {
	lanes := 2
	if c.w.cfg.AVX2 {
		lanes = 4
	}
	for l := range lanes {
		c.vec[15][l] ^= binary.LittleEndian.Uint64(data[l*8:])
		for i := 14; i >= 0; i-- {
			if i%2 == 0 {
				c.vec[i][l] += c.vec[i+1][l]
			} else {
				c.vec[i][l] ^= c.vec[i+1][l]
			}
		}
		c.lanes[l] = c.vec[0][l]
	}
}

// splitmix is the SplitMix64 generator (Steele, Lea and Flood, 2014).
type splitmix uint64

func (s *splitmix) next() uint64 {
	*s += multiplier
	return scramble(uint64(*s))
}

func scramble(z uint64) uint64 {
	z = (z ^ z>>30) * 0xbf58476d1ce4e5b9
	z = (z ^ z>>27) * 0x94d049bb133111eb
	return z ^ z>>31
}
