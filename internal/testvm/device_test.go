package testvm

import (
	"bytes"
	"context"
	"errors"
	"testing"
)

func newTestWorker(t testing.TB, cfg WorkerConfig) *Worker {
	t.Helper()
	w, err := NewWorker(cfg)
	must(t, err)
	return w
}

func TestWorkerConfig(t *testing.T) {
	for _, tc := range []struct {
		field string
		cfg   WorkerConfig
	}{
		{"Memory", WorkerConfig{}},
		{"Memory", WorkerConfig{Memory: 4<<20 + 1}},
		{"Memory", WorkerConfig{Memory: 1 << 40}},
		{"Memory", WorkerConfig{Memory: 4 << 20, VCPUs: 64}},
		{"VCPUs", WorkerConfig{Memory: 1 << 30, VCPUs: 65}},
		{"VCPUs", WorkerConfig{Memory: 1 << 30, VCPUs: -1}},
		{"Stride", WorkerConfig{Memory: 1 << 30, Stride: 3}},
		{"Stride", WorkerConfig{Memory: 1 << 30, Stride: 1024}},
		{"Ports", WorkerConfig{Memory: 1 << 30, VCPUs: 64, Ports: 0xfff0}},
	} {
		_, err := NewWorker(tc.cfg)
		var bad *ConfigError
		if !errors.As(err, &bad) || bad.Field != tc.field {
			t.Errorf("%+v: got %v, want a ConfigError of %s", tc.cfg, err, tc.field)
		}
	}
}

func TestTimerAndCrashConfig(t *testing.T) {
	var bad *ConfigError
	for _, cfg := range []TimerConfig{
		{},
		{Memory: 4 << 20, VCPUs: 3},
		{Memory: 4 << 20, Source: 9},
		{Memory: 4 << 20, Source: TimerPIT, Period: 1 << 16},
		{Memory: 4 << 20, Ports: 0xffff},
	} {
		if _, err := Timer(cfg); !errors.As(err, &bad) {
			t.Errorf("Timer(%+v): got %v, want a ConfigError", cfg, err)
		}
	}
	for _, cfg := range []CrashConfig{
		{}, {Memory: 4 << 20, Kind: -1}, {Memory: 4 << 20, Kind: 99}, {Memory: 4 << 20, Kind: CrashHalt, User: true},
	} {
		if _, err := Crash(cfg); !errors.As(err, &bad) {
			t.Errorf("Crash(%+v): got %v, want a ConfigError", cfg, err)
		}
	}
}

// TestStripes checks that the pages that vCPUs choose from are RAM, their own,
// and as many as asked for.
func TestStripes(t *testing.T) {
	for _, cfg := range []WorkerConfig{
		{Memory: 8 << 20, VCPUs: 3},
		{Memory: 64 << 20, VCPUs: 2, WorkingSet: 1 << 20},
		{Memory: 64 << 20, VCPUs: 2, WorkingSet: 1},
		{Memory: 6 << 30, VCPUs: 4, WorkingSet: 100 << 20},
		{Memory: 3 << 30, WorkingSet: 1 << 40},
	} {
		w := newTestWorker(t, cfg)
		if got := w.PageGPA(w.Pages()-1) + pageSize; got != endOfRAM(cfg.Memory) {
			t.Errorf("%+v: the content ends at %#x, RAM at %#x", cfg, got, endOfRAM(cfg.Memory))
		}
		next := uint64(0)
		for v, s := range w.vcpus {
			if s.first != next {
				t.Errorf("%+v: vCPU %d begins at page %d, want %d", cfg, v, s.first, next)
			}
			next = s.first + s.pages
			last := s.workset - 1
			if end := last/runPages*s.spacing + last%runPages; s.workset == 0 || end >= s.pages {
				t.Errorf("%+v: vCPU %d chooses page %d of %d", cfg, v, end, s.pages)
			}
		}
		if next != w.Pages() {
			t.Errorf("%+v: stripes end at page %d of %d", cfg, next, w.Pages())
		}
	}
}

// TestModelBeginsWithImage checks that memory as the host loads it is what the
// model expects at the first reports.
func TestModelBeginsWithImage(t *testing.T) {
	const memory = 16 << 20
	w := newTestWorker(t, WorkerConfig{Memory: memory, VCPUs: 2, Seed: 5})
	content := NewPattern(1)
	ram := make([]byte, memory)
	end := uint64(0)
	for _, s := range w.Image().Load {
		if s.GPA < end {
			t.Errorf("segment %#x is not above the one before", s.GPA)
		}
		end = s.GPA + uint64(copy(ram[s.GPA:], s.Data))
	}
	must(t, w.Load(content, func(gpa uint64, data []byte) error {
		copy(ram[gpa:], data)
		return nil
	}))
	want := make([]byte, memory)
	NewModel(w, content).Expect(0, want)
	if !bytes.Equal(ram, want) {
		t.Fatal(difference(0, ram, want))
	}
}

