package snapshot

import (
	"bytes"
	"context"
	"errors"
	"io"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"
)

// testDisk is a model of a disk: what is on it, and which of its blocks a snapshot must hold.
type testDisk struct {
	index   int
	layered bool
	content []byte
	held    map[uint64]bool
}

func newTestDisk(index int, layered bool, size int) *testDisk {
	return &testDisk{index: index, layered: layered, content: make([]byte, size), held: map[uint64]bool{}}
}

func (d *testDisk) clone() *testDisk {
	c := *d
	c.content, c.held = slices.Clone(d.content), maps.Clone(d.held)
	return &c
}

// block is a block of the disk; the last one ends with the disk.
func (d *testDisk) block(b uint64) []byte {
	return d.content[b*PageSize : min((b+1)*PageSize, uint64(len(d.content)))]
}

// change writes to some blocks, zeros some that it tells of and some that it does not, and returns what to store.
func (d *testDisk) change(rnd *rand.Rand) Disk {
	out := Disk{Index: d.index, Size: uint64(len(d.content)), Layered: d.layered, ReadAt: bytes.NewReader(d.content).ReadAt}
	blocks := uint64(len(d.content)+PageSize-1) / PageSize
	for _, r := range randomRanges(rnd, blocks*PageSize) {
		zeros := rnd.IntN(3) == 0
		for b := r.GPA / PageSize; b < (r.GPA+r.Len)/PageSize; b++ {
			clear(d.block(b))
			zero := zeros || rnd.IntN(4) == 0
			if !zero {
				copy(d.block(b), page(rnd))
			}
			d.held[b] = d.layered || !bytes.Equal(d.block(b), make([]byte, len(d.block(b))))
		}
		if zeros {
			out.Zeros = append(out.Zeros, r)
		} else {
			out.Data = append(out.Data, r)
		}
	}
	return out
}

// check compares what a snapshot holds of the disk, found by Lookup, with the model.
func (d *testDisk) check(t *testing.T, r *Reader) {
	t.Helper()
	disk := r.Disk(d.index)
	for b := range uint64(len(d.content)+PageSize-1) / PageSize {
		start, length, chunk, within := disk.Lookup(int64(b*PageSize) + 5)
		if int64(b*PageSize) < start || int64(b*PageSize) >= start+length {
			t.Fatalf("disk %d, block %d: Lookup says %#x+%#x", d.index, b, start, length)
		}
		if (chunk >= 0) != d.held[b] {
			t.Fatalf("disk %d, block %d: chunk %d, held is %v", d.index, b, chunk, d.held[b])
		}
		if chunk < 0 {
			continue
		}
		plain, err := disk.ReadChunk(chunk)
		if err != nil {
			t.Fatal(err)
		}
		at := within + int(int64(b*PageSize)-start)
		if n := len(d.block(b)); !bytes.Equal(plain[at:at+n], d.block(b)) || !allIs(plain[at+n:at+PageSize], 0) {
			t.Fatalf("disk %d, block %d differs", d.index, b)
		}
	}
}

// TestDisks makes generations of a guest with disks, of which each is checked when all are there, and flattens the last.
func TestDisks(t *testing.T) {
	l, g, rnd := newLab(t), newGuest(1<<20), testRand(t)
	disks := []*testDisk{newTestDisk(0, true, 5<<20+512), newTestDisk(1, false, 3<<20), newTestDisk(MaxDisks-1, true, 512)}
	type generation struct {
		r     *Reader
		g     *guest
		disks []*testDisk
	}
	var all []generation
	opts := l.options()
	for n := range 8 {
		opts.ChunkSize, opts.Workers = (1+rnd.IntN(40))*PageSize, 1+rnd.IntN(3)
		opts.Codec = []Codec{CodecLZ4, CodecStored}[n%2]
		dirty := randomRanges(rnd, g.size)
		for _, d := range dirty {
			for p := d.GPA / PageSize; p < (d.GPA+d.Len)/PageSize; p++ {
				g.set(p, page(rnd))
			}
		}
		r := l.open(l.writeDisks(g, dirty, disks, rnd, opts))
		gen := generation{r, g.clone(), nil}
		for _, d := range disks {
			gen.disks = append(gen.disks, d.clone())
		}
		all, opts.Parent = append(all, gen), r
	}
	last := all[len(all)-1]
	opts.Parent = nil
	info, err := newLab(t).Flatten(context.Background(), last.r, opts) // to another store
	if err != nil {
		t.Fatal(err)
	}
	if info.RAMBytes != g.size {
		t.Errorf("the copy has %d bytes of memory", info.RAMBytes)
	}
	if info, err = l.Flatten(context.Background(), last.r, opts); err != nil {
		t.Fatal(err)
	}
	flat := l.open(info.ID)
	if h := flat.Header(); !h.Parent.IsZero() || h.BlocksMapped != last.r.Header().BlocksMapped || len(flat.Sections()) != len(testSections) {
		t.Errorf("the copy is %+v", h)
	}
	for _, gen := range append(all, generation{flat, last.g, last.disks}) {
		l.check(gen.r, gen.g)
		held := 0
		for _, d := range gen.disks {
			d.check(t, gen.r)
			for _, is := range d.held {
				if is {
					held++
				}
			}
		}
		if n := gen.r.Header().BlocksMapped; n != uint64(held) {
			t.Errorf("%d blocks mapped, %d are held", n, held)
		}
		if rep, err := gen.r.Verify(context.Background(), nil); err != nil || rep.Err() != nil {
			t.Error(err, rep.Err())
		}
	}
}

