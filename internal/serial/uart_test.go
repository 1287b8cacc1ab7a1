package serial

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// port drives a UART as a guest does, and fails the test on an error.
type port struct {
	*testing.T
	*UART
	mu    sync.Mutex
	edges []bool
	out   bytes.Buffer
}

func newPort(t *testing.T) *port {
	p := &port{T: t}
	return p.connect(&p.out)
}

// connect gives p a new UART that writes to out.
func (p *port) connect(out io.Writer) *port {
	u := New(Config{Out: out, IRQ: p.irq})
	p.UART = u
	p.Cleanup(func() { closeUART(p.T, u) })
	return p
}

func closeUART(t *testing.T, u *UART) {
	t.Helper()
	if err := u.Close(context.Background()); err != nil {
		t.Errorf("Close: %v", err)
	}
}

func (p *port) irq(level bool) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.edges = append(p.edges, level)
	return nil
}

func (p *port) level() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.edges) > 0 && p.edges[len(p.edges)-1]
}

func (p *port) in(off uint16) byte {
	p.Helper()
	v, err := p.Read(off)
	if err != nil {
		p.Fatal(err)
	}
	return v
}

func (p *port) outb(off uint16, v byte) {
	p.Helper()
	if err := p.Write(off, v); err != nil {
		p.Fatal(err)
	}
}

func (p *port) want(off uint16, want byte) {
	p.Helper()
	if got := p.in(off); got != want {
		p.Fatalf("register %d reads %#x, want %#x", off, got, want)
	}
}

func (p *port) wantLevel(want bool) {
	p.Helper()
	if p.level() != want {
		p.Fatalf("interrupt line is %t, want %t", p.level(), want)
	}
}

// TestProbe takes the steps of the autoconfig of Linux's 8250 driver, in its order.
func TestProbe(t *testing.T) {
	p := newPort(t)
	p.outb(regIER, 0)
	p.want(regIER, 0)
	p.outb(regIER, 0xff)
	p.want(regIER, 0x0f) // no XScale UUE bit, nothing reserved
	p.outb(regIER, 0)

	p.outb(regMCR, mcrLoop|mcrOUT2|mcrRTS)
	if got := p.in(regMSR) & 0xf0; got != msrDCD|msrCTS {
		t.Fatalf("MSR in loopback reads %#x", got)
	}
	p.outb(regMCR, 0)
	if got := p.in(regMSR) & 0xf0; got != msrDCD|msrCTS|msrDSR {
		t.Fatalf("MSR reads %#x", got)
	}

	p.outb(regIIR, 0)
	p.want(regIIR, iirNone)
	p.outb(regIIR, fcrEnable)
	p.want(regIIR, iirNone|iirFIFO)
	p.outb(regLCR, lcrDLAB) // no EFR behind DLAB
	p.want(regIIR, iirNone|iirFIFO)
	p.outb(regIIR, fcrEnable|0x20) // no 64-byte FIFO
	p.want(regIIR, iirNone|iirFIFO)
	p.outb(regLCR, 0)
	p.outb(regSCR, 0xa5)
	p.want(regSCR, 0xa5)
}

// TestTHRETest takes the steps of serial8250_THRE_test: enabling the interrupt must raise it each time.
func TestTHRETest(t *testing.T) {
	p := newPort(t)
	for range 2 {
		p.outb(regIER, ierTHRE)
		p.wantLevel(true)
		p.want(regIIR, iirTHRE)
		p.wantLevel(false)
		p.want(regIIR, iirNone)
		p.outb(regIER, 0)
	}
	p.outb(regIER, ierTHRE)
	p.outb(regIER, ierTHRE|ierRDA) // no change to THRE: still pending, not raised twice
	p.want(regIIR, iirTHRE)
	p.outb(regIER, ierTHRE)
	p.want(regIIR, iirNone)
	p.outb(regData, 'x')
	p.wantLevel(true)
	p.outb(regIER, 0)
	p.wantLevel(false)
}

func TestDivisor(t *testing.T) {
	p := newPort(t)
	p.outb(regIER, ierRDA)
	p.outb(regLCR, lcrDLAB|3)
	p.outb(regData, 0x0c)
	p.outb(regIER, 0x01)
	p.want(regData, 0x0c)
	p.want(regIER, 0x01)
	p.outb(regLCR, 3)
	p.want(regIER, ierRDA)
	p.want(regData, 0)
	p.want(regLCR, 3)
	if p.out.Len() != 0 {
		t.Fatalf("setting the divisor sent %q", p.out.Bytes())
	}
}

