//go:build linux && amd64

package bench

import (
	"context"
	"encoding/binary"
	"sync/atomic"
	"testing"
	"time"

	"filippo.io/age"

	"github.com/cryovisor/cryovisor/lifecycle"
	"github.com/cryovisor/cryovisor/memory"
	"github.com/cryovisor/cryovisor/vmm"
)

// What a reader reads: a set of pages, from an address on.
const (
	readFrom = 512 << 20
	readSet  = 256 << 20
)

// reader is the host's side of a guest in user mode that waits until it may, reads a word of each page of its set, says so, and waits again.
type reader struct {
	may  atomic.Bool
	read chan struct{}
}

// In says whether the guest may go on.
func (r *reader) In(_ uint16, data []byte) {
	clear(data)
	if r.may.CompareAndSwap(true, false) {
		data[0] = 1
	}
}

// Out is told that the guest has read.
func (r *reader) Out(uint16, []byte) { r.read <- struct{}{} }

func newReader() *reader { return &reader{read: make(chan struct{}, 1)} }

func (r *reader) hardware(port uint16) vmm.Hardware {
	return vmm.Hardware{Ports: []vmm.Ports{{First: port, Last: port + 3, Device: r}}}
}

// time is how long the guest takes to read its set.
func (r *reader) time() time.Duration {
	began := time.Now()
	r.may.Store(true)
	<-r.read
	return time.Since(began)
}

// program makes a worker's machine, with its page tables and its memory, execute this instead:
//
//	start: mov edx, port
//	wait:  in eax, dx; test eax, eax; jz wait
//	       mov rsi, r8; mov rcx, r9
//	next:  mov rax, [rsi]; add rsi, 4096; dec rcx; jnz next
//	       out dx, eax; jmp wait
func (r *rig) readerProgram(port uint16) vmm.Program {
	code := binary.LittleEndian.AppendUint32([]byte{0xba}, uint32(port))
	code = append(code, 0xed, 0x85, 0xc0, 0x74, 0xfb, 0x4c, 0x89, 0xc6, 0x4c, 0x89, 0xc9, 0x48, 0x8b, 0x06,
		0x48, 0x81, 0xc6, 0x00, 0x10, 0x00, 0x00, 0x48, 0xff, 0xc9, 0x75, 0xf1, 0xef, 0xeb, 0xe3)
	p := r.worker.Image().Program()
	start := p.Start
	p.Start = func(vcpu int) vmm.CPUStart {
		s := start(vcpu)
		s.Regs.R8, s.Regs.R9 = readFrom, readSet/memory.PageSize
		return s
	}
	at := start(0).Regs.RIP
	for i, segment := range p.Load {
		if segment.GPA <= at && at < segment.GPA+uint64(len(segment.Data)) {
			data := append([]byte(nil), segment.Data...)
			copy(data[at-segment.GPA:], code)
			p.Load[i].Data = data
		}
	}
	return p
}

// bootReader boots a reader, whose memory is loaded.
func (r *rig) bootReader(port uint16) (*lifecycle.Machine, *reader) {
	r.b.Helper()
	guest := newReader()
	m, err := lifecycle.Boot(r.b.Context(), vmm.Config{
		MemoryBytes: r.worker.Config().Memory, Boot: r.readerProgram(port), Hardware: guest.hardware(port),
	}, lifecycle.Disks{})
	r.must(err)
	mem := m.VM.Memory()
	r.must(r.worker.Load(r.content, func(gpa uint64, data []byte) error {
		_, err := mem.WriteAt(data, int64(gpa))
		return err
	}))
	r.must(m.VM.Start())
	return m, guest
}

// BenchmarkReadWorkingSet is the time until a resumed guest has read 256 MiB: each page when it is touched, prefetched while it reads as the record of
// an earlier resume says, prefetched before, loaded before, and in memory that is the guest's own, which no snapshot is behind.
func BenchmarkReadWorkingSet(b *testing.B) {
	r := newRig(b, 1<<30, 0)
	port, _ := r.worker.PortRange()
	b.Run("resident", func(b *testing.B) {
		r.b = b
		var took []time.Duration
		for b.Loop() {
			m, guest := r.bootReader(port)
			took = append(took, guest.time())
			r.must(m.Close())
		}
		b.ReportMetric(percentile(took, 0.5), "ms")
		b.ReportMetric(0, "ns/op")
	})
	r.b = b
	m, _ := r.bootReader(port)
	p, err := m.Pause(b.Context(), r.store, r.options())
	r.must(err)
	first := p.ID
	r.must(m.Close())
	resume := func(opts lifecycle.ResumeOptions) (*lifecycle.Machine, *reader) {
		guest := newReader()
		opts.Identities, opts.Hardware = []age.Identity{r.key}, guest.hardware(port)
		m, err := lifecycle.Resume(b.Context(), r.store, first, opts)
		r.must(err)
		r.must(m.Resume())
		return m, guest
	}
	m, guest := resume(lifecycle.ResumeOptions{Prefetch: lifecycle.PrefetchNone})
	guest.time()
	record, err := m.WorkingSet(context.Background())
	r.must(err)
	r.must(m.Close())
	for _, c := range []struct {
		name string
		opts lifecycle.ResumeOptions
		wait bool
	}{
		{"lazy", lifecycle.ResumeOptions{Prefetch: lifecycle.PrefetchNone}, false},
		{"prefetching", lifecycle.ResumeOptions{WorkingSet: record}, false},
		{"prefetched", lifecycle.ResumeOptions{WorkingSet: record}, true},
		{"eager", lifecycle.ResumeOptions{Eager: true}, false},
	} {
		b.Run(c.name, func(b *testing.B) {
			var took []time.Duration
			var faults, huge uint64
			for b.Loop() {
				m, guest := resume(c.opts)
				if c.wait {
					r.must(m.WaitPrefetch(b.Context()))
				}
				took = append(took, guest.time())
				stats := m.VM.Memory().Stats()
				faults, huge = faults+stats.Faults, huge+stats.HugeBytes
				r.must(m.Close())
			}
			b.ReportMetric(percentile(took, 0.5), "ms")
			b.ReportMetric(float64(faults)/float64(b.N), "faults")
			b.ReportMetric(float64(huge)/(1<<20)/float64(b.N), "huge-MiB")
			b.ReportMetric(0, "ns/op")
		})
	}
}