func TestLoadReturnsTheError(t *testing.T) {
	w := newTestWorker(t, WorkerConfig{Memory: 16 << 20})
	full := errors.New("full")
	if err := w.Load(NewPattern(1), func(uint64, []byte) error { return full }); !errors.Is(err, full) {
		t.Errorf("got %v, want %v", err, full)
	}
}

// send sends a record by dwords, from the given one on.
func send(out func(uint16, []byte), port uint16, record []byte, from, to int) {
	for i := from * 4; i < to*4; i += 4 {
		out(port, record[i:i+4])
	}
}

// TestDeviceGoesOn cuts a report anywhere and lets a new device go on.
func TestDeviceGoesOn(t *testing.T) {
	w := newTestWorker(t, WorkerConfig{Memory: 16 << 20, VCPUs: 2, Seed: 9})
	model := NewModel(w, NewPattern(9))
	record := make([]byte, recordSize)
	want := model.Next(1)
	want.encode(record)
	port, _ := w.PortRange()
	port += portsPerVCPU
	for cut := range recordSize/4 + 1 {
		first := NewDevice(w, nil, NoLimit, nil)
		send(first.Out, port, record, 0, cut)
		var got []Report
		second := NewDevice(w, first.State(), NoLimit, func(r Report) { got = append(got, r) })
		send(second.Out, port, record, cut, recordSize/4)
		if s := second.State()[1]; s.Last != want || len(s.Partial) != 0 {
			t.Fatalf("cut at %d: %+v, want %+v", cut, s, want)
		}
		if cut < recordSize/4 && (len(got) != 1 || model.Check(got[0]) != nil) {
			t.Fatalf("cut at %d: reports %+v", cut, got)
		}
		token, echo := make([]byte, 4), make([]byte, 4)
		second.In(port+portToken, token)
		second.In(port+portEcho, echo)
		wantToken, wantEcho := answers(9, 1, want.Step)
		if [2]uint32{le32(token), le32(echo)} != [2]uint32{wantToken, wantEcho} {
			t.Fatalf("cut at %d: answers %x %x", cut, token, echo)
		}
	}
}

func le32(b []byte) uint32 {
	return uint32(b[0]) | uint32(b[1])<<8 | uint32(b[2])<<16 | uint32(b[3])<<24
}

func TestWaitHeldFails(t *testing.T) {
	w := newTestWorker(t, WorkerConfig{Memory: 16 << 20, VCPUs: 2})
	port, _ := w.PortRange()
	record := make([]byte, recordSize)

	stop := errors.New("stop")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(stop)
	if _, err := NewDevice(w, nil, 0, nil).WaitHeld(ctx); !errors.Is(err, stop) {
		t.Errorf("got %v, want %v", err, stop)
	}
	var bad *RecordError
	dev := NewDevice(w, nil, 0, nil)
	send(dev.Out, port, record, 0, recordSize/4)
	if _, err := dev.WaitHeld(t.Context()); !errors.As(err, &bad) {
		t.Errorf("got %v, want a RecordError", err)
	}
	var mismatch *MismatchError
	Report{VCPU: 1}.encode(record)
	dev = NewDevice(w, nil, 0, nil)
	send(dev.Out, port, record, 0, recordSize/4)
	if _, err := dev.WaitHeld(t.Context()); !errors.As(err, &mismatch) {
		t.Errorf("a report of vCPU 1 from vCPU 0: got %v, want a MismatchError", err)
	}
}

// FuzzDevices sends any accesses to the devices: bytes from a guest must not
// crash the host.
func FuzzDevices(f *testing.F) {
	record := make([]byte, recordSize)
	Report{Step: 1}.encode(record)
	f.Add(uint16(defaultPorts), record)
	record[0]++
	f.Add(uint16(defaultPorts), record)
	f.Add(uint16(defaultPorts+portsPerVCPU), []byte("CVTR"))
	f.Add(uint16(0), []byte{1})
	w := newTestWorker(f, WorkerConfig{Memory: 16 << 20, VCPUs: 2})
	f.Fuzz(func(t *testing.T, port uint16, data []byte) {
		model := NewModel(w, NewPattern(0))
		dev := NewDevice(w, nil, 0, func(r Report) {
			if r.Step <= 2*w.Config().Every {
				_ = model.Check(r)
			}
		})
		timer := NewTimerDevice(TimerConfig{VCPUs: 2}, nil, func(TimerReport, error) {})
		for len(data) > 0 {
			n := min(4, len(data))
			dev.Out(port, data[:n])
			timer.Out(port, data[:n])
			answer := make([]byte, n)
			dev.In(port, answer)
			timer.In(port, answer)
			data = data[n:]
		}
		if s := dev.State()[0]; len(s.Partial) >= recordSize {
			t.Fatalf("%d bytes are kept", len(s.Partial))
		}
	})
}
