//go:build linux && amd64

package memory_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/cryovisor/cryovisor/memory"
	"golang.org/x/sys/unix"
)

// A batcher is an oracle that can fetch several chunks at once.
type batcher struct {
	*oracle
	mu      sync.Mutex
	batches [][]int64
	before  func(ctx context.Context, chunks []int64) error // called by every FetchBatch, if set
}

func (b *batcher) FetchBatch(ctx context.Context, chunks []int64, install func(uint64, []byte) error) error {
	b.mu.Lock()
	b.batches = append(b.batches, slices.Clone(chunks))
	b.mu.Unlock()
	if b.before != nil {
		if err := b.before(ctx, chunks); err != nil {
			return err
		}
	}
	for _, chunk := range chunks {
		for _, r := range b.chunks[chunk] {
			if err := install(r.gpa, b.bytes(r.gpa, int(r.length))); err != nil {
				return err
			}
		}
	}
	return nil
}

func imageOf(t testing.TB, size uint64, src memory.Source) *memory.Image {
	t.Helper()
	img, err := memory.NewImage(size, src)
	if errors.Is(err, errors.ErrUnsupported) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { img.Close() })
	return img
}

// inTurn is the chunks of o in the order in which its runs lie.
func inTurn(o *oracle) []int64 {
	var chunks []int64
	for _, r := range o.runs {
		if r.chunk >= 0 && !slices.Contains(chunks, r.chunk) {
			chunks = append(chunks, r.chunk)
		}
	}
	return chunks
}

// touchRuns has the kernel, or the accessor in turn with it, read every run of the
// chunks.
func touchRuns(t *testing.T, m *memory.Memory, o *oracle, chunks []int64) {
	t.Helper()
	tc := mustToucher(t, m)
	for i, chunk := range chunks {
		for _, r := range o.chunks[chunk] {
			want := o.bytes(r.gpa, page)
			got := make([]byte, page)
			var err error
			if i%2 == 0 {
				got, err = tc.load(r.gpa, page)
			} else {
				_, err = m.ReadAt(got, int64(r.gpa))
			}
			if err != nil || !bytes.Equal(got, want) {
				t.Fatalf("page %#x is wrong (%v)", r.gpa, err)
			}
		}
	}
}

// Touched is what was asked for, in that order, by faults and accesses; neither what
// was prefetched nor what came too late.
func TestTouched(t *testing.T) {
	o := newOracle(newRand(t), 16*mib, memory.Range{Len: 16 * mib})
	img := newImage(t, o)
	var now atomic.Int64
	img.SetClock(func() time.Time { return time.Unix(0, now.Load()) }, nil)
	m := mapImage(t, img, memory.MapOptions{})
	chunks := inTurn(o)
	slices.Reverse(chunks)
	touched, ahead, late := chunks[:20], chunks[20:40], chunks[40:60]
	if err := img.Prefetch(context.Background(), ahead, 0); err != nil {
		t.Fatal(err)
	}
	touchRuns(t, m, o, touched[:10])
	now.Add(int64(memory.TouchTime))
	touchRuns(t, m, o, touched[5:])
	touchRuns(t, m, o, ahead)
	now.Add(1)
	touchRuns(t, m, o, late)
	if got := img.Touched(); !slices.Equal(got, touched) {
		t.Errorf("touched %v\nwant    %v", got, touched)
	}
	await(func() bool { return img.Demands() == 0 })
	if s := m.Stats(); s.Prefetched != 0 || s.DemandBytes == 0 || s.PrefetchBytes == 0 ||
		s.DemandBytes+s.PrefetchBytes != s.PagesFetched*page {
		t.Errorf("stats %+v", s)
	}
}

