package blockdev_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"runtime"
	"sync"
	"syscall"
	"testing"

	"github.com/cryovisor/cryovisor/blockdev"
	"github.com/cryovisor/cryovisor/blockdev/blockdevtest"
)

// unit is what a Still copies together.
const unit = 256 << 10

// someBlocks are random runs of a disk's blocks.
func someBlocks(rng *rand.Rand, size, blockSize int64) (out []blockdev.Extent) {
	for off := int64(0); off < size; {
		n := 1 + rng.Int64N(300<<10/blockSize)
		n = min(n, (size-off+blockSize-1)/blockSize) * blockSize
		out = append(out, blockdev.Extent{Off: off, Len: n})
		off += n + rng.Int64N(4)*blockSize
	}
	return out
}

// pieces cuts extents, in random order, into what can be read of a Still.
func pieces(rng *rand.Rand, extents []blockdev.Extent, size int64) (out []blockdev.Extent) {
	for _, e := range extents {
		for end := min(e.Off+e.Len, size); e.Off < end; {
			n := min((1+rng.Int64N(90))*4096, end-e.Off)
			out = append(out, blockdev.Extent{Off: e.Off, Len: n})
			e.Off += n
		}
	}
	rng.Shuffle(len(out), func(i, j int) { out[i], out[j] = out[j], out[i] })
	return out
}

// TestStill: whatever is written meanwhile, what is read is what was there; with so few copies that writers have to wait.
func TestStill(t *testing.T) {
	eachOverlay(t, func(t *testing.T, o *blockdev.Overlay, blockSize int64) {
		rng := rand.New(rand.NewPCG(3, uint64(o.Size())))
		for round := range 10 {
			for range 10 {
				off, n := somewhere(rng, o.Size())
				if err := alter(rng, o, off, n); err != nil {
					t.Fatal(err)
				}
			}
			want := contentOf(t, o)
			blocks := someBlocks(rng, o.Size(), blockSize)
			if round%2 == 0 {
				blocks, _ = o.Changes()
			}
			s, err := o.FreezeWith(blocks, 1+round%3)
			if err != nil {
				t.Fatal(err)
			}
			stop := scribbling(t, o, rng)
			parts := pieces(rng, blocks, o.Size())
			var readers sync.WaitGroup
			for i := range 2 {
				readers.Go(func() {
					for ; i < len(parts); i += 2 {
						if err := compare(s, parts[i], want); err != nil {
							t.Errorf("round %d: %v", round, err)
						}
					}
				})
			}
			readers.Wait()
			stop()
			for _, e := range parts {
				if _, err := s.ReadAt(make([]byte, e.Len), e.Off); !errors.Is(err, blockdev.ErrNotHeld) {
					t.Fatalf("round %d: %+v once more: %v", round, e, err)
				}
			}
			s.Close()
		}
	})
}

// scribbling has a disk changed until stop is called.
func scribbling(t *testing.T, o *blockdev.Overlay, rng *rand.Rand) (stop func()) {
	var writers sync.WaitGroup
	ended := make(chan struct{})
	for range 3 {
		rng := rand.New(rand.NewPCG(rng.Uint64(), 1))
		writers.Go(func() {
			for {
				off, n := somewhere(rng, o.Size())
				err := alter(rng, o, off, n)
				if rng.IntN(30) == 0 {
					err = errors.Join(err, o.Flush())
				}
				if err != nil {
					t.Error(err)
					return
				}
				select {
				case <-ended:
					return
				default:
				}
			}
		})
	}
	return func() {
		close(ended)
		writers.Wait()
	}
}

// compare reads a part of a Still.
func compare(s io.ReaderAt, e blockdev.Extent, want []byte) error {
	got := make([]byte, e.Len)
	if n, err := s.ReadAt(got, e.Off); err != nil || n != len(got) {
		return fmt.Errorf("read %+v: %d, %w", e, n, err)
	}
	if !bytes.Equal(got, want[e.Off:][:e.Len]) {
		return fmt.Errorf("%+v is not what was there", e)
	}
	return nil
}

// TestStillConformance: an overlay of which a Still is read, and whose changes are noted, is a disk as any other; and both say
// what is so.
func TestStillConformance(t *testing.T) {
	const size, below = 2<<20 + 512, 1<<20 + 1536
	for _, block := range []int{4096, 64 << 10} {
		t.Run(fmt.Sprint(block), func(t *testing.T) {
			blockdevtest.Run(t, func(t *testing.T) blockdevtest.Disk {
				lower := rawDisk(t, below, blockdev.Options{ReadOnly: true})
				d := overlayOn(t, lower.Device, lower.Content, blockdev.OverlayOptions{Size: size, BlockSize: block})
				w := watch(t, d.Device.(*blockdev.Overlay))
				reopen := d.Reopen
				d.Reopen = func(t *testing.T) blockdev.Device {
					w.finish(t)
					o := reopen(t)
					w = watch(t, o.(*blockdev.Overlay))
					return o
				}
				return d
			})
		})
	}
}

