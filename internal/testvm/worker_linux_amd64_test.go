package testvm

import (
	"bytes"
	"context"
	"errors"
	"testing"
	"time"

	"golang.org/x/sys/cpu"
)

// limit is far more than any of these tests needs.
const limit = 2 * time.Minute

func testContext(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeoutCause(t.Context(), limit, errors.New("the guest did not get there in time"))
	t.Cleanup(cancel)
	return ctx
}

func TestWorker(t *testing.T) {
	for _, tc := range []struct {
		name  string
		cfg   WorkerConfig
		steps uint64
	}{
		{"frequent reports", WorkerConfig{Memory: 8 << 20, Every: 7}, 1400},
		{"sse", WorkerConfig{Memory: 64 << 20, Every: 1000}, 20000},
		{"avx2", WorkerConfig{Memory: 64 << 20, Every: 1000, AVX2: true}, 20000},
		{"fill", WorkerConfig{Memory: 32 << 20, Every: 500, Fill: true}, 5000},
		{"whole pages", WorkerConfig{Memory: 32 << 20, Stride: 1}, 5000},
		{"two vCPUs", WorkerConfig{Memory: 64 << 20, VCPUs: 2, AVX2: true}, 10000},
		{"four vCPUs", WorkerConfig{Memory: 64 << 20, VCPUs: 4, Fill: true}, 10000},
		{"working set", WorkerConfig{Memory: 64 << 20, VCPUs: 2, WorkingSet: 4 << 20}, 10000},
		{"above 4 GiB", WorkerConfig{Memory: 3<<30 + 256<<20, VCPUs: 2, WorkingSet: 16 << 20}, 10000},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if tc.cfg.AVX2 && !cpu.X86.HasAVX2 {
				t.Skip("this processor has no AVX2")
			}
			tc.cfg.Seed = 42
			testWorker(t, tc.cfg, tc.steps)
		})
	}
}

func testWorker(t *testing.T, cfg WorkerConfig, steps uint64) {
	w, err := NewWorker(cfg)
	must(t, err)
	content := Content(NewPattern(cfg.Seed))
	model := NewModel(w, content)
	checked := make(chan error, 1)
	dev := NewDevice(w, nil, steps, func(r Report) {
		if err := model.Check(r); err != nil {
			select {
			case checked <- err:
			default:
			}
		}
	})
	m := newMachine(t, cfg.Memory, w.Image(), dev)
	if !cfg.Fill && cfg.Memory <= 1<<30 {
		must(t, w.Load(content, func(gpa uint64, data []byte) error {
			copy(m.ram[gpa:], data)
			return nil
		}))
	}
	if cfg.Memory > 1<<30 { // sparse: the guest's memory begins as zero
		model = NewModel(w, zeros{})
	}
	began := time.Now()
	m.start(t)
	reports, err := dev.WaitHeld(testContext(t))
	must(t, err)
	took := time.Since(began)
	m.halt()
	select {
	case err := <-checked:
		t.Fatal(err)
	default:
	}
	high := uint64(0)
	for v, r := range reports {
		if r != model.Report(v) || r.Step < steps {
			t.Fatal(&MismatchError{Got: r, Want: model.Report(v)})
		}
	}
	for p, d := range model.delta {
		if d != 0 && w.PageGPA(uint64(p)) >= holeEnd {
			high++
		}
	}
	if cfg.Memory > holeStart && high == 0 {
		t.Fatal("no page above 4 GiB was worked on")
	}
	compareMemory(t, m, model)
	t.Logf("%d vCPUs, %d steps each in %v: %.0f steps/s; %d pages above 4 GiB rewritten",
		len(reports), reports[0].Step, took, float64(len(reports))*float64(steps)/took.Seconds(), high)
}