// Prefetch brings what it was told to, exactly and once, alone or in batches, and
// whoever asks later gets it without a fetch.
func TestPrefetchIsExact(t *testing.T) {
	rng := newRand(t)
	for _, kind := range []string{"one by one", "batches"} {
		t.Run(kind, func(t *testing.T) {
			b := &batcher{oracle: newOracle(rng, 16*mib, memory.Range{Len: 16 * mib})}
			src := memory.Source(b.oracle)
			if kind == "batches" {
				src = b
			}
			img := imageOf(t, b.size, src)
			m := mapImage(t, img, memory.MapOptions{})
			chunks := inTurn(b.oracle)
			there, wanted := chunks[:3], chunks[:len(chunks)-5]
			touchRuns(t, m, b.oracle, there)
			if err := img.Prefetch(context.Background(), append(wanted, wanted[:10]...), 2); err != nil {
				t.Fatal(err)
			}
			fetched := b.fetches.Load()
			for _, batch := range b.batches {
				fetched += int64(len(batch))
			}
			if fetched != int64(len(wanted)) {
				t.Errorf("%d chunks were fetched, want %d", fetched, len(wanted))
			}
			if kind == "batches" && len(b.batches) > len(wanted)/4 {
				t.Errorf("%d batches of %d chunks", len(b.batches), len(wanted))
			}
			b.setTrouble(func(context.Context, int64) error { return errors.New("asked for more") })
			touchRuns(t, m, b.oracle, wanted)
			if got := img.Touched(); !slices.Equal(got, there) {
				t.Errorf("touched %v", got)
			}
		})
	}
}

// A halting source stops after it has installed the first run of a chunk.
type halting struct {
	*oracle
	goOn chan struct{}
}

func (h *halting) Fetch(_ context.Context, chunk int64, install func(uint64, []byte) error) error {
	for i, r := range h.chunks[chunk] {
		if i == 1 {
			<-h.goOn
		}
		if err := install(r.gpa, h.bytes(r.gpa, int(r.length))); err != nil {
			return err
		}
	}
	return nil
}

// A thread that waits for a page goes on when that is there, before the rest of the
// chunk is, all of which comes even so.
func TestFaultGoesOnEarly(t *testing.T) {
	h := &halting{newOracle(newRand(t), 4*mib, memory.Range{Len: 4 * mib}), make(chan struct{})}
	i := slices.IndexFunc(inTurn(h.oracle), func(chunk int64) bool { return len(h.chunks[chunk]) > 1 })
	chunk := inTurn(h.oracle)[i]
	m := mapImage(t, imageOf(t, h.size, h), memory.MapOptions{})
	first := h.chunks[chunk][0]
	last := first.gpa + first.length - page
	got, err := mustToucher(t, m).load(last, page) // hangs if it waits for all
	if err != nil || !bytes.Equal(got, h.bytes(last, page)) {
		t.Fatalf("page %#x is wrong (%v)", last, err)
	}
	if n := m.Stats().Faults; n != 0 {
		t.Errorf("%d faults are over", n)
	}
	close(h.goOn)
	touchRuns(t, m, h.oracle, []int64{chunk})
	if n := m.Stats().ChunksFetched; n != 1 {
		t.Errorf("%d chunks were fetched, want 1", n)
	}
}

