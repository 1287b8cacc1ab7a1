package snapshot

import (
	"context"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
)

// changing is guest memory that is different each time it is read, so that what is stored must have been read once.
type changing struct {
	*guest
	mu    sync.Mutex
	rnd   *rand.Rand
	reads []uint64 // pages, in the order in which they were read
}

func (c *changing) ReadAt(p []byte, off int64) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for at := 0; at < len(p); at += PageSize {
		gpa := uint64(off) + uint64(at)
		b := page(c.rnd)
		c.set(gpa/PageSize, b)
		c.reads = append(c.reads, gpa/PageSize)
		copy(p[at:], b)
	}
	return len(p), nil
}

// TestWrite stores memory that changes, and disks, in one call and again, with hints of what is wanted; and the Reader that the
// Writer gives is as good as one that was opened.
func TestWrite(t *testing.T) {
	l, rnd := newLab(t), testRand(t)
	mem := &changing{guest: newGuest(4 << 20), rnd: rand.New(rand.NewPCG(rnd.Uint64(), 0))}
	disks := []*testDisk{newTestDisk(0, true, 5<<20+512), newTestDisk(3, false, 3<<20)}
	opts := l.options()
	for range 6 {
		opts.ChunkSize, opts.Workers = (1+rnd.IntN(40))*PageSize, 1+rnd.IntN(3)
		w, err := l.Create(context.Background(), opts)
		if err != nil {
			t.Fatal(err)
		}
		defer w.Abort()
		if _, err := w.Reader(); err == nil {
			t.Error("a Reader of a snapshot that was not committed")
		}
		for range 3 {
			c := Contents{Memory: &Memory{Size: mem.size, ReadAt: mem.ReadAt}, Wanted: hints(rnd, mem.size)}
			c.Memory.Data, c.Memory.Zeros = split(rnd, randomRanges(rnd, mem.size))
			for _, z := range c.Memory.Zeros {
				for p := z.GPA / PageSize; p < (z.GPA+z.Len)/PageSize; p++ {
					delete(mem.pages, p)
				}
			}
			for _, d := range disks {
				c.Disks = append(c.Disks, d.change(rnd))
			}
			if err := w.Write(context.Background(), c); err != nil {
				t.Fatal(err)
			}
		}
		info, err := w.Commit(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		own, err := w.Reader()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { own.Close() })
		opened := l.open(info.ID)
		if a, b := own.Entry(), opened.Entry(); !slices.Equal(a.Packs, b.Packs) || a.ID != b.ID || a.PagesMapped != b.PagesMapped ||
			a.Created != b.Created || a.ManifestBytes != b.ManifestBytes {
			t.Errorf("the Writer's Reader says %+v, an opened one %+v", a, b)
		}
		for _, r := range []*Reader{own, opened} {
			l.check(r, mem.guest)
			for _, d := range disks {
				d.check(t, r)
			}
		}
		opts.Parent = own
	}
}

// split deals ranges out to two lists.
func split(rnd *rand.Rand, ranges []Range) (a, b []Range) {
	for _, r := range ranges {
		if rnd.IntN(3) > 0 {
			a = append(a, r)
		} else {
			b = append(b, r)
		}
	}
	return a, b
}

// hints are wishes for what may or may not be stored, and exist.
func hints(rnd *rand.Rand, size uint64) <-chan Range {
	c := make(chan Range, 100)
	for range cap(c) {
		address := []uint64{0, DiskAddress(0), DiskAddress(3), DiskAddress(7)}[rnd.IntN(4)] + rnd.Uint64N(2*size)
		c <- Range{address, rnd.Uint64N(1 << 20)}
	}
	return c
}

// TestWanted: what is wanted is stored before what comes first.
func TestWanted(t *testing.T) {
	l := newLab(t)
	mem := &changing{guest: newGuest(8 << 20), rnd: testRand(t)}
	opts := l.options()
	opts.Workers = 1
	w, err := l.Create(context.Background(), opts)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Abort()
	wanted := make(chan Range, 2)
	wanted <- Range{GPA: 5<<20 + 3*PageSize, Len: PageSize}
	wanted <- Range{GPA: 2 << 20, Len: 1 << 20}
	err = w.Write(context.Background(), Contents{
		Memory: &Memory{Size: mem.size, Data: mem.layout(), ReadAt: mem.ReadAt}, Wanted: wanted,
	})
	if err != nil {
		t.Fatal(err)
	}
	const chunk, mib = DefaultChunkSize / PageSize, 1 << 20 / PageSize
	for i, want := range map[int]uint64{0: 5 * mib, chunk: 2 * mib, chunk + mib: 0, chunk + 3*mib: 3 * mib} {
		if mem.reads[i] != want {
			t.Errorf("read number %d was of page %#x, want %#x", i, mem.reads[i], want)
		}
	}
	if len(mem.reads) != int(mem.size/PageSize) {
		t.Errorf("%d pages were read, of %d", len(mem.reads), mem.size/PageSize)
	}
}

// TestWriteRefuses: what breaks a rule is refused and costs nothing.
func TestWriteRefuses(t *testing.T) {
	l, g := newLab(t), newGuest(1<<20)
	w, err := l.Create(context.Background(), l.options())
	if err != nil {
		t.Fatal(err)
	}
	defer w.Abort()
	memory := func(change func(*Memory)) Contents {
		m := &Memory{Size: g.size, View: g.view}
		change(m)
		return Contents{Memory: m}
	}
	for name, c := range map[string]Contents{
		"size":   memory(func(m *Memory) { m.Size++ }),
		"order":  memory(func(m *Memory) { m.Data = []Range{{PageSize, PageSize}, {0, PageSize}} }),
		"zeros":  memory(func(m *Memory) { m.Zeros = []Range{{1, PageSize}} }),
		"beyond": memory(func(m *Memory) { m.Data, m.Zeros = g.layout(), []Range{{0, PageSize}} }),
		"disks":  {Disks: []Disk{{Index: 1, Size: PageSize}, {Index: 1, Size: PageSize}}},
	} {
		if err := w.Write(context.Background(), c); err == nil {
			t.Errorf("%s: no error", name)
		} else {
			mustBe(t, err, ErrInvalid)
		}
	}
	if err := w.WriteMemory(context.Background(), g.size, g.layout(), g.view); err != nil {
		t.Errorf("after that: %v", err)
	}
}