// watcher reads a Still of all of a disk: what is wanted at once, and the rest in the end.
type watcher struct {
	o     *blockdev.Overlay
	still *blockdev.WantingStill
	want  []byte // what was on the disk
	read  map[int64]bool

	once    sync.Once
	stop    chan struct{}
	reading sync.WaitGroup
}

func watch(t *testing.T, o *blockdev.Overlay) *watcher {
	t.Helper()
	w := &watcher{o: o, want: contentOf(t, o), read: map[int64]bool{}, stop: make(chan struct{})}
	o.TrackWrites(true)
	var err error
	if w.still, err = o.FreezeWith([]blockdev.Extent{{Off: 0, Len: o.Size()}}, 2); err != nil {
		t.Fatal(err)
	}
	w.reading.Go(func() {
		for {
			select {
			case e := <-w.still.Wanted:
				w.compare(t, e)
			case <-w.stop:
				return
			}
		}
	})
	t.Cleanup(func() { w.finish(t) })
	return w
}

func (w *watcher) compare(t *testing.T, e blockdev.Extent) {
	w.read[e.Off] = true
	if err := compare(w.still, e, w.want); err != nil {
		t.Error(err)
	}
}

// finish compares what was not wanted; and what has changed with what is said to have.
func (w *watcher) finish(t *testing.T) {
	w.once.Do(func() {
		close(w.stop)
		w.reading.Wait()
		for off := int64(0); off < w.o.Size(); off += unit {
			if !w.read[off] {
				w.compare(t, blockdev.Extent{Off: off, Len: min(unit, w.o.Size()-off)})
			}
		}
		w.still.Close()
		now := contentOf(t, w.o)
		for _, e := range w.o.TakeWrites() {
			copy(w.want[e.Off:], now[e.Off:min(e.Off+e.Len, w.o.Size())])
		}
		if !bytes.Equal(w.want, now) {
			t.Error("what differs is more than what is said to have changed")
		}
	})
}

// frozen is a disk in a file, and a Still of all of it with one copy at most.
func frozen(t *testing.T, size int64) (*hooked, *blockdev.Overlay, *blockdev.WantingStill) {
	t.Helper()
	m := &hooked{Medium: blockdevtest.NewMedium()}
	o, err := blockdev.NewOverlayIn(m, nil, blockdev.OverlayOptions{Size: size})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := o.WriteAt(bytes.Repeat([]byte{1}, int(size)), 0); err != nil {
		t.Fatal(err)
	}
	s, err := o.FreezeWith([]blockdev.Extent{{Off: 0, Len: size}}, 1)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return m, o, s
}

// writing changes a byte of a disk, and closes what it returns when that has been made.
func writing(t *testing.T, o *blockdev.Overlay, off int64) <-chan struct{} {
	made := make(chan struct{})
	go func() {
		defer close(made)
		if _, err := o.WriteAt([]byte{2}, off); err != nil {
			t.Error(err)
		}
	}()
	return made
}

// TestStillWaits: a write that must wait is wanted to be read, holds up no other one, and goes on when that has been read.
func TestStillWaits(t *testing.T) {
	const stripes = 4 << 20 // what is so far apart has the same lock
	_, o, s := frozen(t, 2*stripes)
	want := bytes.Repeat([]byte{1}, 2*stripes)
	<-writing(t, o, 5)
	wanted := <-s.Wanted
	if (wanted != blockdev.Extent{Off: 0, Len: unit}) {
		t.Fatalf("wanted is %+v", wanted)
	}
	waits := writing(t, o, stripes)
	for range 1000 {
		runtime.Gosched()
		<-writing(t, o, 0) // what is copied can be changed
	}
	select {
	case <-waits:
		t.Fatal("there were two copies")
	default:
	}
	if err := compare(s, wanted, want); err != nil {
		t.Fatal(err)
	}
	<-waits
	if err := compare(s, <-s.Wanted, want); err != nil {
		t.Fatal(err)
	}
}