// A prefetch does not begin with anything while somebody waits for a page.
func TestDemandGoesFirst(t *testing.T) {
	o := newOracle(newRand(t), 4*mib, memory.Range{Len: 4 * mib})
	img := newImage(t, o)
	m := mapImage(t, img, memory.MapOptions{})
	chunks := inTurn(o)
	begun := make(chan int64, len(chunks))
	goOn := make(map[int64]chan struct{})
	for _, chunk := range chunks {
		goOn[chunk] = make(chan struct{})
	}
	o.setTrouble(func(ctx context.Context, chunk int64) error {
		begun <- chunk
		select {
		case <-goOn[chunk]:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	})
	// A prefetch is in the middle of its first chunk when the machine asks for
	// another, and then for a second one.
	prefetched := make(chan error, 1)
	go func() { prefetched <- img.Prefetch(context.Background(), chunks[:4], 1) }()
	if got := <-begun; got != chunks[0] {
		t.Fatalf("prefetch began with %d, want %d", got, chunks[0])
	}
	faults := make(chan error, 2)
	for i, chunk := range chunks[4:6] {
		tc := mustToucher(t, m)
		go func() {
			_, err := tc.load(o.chunks[chunk][0].gpa, page)
			faults <- err
		}()
		if got := <-begun; got != chunk {
			t.Fatalf("fetch %d for a fault is of %d, want %d", i, got, chunk)
		}
	}
	close(goOn[chunks[0]]) // the prefetch has to wait now
	await(func() bool { return m.Stats().PrefetchBytes > 0 })
	for range 1000 {
		runtime.Gosched() // or it would not have had the time to do wrong
	}
	close(goOn[chunks[4]])
	if err := <-faults; err != nil {
		t.Fatal(err)
	}
	select {
	case got := <-begun:
		t.Fatalf("fetch of %d began while the machine waited for %d", got, chunks[5])
	default:
	}
	close(goOn[chunks[5]])
	for _, chunk := range chunks[1:4] {
		if got := <-begun; got != chunk {
			t.Fatalf("prefetch went on with %d, want %d", got, chunk)
		}
		close(goOn[chunk])
	}
	if err := errors.Join(<-faults, <-prefetched); err != nil {
		t.Fatal(err)
	}
}

// Machines that never rest do not hold a prefetch up for ever: a moment in which nobody
// waits is enough for a chunk.
func TestPrefetchUnderLoad(t *testing.T) {
	o := newOracle(newRand(t), 4*mib, memory.Range{Len: 4 * mib})
	img := newImage(t, o)
	chunks := inTurn(o)[:6]
	begun, goOn := make(chan int64, len(chunks)), make(chan struct{})
	o.setTrouble(func(_ context.Context, chunk int64) error {
		begun <- chunk
		if chunk == chunks[0] {
			<-goOn
		}
		return nil
	})
	demand, prefetched := make(chan error, 1), make(chan error, 1)
	go func() { demand <- img.Fetch(context.Background(), chunks[0]) }()
	<-begun
	go func() { prefetched <- img.Prefetch(context.Background(), chunks[1:], 1) }()
	for _, want := range chunks[1:3] {
		await(func() bool { img.Quiet(); return len(begun) > 0 })
		if got := <-begun; got != want {
			t.Fatalf("prefetch of %d, want %d", got, want)
		}
	}
	close(goOn)
	if err := errors.Join(<-demand, <-prefetched); err != nil {
		t.Fatal(err)
	}
}

// A fault joins the fetch of its chunk if a prefetch has begun with it, and is not
// harmed when that fails; and it passes a batch, which may take longer.
func TestDemandMeetsPrefetch(t *testing.T) {
	broken := errors.New("broken")
	for name, c := range map[string]struct {
		chunks          int
		err             error
		fetches, joined int64
	}{
		"one chunk": {1, nil, 1, 1},
		"failing":   {1, broken, 2, 0},
		"batch":     {4, nil, 1, 0},
	} {
		t.Run(name, func(t *testing.T) {
			b := &batcher{oracle: newOracle(newRand(t), 4*mib, memory.Range{Len: 4 * mib})}
			img := imageOf(t, b.size, b)
			m := mapImage(t, img, memory.MapOptions{})
			tc := mustToucher(t, m)
			begun, goOn := make(chan struct{}), make(chan struct{})
			hold := func() error {
				b.setTrouble(nil)
				begun <- struct{}{}
				<-goOn
				return c.err
			}
			b.before = func(context.Context, []int64) error { return hold() }
			b.setTrouble(func(context.Context, int64) error { return hold() })
			chunks := inTurn(b.oracle)[:c.chunks]
			prefetched, fault := make(chan error, 1), make(chan error, 1)
			go func() { prefetched <- img.Prefetch(context.Background(), chunks, 1) }()
			<-begun
			go func() {
				gpa := b.chunks[chunks[0]][0].gpa
				got, err := tc.load(gpa, page)
				if err == nil && !bytes.Equal(got, b.bytes(gpa, page)) {
					err = errors.New("the page is wrong")
				}
				fault <- err
			}()
			if c.chunks == 1 {
				await(func() bool { return len(img.Touched()) == 1 })
				close(goOn)
			}
			if err := <-fault; err != nil {
				t.Fatal(err)
			}
			await(func() bool { return m.Stats().Faults == 1 && img.Demands() == 0 })
			if c.chunks > 1 {
				close(goOn)
			}
			if err := <-prefetched; !errors.Is(err, c.err) {
				t.Fatal(err)
			}
			if n := b.fetches.Load(); n != c.fetches {
				t.Errorf("%d fetches, want %d", n, c.fetches)
			}
			if c.chunks == 1 {
				await(func() bool { return m.Stats().Prefetched == uint64(c.joined) })
			}
			if got := img.Touched(); !slices.Equal(got, chunks[:1]) {
				t.Errorf("touched %v, want %v", got, chunks[:1])
			}
		})
	}
}

// A batch that fails gives what can be had, and the error of what can't; the machine
// asks for that itself.
func TestFailingPrefetch(t *testing.T) {
	b := &batcher{oracle: newOracle(newRand(t), 16*mib, memory.Range{Len: 16 * mib})}
	img := imageOf(t, b.size, b)
	m := mapImage(t, img, memory.MapOptions{})
	chunks := inTurn(b.oracle)[:10]
	bad, broken := chunks[4], errors.New("damaged")
	b.before = func(context.Context, []int64) error { return broken }
	b.setTrouble(func(_ context.Context, chunk int64) error {
		if chunk == bad {
			return broken
		}
		return nil
	})
	err := img.Prefetch(context.Background(), chunks, 1)
	var fetch *memory.FetchError
	if !errors.Is(err, broken) || !errors.As(err, &fetch) || fetch.Chunk != bad {
		t.Fatalf("prefetch: %v, want the error of chunk %d", err, bad)
	}
	if m.Err() != nil || m.Stats().ChunksFetched != 9 {
		t.Errorf("%d chunks are there, and Err is %v", m.Stats().ChunksFetched, m.Err())
	}
	b.setTrouble(nil)
	touchRuns(t, m, b.oracle, chunks)

	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := img.Prefetch(ctx, inTurn(b.oracle), 1); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled prefetch: %v", err)
	}
	if err := img.Prefetch(context.Background(), []int64{b.Chunks()}, 1); !errors.Is(err, memory.ErrSource) {
		t.Errorf("prefetch of a chunk that there is not: %v", err)
	}
}