// compareMemory compares every byte of a guest's RAM with the model.
func compareMemory(t *testing.T, m *machine, model *Model) {
	t.Helper()
	want := make([]byte, 256<<10)
	for gpa := uint64(0); gpa < endOfRAM(m.memory); {
		if gpa >= holeStart && gpa < holeEnd {
			gpa = holeEnd
			continue
		}
		n := min(uint64(len(want)), endOfRAM(m.memory)-gpa)
		model.Expect(gpa, want[:n])
		if got := m.ram[gpa : gpa+n]; !bytes.Equal(got, want[:n]) {
			t.Fatal(difference(gpa, got, want[:n]))
		}
		gpa += n
	}
}

// zeros is memory that nobody has filled.
type zeros struct{}

func (zeros) Page(_ uint64, dst []byte) bool {
	clear(dst)
	return false
}

func TestWorkerFault(t *testing.T) {
	cfg := WorkerConfig{Memory: 8 << 20, Fault: true}
	w, err := NewWorker(cfg)
	must(t, err)
	dev := NewDevice(w, nil, 0, nil)
	m := newMachine(t, cfg.Memory, w.Image(), dev)
	m.start(t)
	_, err = dev.WaitHeld(testContext(t))
	var fault *FaultError
	if !errors.As(err, &fault) {
		t.Fatalf("got %v, want a FaultError", err)
	}
	const invalidOpcode = 6
	ud2 := []byte{0x0f, 0x0b}
	if fault.Vector != invalidOpcode || !bytes.HasPrefix(workerCode[fault.RIP-codeAddr:], ud2) {
		t.Fatalf("got %v, want vector 6 at ud2", fault)
	}
}

func TestWorkerPowerOff(t *testing.T) {
	for _, off := range []PortWrite{{0x604, 1, 0x34}, {0x604, 2, 0x2034}, {0x604, 4, 0x12345678}} {
		w, err := NewWorker(WorkerConfig{Memory: 8 << 20, PowerOff: off})
		must(t, err)
		dev := &offDevice{Device: NewDevice(w, nil, 0, nil), off: writes{make(chan PortWrite, 1)}}
		m := newMachine(t, 8<<20, w.Image(), dev)
		m.start(t)
		_, err = dev.WaitHeld(testContext(t))
		must(t, err)
		dev.PowerOff()
		select {
		case got := <-dev.off.got:
			checkWrite(t, got, off)
		case <-testContext(t).Done():
			t.Fatal("no write to the power-off port")
		}
		m.halt()
	}
}

// offDevice is a Device with the power-off port besides.
type offDevice struct {
	*Device
	off writes
}

func (d *offDevice) Out(port uint16, data []byte) {
	if port == 0x604 {
		d.off.Out(port, data)
		return
	}
	d.Device.Out(port, data)
}

// TestWorkerStopAndGo stops the vCPUs wherever they are, often within a report,
// and lets them go on with a new Device.
func TestWorkerStopAndGo(t *testing.T) {
	const memory, stops = 16 << 20, 100
	w, err := NewWorker(WorkerConfig{Memory: memory, VCPUs: 2, Every: 3, Fill: true, Seed: 11})
	must(t, err)
	model := NewModel(w, NewPattern(11))
	reported := make(chan error, 1)
	tell := func(r Report) {
		err := model.Check(r)
		if err != nil { // stays until someone sees it
			select {
			case <-reported:
			default:
			}
		}
		select {
		case reported <- err:
		default:
		}
	}
	dev := NewDevice(w, nil, NoLimit, tell)
	m := newMachine(t, memory, w.Image(), dev)
	ctx := testContext(t)
	within := 0
	for range stops {
		m.start(t)
		select {
		case err := <-reported:
			must(t, err)
		case <-ctx.Done():
			t.Fatal("no report in time")
		}
		m.halt()
		saved := dev.State()
		for _, s := range saved {
			if len(s.Partial) > 0 {
				within++
			}
		}
		dev = NewDevice(w, saved, NoLimit, tell)
		m.dev = dev
	}
	dev.SetLimit(0)
	m.start(t)
	reports, err := dev.WaitHeld(ctx)
	must(t, err)
	m.halt()
	for _, r := range reports {
		must(t, model.Check(r))
	}
	compareMemory(t, m, model)
	t.Logf("%d stops; %d times a vCPU was within a report", stops, within)
}