func TestReceivePriorityAndTrigger(t *testing.T) {
	p := newPort(t)
	p.outb(regIIR, fcrEnable|0x40) // trigger at 4
	p.outb(regIER, ierRDA|ierTHRE)
	p.want(regIIR, iirFIFO|iirTHRE)
	if n := p.Enqueue([]byte("abcde")); n != 5 {
		t.Fatalf("took %d bytes", n)
	}
	p.outb(regData, '!') // THRE pending again, behind RDA
	p.want(regIIR, iirFIFO|iirRDA)
	p.want(regIIR, iirFIFO|iirRDA) // reading it does not acknowledge data
	p.want(regData, 'a')
	p.want(regIIR, iirFIFO|iirRDA)
	p.want(regData, 'b')
	p.want(regIIR, iirFIFO|iirTimeout)
	p.want(regLSR, lsrDR|lsrTHRE|lsrTEMT)
	for _, b := range []byte("cde") {
		p.want(regData, b)
	}
	p.want(regLSR, lsrTHRE|lsrTEMT)
	p.wantLevel(true)
	p.want(regIIR, iirFIFO|iirTHRE)
	p.wantLevel(false)
	p.want(regData, 0)
}

func TestLoopbackOverrun(t *testing.T) {
	p := newPort(t)
	p.outb(regMCR, mcrLoop)
	p.in(regMSR)
	p.outb(regIER, ierRLS|ierRDA|ierMS)
	p.Enqueue([]byte("outside"))
	p.want(regLSR, lsrTHRE|lsrTEMT) // the line is cut off
	p.outb(regData, 'a')
	p.want(regIIR, iirRDA)
	p.outb(regData, 'b') // no FIFO: lost
	p.want(regIIR, iirRLS)
	p.want(regLSR, lsrDR|lsrOE|lsrTHRE|lsrTEMT)
	p.want(regLSR, lsrDR|lsrTHRE|lsrTEMT)
	p.want(regData, 'a')
	p.want(regIIR, iirNone)
	p.outb(regMCR, mcrRTS) // the lines come back: DCD, DSR, CTS changed
	p.want(regIIR, iirRDA)
	for _, b := range []byte("outside") {
		p.want(regData, b)
	}
	p.want(regIIR, iirMS)
	p.want(regMSR, msrDCD|msrDSR|msrCTS|0x0b)
	p.want(regIIR, iirNone)
	if p.out.Len() != 0 {
		t.Fatalf("loopback sent %q", p.out.Bytes())
	}
}

func TestRingIndicatorTrailingEdge(t *testing.T) {
	p := newPort(t)
	p.outb(regMCR, mcrLoop|mcrOUT1)
	p.want(regMSR, msrRI|0x0b)
	p.outb(regMCR, mcrLoop)
	p.want(regMSR, msrTERI)
}

func TestClearFIFO(t *testing.T) {
	p := newPort(t)
	p.outb(regIIR, fcrEnable)
	p.Enqueue(bytes.Repeat([]byte{'x'}, fifoSize))
	p.Enqueue([]byte("kept"))
	p.outb(regIIR, fcrClearRX) // without the enable bit: leaves FIFO mode, which clears too
	p.want(regIIR, iirNone)
	for _, b := range []byte("kept") {
		p.want(regData, b)
	}
	p.outb(regIIR, fcrEnable)
	p.Enqueue([]byte("gone"))
	p.outb(regIIR, fcrEnable|fcrClearRX)
	p.want(regLSR, lsrTHRE|lsrTEMT)
}

// TestInputSurvivesProbing: what is typed while a guest boots waits for the driver to open the port.
func TestInputSurvivesProbing(t *testing.T) {
	p := newPort(t)
	p.outb(regMCR, mcrLoop|mcrOUT2|mcrRTS)
	p.outb(regMCR, 0)
	in := bytes.Repeat([]byte("typed early "), 10)
	if p.Enqueue(in) != len(in) {
		t.Fatal("input refused")
	}
	for range 3 {
		p.outb(regIIR, fcrEnable)
		p.outb(regIIR, fcrEnable|fcrClearRX)
		p.outb(regIIR, 0)
		p.want(regLSR, lsrTHRE|lsrTEMT)
		p.want(regData, 0)
	}
	p.outb(regIIR, fcrEnable)
	p.outb(regIER, ierRDA)
	p.wantLevel(false)
	p.outb(regMCR, mcrDTR|mcrRTS|mcrOUT2)
	p.wantLevel(true)
	for _, b := range in {
		p.want(regData, b)
	}
	p.wantLevel(false)
}

