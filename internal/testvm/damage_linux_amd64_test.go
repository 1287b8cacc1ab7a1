package testvm

import (
	"errors"
	"testing"

	"golang.org/x/sys/cpu"

	"github.com/cryovisor/cryovisor/internal/kvm"
)

// TestWorkerShowsDamage proves that the oracle sees what it is there to see: one
// bit of memory, or of a register, that changes while the guest is stopped.
func TestWorkerShowsDamage(t *testing.T) {
	xsave := func(offset int) func(*testing.T, *machine, *Model) {
		return func(t *testing.T, m *machine, _ *Model) {
			area, err := m.vcpus[0].XSave()
			must(t, err)
			area[offset] ^= 1
			must(t, m.vcpus[0].SetXSave(area))
		}
	}
	regs := func(change func(r *kvm.Regs)) func(*testing.T, *machine, *Model) {
		return func(t *testing.T, m *machine, _ *Model) {
			r, err := m.vcpus[0].Regs()
			must(t, err)
			change(&r)
			must(t, m.vcpus[0].SetRegs(r))
		}
	}
	sregs := func(change func(s *kvm.Sregs)) func(*testing.T, *machine, *Model) {
		return func(t *testing.T, m *machine, _ *Model) {
			s, err := m.vcpus[0].Sregs()
			must(t, err)
			change(&s)
			must(t, m.vcpus[0].SetSregs(s))
		}
	}
	// Offsets in the XSAVE area (Intel SDM, volume 1, 13.4 and CPUID leaf 0xd).
	const fcw, controls, st0, xmm0, ymmHigh0 = 0, 24, 32, 160, 576
	for name, damage := range map[string]func(*testing.T, *machine, *Model){
		"nothing":         func(*testing.T, *machine, *Model) {},
		"xmm0":            xsave(xmm0),
		"xmm15, high":     xsave(xmm0 + 15*16 + 15),
		"ymm0, high":      xsave(ymmHigh0),
		"ymm15, high":     xsave(ymmHigh0 + 15*16 + 15),
		"x87 control":     xsave(fcw + 1),
		"MXCSR":           xsave(controls + 1),
		"st(0)":           xsave(st0 + 3),
		"fs base":         sregs(func(s *kvm.Sregs) { s.FS.Base += 8 }),
		"gs base":         sregs(func(s *kvm.Sregs) { s.GS.Base += 8 }),
		"accumulator":     regs(func(r *kvm.Regs) { r.R10 ^= 1 << 63 }),
		"checksum":        regs(func(r *kvm.Regs) { r.RBX ^= 1 << 63 }),
		"page generator":  regs(func(r *kvm.Regs) { r.RBP ^= 1 << 40 }),
		"multiplier":      regs(func(r *kvm.Regs) { r.R15 ^= 1 << 63 }),
		"page to be used": func(_ *testing.T, m *machine, model *Model) { m.ram[nextPage(model)+4095] ^= 0x80 },
	} {
		t.Run(name, func(t *testing.T) {
			if !cpu.X86.HasAVX2 {
				t.Skip("this processor has no AVX2")
			}
			err := runDamaged(t, damage)
			if name == "nothing" {
				must(t, err)
				return
			}
			var mismatch *MismatchError
			if !errors.As(err, &mismatch) {
				t.Fatalf("got %v, want a MismatchError", err)
			}
		})
	}
}

// runDamaged runs a guest, stops it, damages it, and compares its next report.
func runDamaged(t *testing.T, damage func(*testing.T, *machine, *Model)) error {
	const memory, every = 8 << 20, 100
	w, err := NewWorker(WorkerConfig{Memory: memory, Every: every, AVX2: true, Seed: 3})
	must(t, err)
	model := NewModel(w, zeros{})
	dev := NewDevice(w, nil, every, nil)
	m := newMachine(t, memory, w.Image(), dev)
	ctx := testContext(t)
	m.start(t)
	reports, err := dev.WaitHeld(ctx)
	must(t, err)
	m.halt()
	must(t, model.Check(reports[0]))
	damage(t, m, model)
	m.start(t)
	dev.SetLimit(2 * every)
	reports, err = dev.WaitHeld(ctx)
	must(t, err)
	m.halt()
	return model.Check(reports[0])
}

// nextPage is the address of the page that vCPU 0 will work on first.
func nextPage(m *Model) uint64 {
	ahead := *m.vcpus[0]
	delta := append([]uint64(nil), m.delta...)
	ahead.answer()
	ahead.work(m)
	for p := range delta {
		if m.delta[p] != delta[p] {
			m.delta[p] = delta[p]
			return m.w.PageGPA(uint64(p))
		}
	}
	panic("a step changed no page")
}
