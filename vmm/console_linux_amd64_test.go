package vmm_test

import (
	"bytes"
	"errors"
	"io"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cryovisor/cryovisor/vmm"
)

// screen is a console's output.
type screen struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (s *screen) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.buf.Write(p)
}

func (s *screen) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.buf.String()
}

// TestConsole boots a flat image that talks over the serial port.
func TestConsole(t *testing.T) {
	needKVM(t)
	out := &screen{}
	vm := newVM(t, flat(t, "echo.bin", vmm.Hardware{Console: vmm.Console{In: strings.NewReader("Hello, World."), Out: out}}))
	must(t, vm.Start())
	if err := endOf(t, vm); !errors.Is(err, vmm.ErrPowerOff) {
		t.Fatal(err)
	}
	must(t, vm.Close()) // writes out what is left
	if want := "ready\nhELLO\f\x00wORLD"; out.String() != want {
		t.Errorf("the guest wrote %q, want %q", out, want)
	}
}

// TestConsoleThroughMachines sends a guest more input than it has taken at each of several moves. It comes
// out whole and in order: what was read is in the state, and what was not is still in the pipe.
func TestConsoleThroughMachines(t *testing.T) {
	needKVM(t)
	r, w, err := os.Pipe()
	must(t, err)
	defer r.Close()
	enough, sent := make(chan struct{}), make(chan string)
	go feed(w, enough, sent)
	out := &screen{}
	hw := vmm.Hardware{Console: vmm.Console{In: r, Out: out}}
	vm := newVM(t, flat(t, "echo.bin", hw))
	must(t, vm.Start())
	held := 0
	for moves := 0; moves < 10; moves++ {
		want := len(out.String()) + 10
		waitFor(t, vm, func() bool { return len(out.String()) >= want })
		pause(t, vm)
		state, err := vm.State()
		must(t, err)
		held = max(held, len(state.Devices[0].Data))
		vm = move(t, vm, hw)
		must(t, vm.Resume())
	}
	if held < 20 {
		t.Errorf("no state held input: at most %d bytes", held)
	}
	close(enough)
	text := <-sent
	if err := endOf(t, vm); !errors.Is(err, vmm.ErrPowerOff) {
		t.Fatal(err)
	}
	must(t, vm.Close())
	if want := "ready\n" + strings.ToLower(text); out.String() != want {
		t.Errorf("%d bytes arrived, want %d, or others:\n%q\n%q", len(out.String()), len(want), out, want)
	}
}

// feed writes letters to w until enough is closed, then a dot, and says which letters they were. A write
// that fails shows as text that does not arrive.
func feed(w io.WriteCloser, enough <-chan struct{}, sent chan<- string) {
	var text strings.Builder
	for i := 0; ; i++ {
		select {
		case <-enough:
			_, _ = io.WriteString(w, ".")
			_ = w.Close()
			sent <- text.String()
			return
		default:
		}
		letters := strings.Repeat(string(rune('A'+(i*i+i/26)%26)), 1+i%7)
		text.WriteString(letters)
		_, _ = io.WriteString(w, letters)
	}
}

// TestPausedMachineReadsNoInput: what it read after its state was taken would be in no machine.
func TestPausedMachineReadsNoInput(t *testing.T) {
	needKVM(t)
	r, w, err := os.Pipe()
	must(t, err)
	defer r.Close()
	defer w.Close()
	out := &screen{}
	vm := newVM(t, flat(t, "echo.bin", vmm.Hardware{Console: vmm.Console{In: r, Out: out}}))
	must(t, vm.Start())
	waitFor(t, vm, func() bool { return out.String() == "ready\n" })
	pause(t, vm)
	_, err = io.WriteString(w, "x.")
	must(t, err)
	before := encoded(t, vm)
	must(t, vm.Close())
	if n := len(before.Devices[0].Data); n != 16 {
		t.Errorf("the state of the serial port has %d bytes, 16 without input", n)
	}
	// Close has left the deadline in the past.
	must(t, r.SetReadDeadline(time.Time{}))
	got := make([]byte, 8)
	if n, err := r.Read(got); err != nil || string(got[:n]) != "x." {
		t.Errorf("%q, %v is left in the pipe", got[:n], err)
	}
}

// brokenPipe is a console whose reader has gone.
type brokenPipe struct{}

func (brokenPipe) Write([]byte) (int, error) { return 0, io.ErrClosedPipe }

func TestConsoleThatFails(t *testing.T) {
	needKVM(t)
	in := io.MultiReader(strings.NewReader("abc"), failingReader{})
	vm := newVM(t, flat(t, "echo.bin", vmm.Hardware{Console: vmm.Console{In: in, Out: brokenPipe{}}}))
	must(t, vm.Start())
	pause(t, vm) // nobody takes the output, and nobody waits for it
	must(t, vm.Resume())
	must(t, vm.Close())
}

type failingReader struct{}

func (failingReader) Read([]byte) (int, error) { return 0, io.ErrUnexpectedEOF }

// stuckWriter is a console that takes nothing until it is let go.
type stuckWriter struct{ entered, release chan struct{} }

func (w stuckWriter) Write(p []byte) (int, error) {
	select {
	case w.entered <- struct{}{}:
	default:
	}
	<-w.release
	return len(p), nil
}

// TestCloseWithAStuckConsole: neither Pause nor Close may hang on a console that takes nothing.
func TestCloseWithAStuckConsole(t *testing.T) {
	needKVM(t)
	w := stuckWriter{make(chan struct{}, 1), make(chan struct{})}
	defer close(w.release)
	vm := newVM(t, flat(t, "echo.bin", vmm.Hardware{Console: vmm.Console{Out: w}}))
	must(t, vm.Start())
	<-w.entered
	paused := make(chan error, 1)
	go func() { paused <- vm.Pause(testContext(t)) }()
	must(t, vm.Close())
	if err := <-paused; !errors.Is(err, vmm.ErrClosed) {
		t.Errorf("Pause: %v", err)
	}
}