func (l *lab) writeDisks(g *guest, dirty []Range, disks []*testDisk, rnd *rand.Rand, opts Options) ID {
	l.t.Helper()
	ctx := context.Background()
	w, err := l.Create(ctx, opts)
	if err != nil {
		l.t.Fatal(err)
	}
	defer w.Abort()
	for _, s := range testSections {
		if err := w.AddSection(s); err != nil {
			l.t.Fatal(err)
		}
	}
	for _, d := range disks {
		if err := w.WriteDisk(ctx, d.change(rnd)); err != nil {
			l.t.Fatal(err)
		}
	}
	if err := w.WriteMemory(ctx, g.size, dirty, g.view); err != nil {
		l.t.Fatal(err)
	}
	info, err := w.Commit(ctx)
	if err != nil {
		l.t.Fatal(err)
	}
	return info.ID
}

// TestZerosAreCheap: what is known to be zero takes hardly any space, and is there.
func TestZerosAreCheap(t *testing.T) {
	l := newLab(t)
	w, err := l.Create(context.Background(), l.options())
	if err != nil {
		t.Fatal(err)
	}
	defer w.Abort()
	const size = 1 << 40
	g := newGuest(1 << 20)
	if err := w.WriteMemory(context.Background(), g.size, g.layout(), g.view); err != nil {
		t.Fatal(err)
	}
	disk := Disk{Size: size, Layered: true, Zeros: []Range{{0, size / 16}, {size / 2, 4096}}}
	disk.ReadAt = func([]byte, int64) (int, error) { return 0, errors.New("must not be read") }
	if err := w.WriteDisk(context.Background(), disk); err != nil {
		t.Fatal(err)
	}
	info, err := w.Commit(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	if info.DiskBlocks != zeroPages || info.StoredBytes > 2<<20 {
		t.Errorf("64 GiB of zeros took %d blocks, and %d bytes", info.DiskBlocks, info.StoredBytes)
	}
	held := l.open(info.ID).Disk(0).Held()
	if !slices.Equal(held, disk.Zeros) {
		t.Errorf("held are %v", held)
	}
}

func TestWriteDiskRefuses(t *testing.T) {
	ok := Disk{Size: 10000, Data: []Range{{0, 3 * PageSize}}, ReadAt: bytes.NewReader(make([]byte, 10000)).ReadAt}
	for name, change := range map[string]func(d *Disk){
		"index":    func(d *Disk) { d.Index = MaxDisks },
		"negative": func(d *Disk) { d.Index = -1 },
		"empty":    func(d *Disk) { d.Size = 0 },
		"large":    func(d *Disk) { d.Size = DiskStride + 1 },
		"beyond":   func(d *Disk) { d.Data = []Range{{0, 4 * PageSize}} },
		"zeros":    func(d *Disk) { d.Zeros = []Range{{1, PageSize}} },
		"order":    func(d *Disk) { d.Data = []Range{{PageSize, PageSize}, {0, PageSize}} },
	} {
		t.Run(name, func(t *testing.T) {
			w, err := newLab(t).Create(context.Background(), newLab(t).options())
			if err != nil {
				t.Fatal(err)
			}
			defer w.Abort()
			d := ok
			change(&d)
			mustBe(t, w.WriteDisk(context.Background(), d), ErrInvalid)
			if err := w.WriteDisk(context.Background(), ok); err != nil {
				t.Errorf("after that: %v", err)
			}
		})
	}
	t.Run("short", func(t *testing.T) {
		w, err := newLab(t).Create(context.Background(), newLab(t).options())
		if err != nil {
			t.Fatal(err)
		}
		defer w.Abort()
		d := ok
		d.Size = 12000
		mustBe(t, w.WriteDisk(context.Background(), d), io.EOF)
		mustBe(t, w.WriteDisk(context.Background(), ok), io.EOF)
	})
}
