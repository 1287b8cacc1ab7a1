package testvm

import (
	"errors"
	"testing"

	"github.com/cryovisor/cryovisor/internal/kvm"
)

func TestTimer(t *testing.T) {
	for _, tc := range []struct {
		name string
		cfg  TimerConfig
	}{
		{"periodic", TimerConfig{}},
		{"periodic busy", TimerConfig{Busy: true}},
		{"deadline", TimerConfig{Source: TimerDeadline}},
		{"pit", TimerConfig{Source: TimerPIT}},
		{"two vCPUs", TimerConfig{VCPUs: 2}},
		{"two vCPUs, 5 GiB", TimerConfig{VCPUs: 2, Memory: 5 << 30}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if tc.cfg.Memory == 0 {
				tc.cfg.Memory = 4 << 20
			}
			im, err := Timer(tc.cfg)
			must(t, err)
			const reports = 20
			type message struct {
				r   TimerReport
				err error
			}
			got := make(chan message)
			ctx := testContext(t)
			dev := NewTimerDevice(tc.cfg, nil, func(r TimerReport, err error) {
				select {
				case got <- message{r, err}:
				case <-ctx.Done():
				}
			})
			m := newMachine(t, tc.cfg.Memory, im, dev)
			m.start(t)
			left := make([]int, len(im.VCPUs))
			for waiting := len(left); waiting > 0; {
				select {
				case msg := <-got:
					must(t, msg.err)
					if left[msg.r.VCPU]++; left[msg.r.VCPU] == reports {
						waiting--
					}
				case err := <-m.ends[0]:
					t.Fatal(err)
				case <-ctx.Done():
					t.Fatalf("%d reports of %d vCPUs in time", left, len(left))
				}
			}
			dev.Hold(true)
			go func() {
				for range got { // a vCPU may be delivering one more
				}
			}()
			m.halt()
			close(got)
		})
	}
}

func TestCrash(t *testing.T) {
	write := PortWrite{Port: 0x64, Width: 1, Value: 0xfe}
	for _, tc := range []struct {
		name string
		cfg  CrashConfig
		want kvm.ExitReason // of those that end by themselves
	}{
		{"triple fault", CrashConfig{Kind: CrashTripleFault}, kvm.ExitShutdown},
		{"triple fault in user mode", CrashConfig{Kind: CrashTripleFault, User: true}, kvm.ExitShutdown},
		{"unemulatable", CrashConfig{Kind: CrashUnemulatable, Write: write}, kvm.ExitInternalError},
		{"write", CrashConfig{Kind: CrashWrite, Write: write}, 0},
		{"write in user mode", CrashConfig{Kind: CrashWrite, Write: write, User: true}, 0},
		{"halt", CrashConfig{Kind: CrashHalt}, 0},
		{"spin", CrashConfig{Kind: CrashSpin, User: true, VCPUs: 2}, 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			tc.cfg.Memory = 4 << 20
			im, err := Crash(tc.cfg)
			must(t, err)
			dev := &writes{got: make(chan PortWrite, 1)}
			m := newMachine(t, tc.cfg.Memory, im, dev)
			m.start(t)
			switch {
			case tc.want == kvm.ExitInternalError:
				select {
				case got := <-dev.got: // this KVM lets the processor execute it
					checkWrite(t, got, write)
				case err := <-m.ends[0]:
					checkExit(t, err, tc.want)
				case <-testContext(t).Done():
					t.Fatal("neither an exit nor a write")
				}
			case tc.want != 0:
				checkExit(t, m.wait(testContext(t), 0), tc.want)
			case tc.cfg.Kind == CrashWrite:
				select {
				case got := <-dev.got:
					checkWrite(t, got, write)
				case <-testContext(t).Done():
					t.Fatal("no write")
				}
			}
			m.halt()
			if tc.want == 0 {
				must(t, m.wait(testContext(t), 0))
			}
		})
	}
}

func checkWrite(t *testing.T, got, want PortWrite) {
	t.Helper()
	if got != want {
		t.Fatalf("the guest wrote %+v, want %+v", got, want)
	}
}

func checkExit(t *testing.T, err error, want kvm.ExitReason) {
	t.Helper()
	var exit *exitError
	if !errors.As(err, &exit) || exit.Reason != want {
		t.Fatalf("got %v, want %v", err, want)
	}
	if want == kvm.ExitInternalError && exit.RIP != codeAddr+uint64(CrashUnemulatable)*crashEntry {
		t.Fatalf("%v: RIP is not at the instruction", err)
	}
}

// writes collects port writes.
type writes struct{ got chan PortWrite }

func (d *writes) In(_ uint16, data []byte) { clear(data) }

func (d *writes) Out(port uint16, data []byte) {
	w := PortWrite{Port: port, Width: len(data)}
	for i, b := range data {
		w.Value |= uint32(b) << (8 * i)
	}
	select {
	case d.got <- w:
	default:
	}
}