// A prefetch that waits for its turn ends with its context, and with the image.
func TestPrefetchIsGivenUp(t *testing.T) {
	o := newOracle(newRand(t), 4*mib, memory.Range{Len: 4 * mib})
	img := newImage(t, o)
	begun, goOn := make(chan struct{}), make(chan struct{})
	o.setTrouble(func(context.Context, int64) error {
		begun <- struct{}{}
		<-goOn
		return nil
	})
	chunks := inTurn(o)
	demand, prefetched := make(chan error, 1), make(chan error, 1)
	go func() { demand <- img.Fetch(context.Background(), chunks[0]) }()
	<-begun
	ctx, cancel := context.WithCancel(context.Background())
	go func() { prefetched <- img.Prefetch(ctx, chunks, 1) }()
	cancel()
	if err := <-prefetched; !errors.Is(err, context.Canceled) {
		t.Errorf("prefetch that was given up: %v", err)
	}
	close(goOn)
	if err := <-demand; err != nil {
		t.Error(err)
	}
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
	if err := img.Prefetch(context.Background(), chunks, 1); !errors.Is(err, memory.ErrClosed) {
		t.Errorf("prefetch of an image that is gone: %v", err)
	}
}

// A verdict is an error that says itself whether it may pass.
type verdict struct {
	error
	temporary bool
}

