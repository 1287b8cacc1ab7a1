package memory_test

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"testing"

	"github.com/cryovisor/cryovisor/memory"
)

const (
	page = memory.PageSize
	mib  = 1 << 20
	gib  = 1 << 30
)

// newCold makes memory for a machine that boots, or skips on a system that has
// none.
func newCold(t testing.TB, size uint64, opts memory.Options) *memory.Memory {
	t.Helper()
	m, err := memory.New(size, opts)
	if errors.Is(err, errors.ErrUnsupported) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	})
	return m
}

func randomBytes(rng *rand.Rand, n int) []byte {
	p := make([]byte, n)
	for i := range p {
		p[i] = byte(rng.Uint32())
	}
	return p
}

func TestLayout(t *testing.T) {
	for _, c := range []struct {
		size uint64
		want []memory.Range
	}{
		{page, []memory.Range{{0, page}}},
		{3 * gib, []memory.Range{{0, 3 * gib}}},
		{3*gib + page, []memory.Range{{0, 3 * gib}, {4 * gib, page}}},
		{16 * gib, []memory.Range{{0, 3 * gib}, {4 * gib, 13 * gib}}},
	} {
		got := memory.Layout(c.size)
		if len(got) != len(c.want) {
			t.Fatalf("Layout(%#x) = %v, want %v", c.size, got, c.want)
		}
		for i := range got {
			if got[i] != c.want[i] {
				t.Errorf("Layout(%#x)[%d] = %v, want %v", c.size, i, got[i], c.want[i])
			}
		}
	}
}

func TestSizes(t *testing.T) {
	for _, size := range []uint64{0, 1, page - 1, page + 1, memory.MaxSize + page, 1 << 63} {
		_, err := memory.New(size, memory.Options{})
		var bad *memory.SizeError
		if !errors.As(err, &bad) || bad.Size != size {
			t.Errorf("New(%d): %v, want a SizeError", size, err)
		}
	}
}

// Accesses on both sides of the hole, and every way of leaving RAM.
func TestColdAccess(t *testing.T) {
	m := newCold(t, 5*gib, memory.Options{SmallPages: true})
	rng := rand.New(rand.NewPCG(1, 2))
	for _, gpa := range []int64{0, 1, page - 1, 3*gib - 777, 4 * gib, 6*gib - 777} {
		want := randomBytes(rng, 777)
		if n, err := m.WriteAt(want, gpa); n != len(want) || err != nil {
			t.Fatalf("WriteAt(%#x) = %d, %v", gpa, n, err)
		}
		got := make([]byte, len(want))
		if n, err := m.ReadAt(got, gpa); n != len(got) || err != nil {
			t.Fatalf("ReadAt(%#x) = %d, %v", gpa, n, err)
		}
		view, err := m.View(uint64(gpa), len(want))
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want) || !bytes.Equal(view, want) {
			t.Errorf("bytes at %#x differ from what was written", gpa)
		}
	}
	for _, c := range []struct {
		gpa int64
		n   int
	}{
		{-1, 1},
		{3*gib - 1, 2},
		{3 * gib, 1},
		{4*gib - 1, 2},
		{6*gib - 1, 2},
		{6 * gib, 1},
		{1<<63 - 1, 2},
	} {
		p := make([]byte, c.n)
		_, rerr := m.ReadAt(p, c.gpa)
		_, werr := m.WriteAt(p, c.gpa)
		_, verr := m.View(uint64(c.gpa), c.n)
		derr := m.Discard(uint64(c.gpa), uint64(c.n))
		for _, err := range []error{rerr, werr, verr, derr} {
			var bad *memory.RangeError
			if !errors.As(err, &bad) || bad.GPA != c.gpa || bad.Len != c.n {
				t.Errorf("%d bytes at %#x: %v, want a RangeError", c.n, c.gpa, err)
			}
		}
	}
}

func TestClosed(t *testing.T) {
	m := newCold(t, mib, memory.Options{})
	for range 2 {
		if err := m.Close(); err != nil {
			t.Fatal(err)
		}
	}
	p := make([]byte, 1)
	_, rerr := m.ReadAt(p, 0)
	_, werr := m.WriteAt(p, 0)
	_, verr := m.View(0, 1)
	for _, err := range []error{rerr, werr, verr, m.Discard(0, mib), m.Discard(0, 1)} {
		if !errors.Is(err, memory.ErrClosed) {
			t.Errorf("after Close: %v, want ErrClosed", err)
		}
	}
}

// Words that others write at the same time are read whole. Two goroutines stand
// in for a vCPU and a device; to Go alone that is a data race, so this is not
// for the race detector.
func TestWordsAreWhole(t *testing.T) {
	if raceEnabled {
		t.Skip("a race by design")
	}
	m := newCold(t, mib, memory.Options{})
	for _, size := range []int{2, 4, 8} {
		const gpa = 3*page + 64
		values := [][]byte{make([]byte, size), bytes.Repeat([]byte{0xff}, size)}
		if _, err := m.WriteAt(values[0], gpa); err != nil {
			t.Fatal(err)
		}
		stop, done := make(chan struct{}), make(chan struct{})
		go func() {
			defer close(done)
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				default:
					m.WriteAt(values[i%2], gpa)
				}
			}
		}()
		got := make([]byte, size)
		for range 300_000 {
			if _, err := m.ReadAt(got, gpa); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, values[0]) && !bytes.Equal(got, values[1]) {
				t.Errorf("read %x of %d bytes that are all equal at any time", got, size)
				break
			}
		}
		close(stop)
		<-done
	}
}