func TestBackPressureOnInput(t *testing.T) {
	p := newPort(t)
	p.outb(regIIR, fcrEnable)
	in := make([]byte, 3*InputBacklog)
	for i := range in {
		in[i] = byte(i * 7)
	}
	var got []byte
	for off := 0; off < len(in) || p.in(regLSR)&lsrDR != 0; {
		off += p.Enqueue(in[off:])
		got = append(got, p.in(regData))
	}
	if !bytes.Equal(got, in) {
		t.Fatal("input was lost or reordered")
	}
	p.Enqueue(in)
	if n := p.Enqueue([]byte{1}); n != 0 {
		t.Fatalf("a full UART took %d bytes", n)
	}
}

func TestOutputInOrder(t *testing.T) {
	p := newPort(t)
	var want []byte
	for i := range 100000 {
		for p.in(regLSR)&lsrTHRE == 0 {
			runtime.Gosched()
		}
		p.outb(regData, byte(i))
		want = append(want, byte(i))
	}
	if err := p.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(p.out.Bytes(), want) {
		t.Fatal("output was lost or reordered")
	}
}

// gate is a writer that takes nothing until it is opened, and can't be interrupted.
type gate struct {
	open chan struct{}
	bytes.Buffer
}

func (g *gate) Write(p []byte) (int, error) {
	<-g.open
	return g.Buffer.Write(p)
}

// TestSlowWriter checks that the guest is told to wait, loses nothing if it does, and hears when it may go on.
func TestSlowWriter(t *testing.T) {
	g := &gate{open: make(chan struct{})}
	p := (&port{T: t}).connect(g)
	p.outb(regIER, ierTHRE)
	sent := 0
	for p.in(regLSR)&lsrTHRE != 0 {
		p.outb(regData, byte(sent))
		sent++
	}
	if sent < txSoftLimit || sent > 3*txSoftLimit {
		t.Fatalf("told to wait after %d bytes", sent)
	}
	p.wantLevel(false)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := p.Flush(ctx); !errors.Is(err, context.Canceled) {
		t.Fatalf("Flush with a stuck writer: %v", err)
	}
	if s := p.Save(); !s.THREPending {
		t.Fatal("a UART restored from here would wait for ever")
	}
	close(g.open)
	if err := p.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	p.wantLevel(true)
	if g.Len() != sent || p.Dropped() != 0 {
		t.Fatalf("writer got %d of %d bytes, %d dropped", g.Len(), sent, p.Dropped())
	}
}