func (v verdict) Temporary() bool { return v.temporary }
func (v verdict) Unwrap() error   { return v.error }

// What may pass is tried again, with pauses that grow to a second in all; what does
// not, at once an error.
func TestRetry(t *testing.T) {
	for name, c := range map[string]struct {
		err   error
		tries int
	}{
		"the system's":           {fmt.Errorf("read: %w", unix.EIO), 5},
		"says that it passes":    {fmt.Errorf("read: %w", verdict{errors.New("away"), true}), 5},
		"says that it stays":     {fmt.Errorf("read: %w", verdict{syscall.EIO, false}), 1},
		"says nothing":           {errors.New("damaged"), 1},
		"somebody gave up":       {verdict{context.Canceled, true}, 1},
		"breaks the contract":    {memory.ErrSource, 1},
		"the system's, wrapped":  {&memory.FetchError{Err: unix.ESTALE}, 5},
		"passes before the last": {nil, 5},
	} {
		t.Run(name, func(t *testing.T) {
			o := newOracle(newRand(t), mib, memory.Range{Len: mib})
			img := newImage(t, o)
			var total, last time.Duration
			img.SetClock(time.Now, func(_ context.Context, d time.Duration) error {
				if d <= last {
					t.Errorf("a pause of %v after one of %v", d, last)
				}
				total, last = total+d, d
				return nil
			})
			tries := 0
			o.setTrouble(func(context.Context, int64) error {
				if tries++; c.err == nil && tries < 5 {
					return unix.EIO
				}
				return c.err
			})
			err := img.Fetch(context.Background(), firstRun(t, o, false).chunk)
			if !errors.Is(err, c.err) || tries != c.tries {
				t.Errorf("%v after %d tries, want %v after %d", err, tries, c.err, c.tries)
			}
			if total > time.Second {
				t.Errorf("pauses of %v", total)
			}
		})
	}
}

// A fault whose fetch fails for a while is served in the end, and one whose fetch
// fails for good ends the memory: with the error, and nobody hangs.
func TestRetriedFault(t *testing.T) {
	o := newOracle(newRand(t), 4*mib, memory.Range{Len: 4 * mib})
	img := newImage(t, o)
	m := mapImage(t, img, memory.MapOptions{})
	var failures atomic.Int64
	img.SetClock(time.Now, func(context.Context, time.Duration) error {
		if failures.Add(-1) == 0 {
			o.setTrouble(nil)
		}
		return nil
	})
	tc := mustToucher(t, m)
	for i, chunk := range inTurn(o)[:8] {
		failures.Store(int64(1 + i%4))
		o.setTrouble(func(context.Context, int64) error { return unix.EIO })
		want := o.chunks[chunk][0].gpa
		if got, err := tc.load(want, page); err != nil || !bytes.Equal(got, o.bytes(want, page)) {
			t.Fatalf("page %#x after %d failures: %v", want, 1+i%4, err)
		}
	}
	failures.Store(-1)
	o.setTrouble(func(context.Context, int64) error { return unix.EIO })
	if _, err := tc.load(o.chunks[inTurn(o)[8]][0].gpa, page); !errors.Is(err, unix.EFAULT) {
		t.Errorf("system call: %v, want EFAULT", err)
	}
	if !errors.Is(m.Err(), unix.EIO) {
		t.Errorf("Err: %v", m.Err())
	}
}

// Fail ends the pause before the next attempt.
func TestFailDuringPause(t *testing.T) {
	o := newOracle(newRand(t), mib, memory.Range{Len: mib})
	img := newImage(t, o)
	m := mapImage(t, img, memory.MapOptions{})
	enough := errors.New("enough")
	img.SetClock(time.Now, func(ctx context.Context, _ time.Duration) error {
		m.Fail(enough)
		<-ctx.Done()
		return ctx.Err()
	})
	o.setTrouble(func(context.Context, int64) error { return unix.EIO })
	if _, err := mustToucher(t, m).load(firstRun(t, o, false).gpa, page); !errors.Is(err, unix.EFAULT) {
		t.Errorf("system call: %v, want EFAULT", err)
	}
	if !errors.Is(m.Err(), enough) {
		t.Errorf("Err: %v", m.Err())
	}
}