// TestStillClose: who waits goes on, what is read is refused, and there can be another Still.
func TestStillClose(t *testing.T) {
	_, o, s := frozen(t, 2*unit)
	if _, err := o.Freeze(nil, nil); !errors.Is(err, blockdev.ErrFrozen) {
		t.Errorf("frozen twice: %v", err)
	}
	<-writing(t, o, 0)
	waits := writing(t, o, unit)
	s.Close()
	s.Close()
	<-waits
	if _, err := s.ReadAt(make([]byte, 4096), 0); !errors.Is(err, os.ErrClosed) {
		t.Errorf("read after Close: %v", err)
	}
	again, err := o.Freeze([]blockdev.Extent{{Off: 0, Len: 2 * unit}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	s.Close()
	want := contentOf(t, o)
	<-writing(t, o, 1)
	if err := compare(again, blockdev.Extent{Off: 0, Len: 2 * unit}, want); err != nil {
		t.Error(err)
	}
}

// TestStillCloseMeanwhile: a read that a Close allows others to spoil does not pass for good.
func TestStillCloseMeanwhile(t *testing.T) {
	m, o, s := frozen(t, unit)
	var once sync.Once
	m.reading = func() {
		once.Do(func() {
			s.Close()
			<-writing(t, o, 0)
		})
	}
	if _, err := s.ReadAt(make([]byte, unit), 0); !errors.Is(err, os.ErrClosed) {
		t.Errorf("read during Close: %v", err)
	}
}

// TestStillCopyFails: it costs the Still, not the write.
func TestStillCopyFails(t *testing.T) {
	m, o, s := frozen(t, 2*unit)
	m.SetHook(func(op blockdevtest.Op) *blockdevtest.Fault {
		if op.Kind == blockdevtest.OpRead {
			return &blockdevtest.Fault{Err: syscall.EIO}
		}
		return nil
	})
	<-writing(t, o, 0)
	<-writing(t, o, unit)
	m.SetHook(nil)
	for _, off := range []int64{0, unit} {
		if _, err := s.ReadAt(make([]byte, 4096), off); !errors.Is(err, syscall.EIO) {
			t.Errorf("read at %d: %v", off, err)
		}
	}
	if got := contentOf(t, o); got[0] != 2 || got[unit] != 2 {
		t.Error("a write was not made")
	}
}

// TestStillEnd: a block that reaches beyond the end of the disk is read when all that the disk has of it has been read.
func TestStillEnd(t *testing.T) {
	const end, size = 2 * unit, 2*unit + 4096 + 512
	m := blockdevtest.NewMedium()
	o, err := blockdev.NewOverlayIn(m, nil, blockdev.OverlayOptions{Size: size, BlockSize: 64 << 10})
	if err != nil {
		t.Fatal(err)
	}
	want := bytes.Repeat([]byte{1}, size)
	if _, err := o.WriteAt(want, 0); err != nil {
		t.Fatal(err)
	}
	blocks, _ := o.Changes()
	if last := blocks[len(blocks)-1]; last.Off+last.Len != end+64<<10 {
		t.Fatalf("changed is %+v", last)
	}
	s, err := o.FreezeWith(blocks, 1)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	<-writing(t, o, size-1)
	if err := compare(s, blockdev.Extent{Off: end, Len: size - end}, want); err != nil {
		t.Fatal(err)
	}
	<-writing(t, o, 0) // there is room for a copy again
	if err := compare(s, blockdev.Extent{Off: 0, Len: unit}, want); err != nil {
		t.Fatal(err)
	}
}

// TestStillRefuses: what can't be frozen, and what can't be read.
func TestStillRefuses(t *testing.T) {
	const size = 1<<20 + 512
	o := overlayOn(t, nil, nil, blockdev.OverlayOptions{Size: size}).Device.(*blockdev.Overlay)
	var outside *blockdev.RangeError
	for _, blocks := range [][]blockdev.Extent{
		{{Off: 512, Len: 4096}},
		{{Off: 0, Len: 512}},
		{{Off: 4096, Len: 4096}, {Off: 0, Len: 4096}},
		{{Off: 0, Len: 8192}, {Off: 4096, Len: 4096}},
	} {
		if _, err := o.Freeze(blocks, nil); !errors.Is(err, blockdev.ErrBlocks) {
			t.Errorf("freeze %v: %v", blocks, err)
		}
	}
	for _, e := range []blockdev.Extent{
		{Off: -4096, Len: 4096}, {Off: 0, Len: -4096}, {Off: 1 << 20, Len: 8192}, {Off: 2 << 20, Len: 0},
	} {
		if _, err := o.Freeze([]blockdev.Extent{e}, nil); !errors.As(err, &outside) {
			t.Errorf("freeze %v: %v", e, err)
		}
	}
	s, err := o.Freeze([]blockdev.Extent{{Off: 8192, Len: 4096}, {Off: 1 << 20, Len: 4096}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	for _, c := range []struct {
		off, n int64
		want   error
	}{
		{8192, 512, blockdev.ErrBlocks},
		{8704, 4096, blockdev.ErrBlocks},
		{0, 4096, blockdev.ErrNotHeld},
		{4096, 8192, blockdev.ErrNotHeld},
		{8192, 4096, nil},
		{1 << 20, 512, nil},
		{8192, 0, nil},
	} {
		if _, err := s.ReadAt(make([]byte, c.n), c.off); !errors.Is(err, c.want) {
			t.Errorf("read %d bytes at %d: %v, want %v", c.n, c.off, err, c.want)
		}
	}
	if _, err := s.ReadAt(make([]byte, 4096), 1<<20); !errors.As(err, &outside) {
		t.Errorf("read behind the end: %v", err)
	}
}