func TestRudeGuestIsBounded(t *testing.T) {
	g := &gate{open: make(chan struct{})}
	p := (&port{T: t}).connect(g)
	const n = 2*txHardLimit + 1000 // one queue in the writer's hands, one full
	for range n {
		p.outb(regData, 'x')
	}
	if p.Dropped() < 1000 {
		t.Fatalf("dropped only %d of %d bytes", p.Dropped(), n)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := p.Close(ctx); !errors.Is(err, context.Canceled) {
		t.Fatalf("Close with a stuck writer: %v", err)
	}
	p.outb(regData, 'x') // still answers
	close(g.open)        // lets the goroutine end
}

type failing struct{ n int }

func (f *failing) Write(p []byte) (int, error) { return f.n, errors.ErrUnsupported }

func TestFailingWriter(t *testing.T) {
	u := New(Config{Out: &failing{}})
	p := &port{T: t, UART: u}
	p.outb(regData, 'x')
	if err := p.Flush(t.Context()); !errors.Is(err, errors.ErrUnsupported) {
		t.Fatalf("Flush: %v", err)
	}
	for range 2 * txHardLimit {
		p.outb(regData, 'y')
	}
	p.want(regLSR, lsrTHRE|lsrTEMT) // the guest runs on
	if p.Dropped() != 1+2*txHardLimit || !errors.Is(p.Err(), errors.ErrUnsupported) {
		t.Fatalf("dropped %d, error %v", p.Dropped(), p.Err())
	}
	if err := u.Close(t.Context()); !errors.Is(err, errors.ErrUnsupported) {
		t.Fatalf("Close: %v", err)
	}
}

func TestShortWriter(t *testing.T) {
	u := New(Config{Out: writerFunc(func(p []byte) (int, error) { return 0, nil })})
	p := &port{T: t, UART: u}
	p.outb(regData, 'x')
	if err := u.Close(t.Context()); !errors.Is(err, io.ErrShortWrite) {
		t.Fatalf("Close: %v", err)
	}
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// TestCloseInterruptsPipe closes a UART whose writer is a pipe that nobody reads.
func TestCloseInterruptsPipe(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	u := New(Config{Out: w})
	p := &port{T: t, UART: u}
	for range 4 * txSoftLimit {
		p.outb(regData, 'x')
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if err := u.Close(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("Close: %v", err)
	}
	// goleak sees the goroutine if Close did not end it.
}

func TestIRQFailure(t *testing.T) {
	u := New(Config{IRQ: func(bool) error { return errors.ErrUnsupported }})
	defer closeUART(t, u)
	var irq *IRQError
	if err := u.Write(regIER, ierTHRE); !errors.As(err, &irq) || !irq.Level || !errors.Is(err, errors.ErrUnsupported) {
		t.Fatalf("Write: %v", err)
	}
	if err := u.Err(); !errors.As(err, &irq) {
		t.Fatalf("Err: %v", err)
	}
}

// Input that comes when the UART is closed reaches no line: KVM's VM may be closed as well, and its descriptor be another's.
func TestClosedLeavesLine(t *testing.T) {
	p := newPort(t)
	p.outb(regIER, ierRDA)
	closeUART(t, p.UART)
	if n := p.Enqueue([]byte("late")); n != 4 {
		t.Errorf("took %d bytes", n)
	}
	if len(p.edges) > 0 || p.level() {
		t.Errorf("the interrupt line was set to %v", p.edges)
	}
}

func TestPump(t *testing.T) {
	p := newPort(t)
	p.outb(regIIR, fcrEnable)
	in := strings.Repeat("all of this arrives\n", 1000)
	done := make(chan error, 1)
	go func() { done <- p.Pump(t.Context(), strings.NewReader(in)) }()
	var got strings.Builder
	for got.Len() < len(in) {
		if p.in(regLSR)&lsrDR != 0 {
			got.WriteByte(p.in(regData))
		} else {
			runtime.Gosched()
		}
	}
	if err := <-done; err != nil || got.String() != in {
		t.Fatalf("Pump: %v, input equal: %t", err, got.String() == in)
	}
}

func TestPumpEnds(t *testing.T) {
	boom := errors.New("boom")
	ends := map[string]struct {
		want error
		end  func(cancel context.CancelCauseFunc, u *UART)
	}{
		"cancel": {boom, func(c context.CancelCauseFunc, _ *UART) { c(boom) }},
		"close":  {nil, func(_ context.CancelCauseFunc, u *UART) { closeUART(t, u) }},
	}
	for name, e := range ends {
		t.Run(name+" while reading", func(t *testing.T) {
			r, w, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			defer w.Close()
			if !Interruptible(r) {
				t.Fatal("a pipe is not interruptible")
			}
			testPumpEnd(t, r, e.want, e.end)
		})
		t.Run(name+" while full", func(t *testing.T) {
			testPumpEnd(t, zeros{}, e.want, e.end)
		})
	}
	if Interruptible(zeros{}) {
		t.Fatal("a plain reader is said to be interruptible")
	}
}

// TestPumpAgain ends many pumps of one pipe, and starts one more: no late interruption may end that.
func TestPumpAgain(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	p := newPort(t)
	for range 200 {
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- p.Pump(ctx, r) }()
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Fatal(err)
		}
	}
	if _, err := w.WriteString("ok"); err != nil {
		t.Fatal(err)
	}
	w.Close()
	if err := p.Pump(t.Context(), r); err != nil {
		t.Fatal(err)
	}
	p.want(regData, 'o')
	p.want(regData, 'k')
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { return len(p), nil }

func testPumpEnd(t *testing.T, r io.Reader, want error, end func(context.CancelCauseFunc, *UART)) {
	p := newPort(t)
	ctx, cancel := context.WithCancelCause(t.Context())
	defer cancel(nil)
	done := make(chan error, 1)
	go func() { done <- p.Pump(ctx, r) }()
	runtime.Gosched()
	end(cancel, p.UART)
	if err := <-done; !errors.Is(err, want) {
		t.Fatalf("Pump: %v, want %v", err, want)
	}
}

func TestPumpReaderFails(t *testing.T) {
	p := newPort(t)
	r, w := io.Pipe()
	w.CloseWithError(errors.ErrUnsupported)
	if err := p.Pump(t.Context(), r); !errors.Is(err, errors.ErrUnsupported) {
		t.Fatalf("Pump: %v", err)
	}
}

// TestConcurrent is for the race detector: a guest, a pump and a snapshot at once.
func TestConcurrent(t *testing.T) {
	p := newPort(t)
	p.outb(regIIR, fcrEnable)
	p.outb(regIER, ierMask)
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			for range 2000 {
				switch i {
				case 0:
					_ = p.Write(regData, 'x')
				case 1:
					p.Enqueue([]byte("abc"))
				case 2:
					_, _ = p.Read(regData)
					_, _ = p.Read(regIIR)
				case 3:
					if err := p.Restore(p.Save()); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	wg.Wait()
}