// A source that panics ends the machines that need what it can't give, and not the
// process.
func TestPanickingSource(t *testing.T) {
	panics := func() { panic("index out of range") }
	for name, src := range map[string]*liar{
		"fetch":  {install: func(func(uint64, []byte) error) error { panics(); return nil }},
		"lookup": {lookup: func(uint64) (uint64, uint64, int64) { panics(); return 0, 0, 0 }},
	} {
		t.Run(name, func(t *testing.T) {
			m := mapImage(t, imageOf(t, mib, src), memory.MapOptions{})
			if _, err := m.ReadAt(make([]byte, 1), 0); !errors.Is(err, memory.ErrSource) {
				t.Errorf("accessor: %v, want ErrSource", err)
			}
			if _, err := mustToucher(t, m).load(0, page); !errors.Is(err, unix.EFAULT) {
				t.Errorf("system call: %v, want EFAULT", err)
			}
			if !errors.Is(m.Err(), memory.ErrSource) {
				t.Errorf("Err: %v", m.Err())
			}
		})
	}
}

// A pager that can't read faults any more ends the memory: who waits and who comes
// later gets an error, and what the machine has is still there.
func TestLostPager(t *testing.T) {
	rng := newRand(t)
	o := newOracle(rng, 4*mib, memory.Range{Len: 4 * mib})
	m := mapImage(t, newImage(t, o), memory.MapOptions{Handlers: 1})
	tc := mustToucher(t, m)
	chunks := inTurn(o)
	mine := o.chunks[chunks[0]][0].gpa
	if err := tc.store([]byte("mine"), mine); err != nil {
		t.Fatal(err)
	}
	// The only handler is away, as it were: nothing but Lose lets the thread go.
	begun, goOn := make(chan struct{}, 1), make(chan struct{})
	defer close(goOn)
	o.setTrouble(func(context.Context, int64) error {
		begun <- struct{}{}
		<-goOn
		return unix.ENODEV
	})
	waiting := make(chan error, 1)
	other := mustToucher(t, m)
	go func() {
		_, err := other.load(o.chunks[chunks[1]][0].gpa, page)
		waiting <- err
	}()
	<-begun
	lost := errors.New("lost")
	m.Lose(lost)
	if err := <-waiting; !errors.Is(err, unix.EFAULT) {
		t.Errorf("who waited: %v, want EFAULT", err)
	}
	if _, err := tc.load(o.chunks[chunks[2]][0].gpa, page); !errors.Is(err, unix.EFAULT) {
		t.Errorf("who came later: %v, want EFAULT", err)
	}
	o.setTrouble(nil)
	if _, err := m.ReadAt(make([]byte, 1), int64(o.chunks[chunks[2]][0].gpa)); !errors.Is(err, lost) || !errors.Is(m.Err(), lost) {
		t.Errorf("accessor: %v, Err: %v", err, m.Err())
	}
	if view, err := m.View(mine, page); err != nil || string(view[:4]) != "mine" {
		t.Errorf("what was written: %v", err)
	}
}

func TestLatency(t *testing.T) {
	var l memory.Latency
	if q := l.Quantile(0.5); q != 0 {
		t.Errorf("of none: %v", q)
	}
	l[10], l[20] = 99, 1
	for q, want := range map[float64]time.Duration{0: 1 << 10, 0.5: 1 << 10, 0.99: 1 << 10, 0.991: 1 << 20, 1: 1 << 20} {
		if got := l.Quantile(q); got != want {
			t.Errorf("Quantile(%v) = %v, want %v", q, got, want)
		}
	}
}
