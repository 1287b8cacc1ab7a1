package blockdev_test

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"syscall"
	"testing"

	"github.com/cryovisor/cryovisor/blockdev"
	"github.com/cryovisor/cryovisor/blockdev/blockdevtest"
)

// eachOverlay runs a test on overlays of some MiB: with small and large blocks, that end with the disk or are cut short by it,
// over something or nothing.
func eachOverlay(t *testing.T, test func(t *testing.T, o *blockdev.Overlay, blockSize int64)) {
	for _, s := range []struct{ size, below int64 }{{2 << 20, 2 << 20}, {3<<20 + 70<<10 + 512, 1<<20 + 1536}, {1<<20 + 512, 0}} {
		for _, block := range []int{4096, 64 << 10} {
			t.Run(fmt.Sprintf("%d over %d by %d", s.size, s.below, block), func(t *testing.T) {
				var lower blockdev.Device
				if s.below > 0 {
					lower = rawDisk(t, int(s.below), blockdev.Options{ReadOnly: true}).Device
				}
				d := overlayOn(t, lower, nil, blockdev.OverlayOptions{Size: s.size, BlockSize: block})
				test(t, d.Device.(*blockdev.Overlay), int64(block))
			})
		}
	}
}

// somewhere is a range of a disk: a few bytes, blocks, or more.
func somewhere(rng *rand.Rand, size int64) (off, n int64) {
	off, n = rng.Int64N(size), 1+rng.Int64N(1<<(1+rng.IntN(18)))
	if rng.IntN(2) == 0 {
		off, n = off&^4095, (n+4095)&^4095
	}
	return off, min(n, size-off)
}

// alter changes a range of a disk in one of the ways that there are.
func alter(rng *rand.Rand, d blockdev.Device, off, n int64) error {
	switch rng.IntN(5) {
	case 0:
		return d.Discard(off, n)
	case 1:
		return d.WriteZeroes(off, n)
	default:
		p := make([]byte, n)
		for i := range p {
			p[i] = byte(rng.Uint32())
		}
		_, err := d.WriteAt(p, off)
		return err
	}
}

// contentOf is all that is on a disk.
func contentOf(t *testing.T, d blockdev.Device) []byte {
	t.Helper()
	all := make([]byte, d.Size())
	if _, err := d.ReadAt(all, 0); err != nil {
		t.Fatal(err)
	}
	return all
}

// TestTakeWrites: without writers meanwhile, it is exact.
func TestTakeWrites(t *testing.T) {
	eachOverlay(t, func(t *testing.T, o *blockdev.Overlay, blockSize int64) {
		rng := rand.New(rand.NewPCG(1, uint64(o.Size())))
		o.TrackWrites(true)
		for round := range 40 {
			written := make([]bool, (o.Size()+blockSize-1)/blockSize)
			for range rng.IntN(15) {
				off, n := somewhere(rng, o.Size())
				if err := alter(rng, o, off, n); err != nil {
					t.Fatal(err)
				}
				for b := off / blockSize; b <= (off+n-1)/blockSize; b++ {
					written[b] = true
				}
			}
			var want []blockdev.Extent
			for b, is := range written {
				switch n := len(want); {
				case !is:
				case n > 0 && want[n-1].Off+want[n-1].Len == int64(b)*blockSize:
					want[n-1].Len += blockSize
				default:
					want = append(want, blockdev.Extent{Off: int64(b) * blockSize, Len: blockSize})
				}
			}
			if got := o.TakeWrites(); !slices.Equal(got, want) {
				t.Fatalf("round %d: took %v, want %v", round, got, want)
			}
		}
	})
}

// TestTrackWrites: what is noted is what happens between a TrackWrites(true) and the next TrackWrites.
func TestTrackWrites(t *testing.T) {
	o := overlayOnNothing(t, 1<<20)
	for _, step := range []struct {
		track []bool
		at    int64
		want  []blockdev.Extent
	}{
		{nil, 0, nil},
		{[]bool{true}, 4096, []blockdev.Extent{{Off: 4096, Len: 4096}}},
		{nil, 0, []blockdev.Extent{{Off: 0, Len: 4096}}},
		{[]bool{false}, 0, nil},
		{[]bool{true, false, true}, 8192, []blockdev.Extent{{Off: 8192, Len: 4096}}},
		{[]bool{true, true}, 0, []blockdev.Extent{{Off: 0, Len: 4096}}},
	} {
		for _, on := range step.track {
			if _, err := o.WriteAt([]byte{1}, 64<<10); err != nil {
				t.Fatal(err)
			}
			o.TrackWrites(on)
		}
		if _, err := o.WriteAt([]byte{1}, step.at); err != nil {
			t.Fatal(err)
		}
		if got := o.TakeWrites(); !slices.Equal(got, step.want) {
			t.Errorf("%+v: took %v", step, got)
		}
	}
}

// TestPreCopy copies a disk while it is written on, and what has changed since, until nothing has.
func TestPreCopy(t *testing.T) {
	eachOverlay(t, func(t *testing.T, o *blockdev.Overlay, _ int64) {
		size := o.Size()
		rng := rand.New(rand.NewPCG(2, uint64(size)))
		got := make([]byte, size)
		var before []byte
		for round := range 40 {
			if round%10 == 0 {
				o.TrackWrites(true)
				before = nil
			}
			var writers sync.WaitGroup
			for range 3 {
				rng := rand.New(rand.NewPCG(rng.Uint64(), 1))
				writers.Go(func() {
					for range 4 {
						off, n := somewhere(rng, size)
						err := alter(rng, o, off, n)
						if rng.IntN(10) == 0 {
							err = errors.Join(err, o.Flush())
						}
						if err != nil {
							t.Error(err)
						}
					}
				})
			}
			done := make(chan struct{})
			go func() {
				writers.Wait()
				close(done)
			}()
			blocks := []blockdev.Extent{{Off: 0, Len: size}}
			if before != nil {
				blocks = o.TakeWrites()
			}
			for quiet := false; ; blocks = o.TakeWrites() {
				for _, e := range blocks {
					if _, err := o.ReadAt(got[e.Off:min(e.Off+e.Len, size)], e.Off); err != nil {
						t.Fatal(err)
					}
				}
				if quiet {
					break
				}
				select {
				case <-done:
					quiet = true
				default:
				}
			}
			before = contentOf(t, o)
			if !bytes.Equal(got, before) {
				t.Fatalf("round %d: the copy is not what is on the disk", round)
			}
			if left := o.TakeWrites(); len(left) != 0 {
				t.Fatalf("round %d: left are %v", round, left)
			}
		}
	})
}

// hooked is a file that says when it is about to be read, or changed.
type hooked struct {
	*blockdevtest.Medium
	reading, changing func()
}

func (h *hooked) ReadAt(p []byte, off int64) (int, error) {
	call(h.reading)
	return h.Medium.ReadAt(p, off)
}

func (h *hooked) WriteAt(p []byte, off int64) (int, error) {
	call(h.changing)
	return h.Medium.WriteAt(p, off)
}

func (h *hooked) PunchHole(off, n int64) error {
	call(h.changing)
	return h.Medium.PunchHole(off, n)
}

func call(f func()) {
	if f != nil {
		f()
	}
}

// TestTakeWritesMeanwhile: a change that is under way when TakeWrites, or TrackWrites, is called belongs to the next epoch.
func TestTakeWritesMeanwhile(t *testing.T) {
	m := &hooked{Medium: blockdevtest.NewMedium()}
	o, err := blockdev.NewOverlayIn(m, nil, blockdev.OverlayOptions{Size: 64 << 10})
	if err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func() error{
		"part":    func() error { _, err := o.WriteAt([]byte("something"), 8200); return err },
		"block":   func() error { _, err := o.WriteAt(make([]byte, 4096), 8192); return err },
		"discard": func() error { return o.Discard(8192, 4096) },
		"zeroes":  func() error { return o.WriteZeroes(8192, 4096) },
	} {
		for _, meanwhile := range []func(){func() { o.TakeWrites() }, func() { o.TrackWrites(true) }} {
			o.TrackWrites(true)
			m.changing = meanwhile
			if err := change(); err != nil {
				t.Fatal(err)
			}
			m.changing = nil
			if got := o.TakeWrites(); !slices.Equal(got, []blockdev.Extent{{Off: 8192, Len: 4096}}) {
				t.Errorf("%s: then, %v has changed", name, got)
			}
		}
		o.TrackWrites(false)
		m.changing = func() { o.TrackWrites(true) }
		if err := change(); err != nil {
			t.Fatal(err)
		}
		m.changing = nil
		if got := o.TakeWrites(); len(got) != 1 {
			t.Errorf("%s, when it was not tracked yet: then, %v has changed", name, got)
		}
	}
}

// TestTakeWritesAfterFailure: of a change that fails, a part may have been made.
func TestTakeWritesAfterFailure(t *testing.T) {
	m := blockdevtest.NewMedium()
	o, err := blockdev.NewOverlayIn(m, nil, blockdev.OverlayOptions{Size: 64 << 10})
	if err != nil {
		t.Fatal(err)
	}
	o.TrackWrites(true)
	m.SetHook(func(op blockdevtest.Op) *blockdevtest.Fault {
		return &blockdevtest.Fault{Err: syscall.EIO, Part: blockdevtest.PartHalf}
	})
	if _, err := o.WriteAt(make([]byte, 8192), 4096); !errors.Is(err, syscall.EIO) {
		t.Fatal(err)
	}
	if err := o.Discard(32<<10, 4096); !errors.Is(err, syscall.EIO) {
		t.Fatal(err)
	}
	want := []blockdev.Extent{{Off: 4096, Len: 8192}, {Off: 32 << 10, Len: 4096}}
	if got := o.TakeWrites(); !slices.Equal(got, want) {
		t.Errorf("took %v, want %v", got, want)
	}
}

// TestTakeWritesOfLargeDisk: the first, the last and a few blocks of a TiB.
func TestTakeWritesOfLargeDisk(t *testing.T) {
	const size = 1 << 40
	o := overlayOnNothing(t, size)
	o.TrackWrites(true)
	var want []blockdev.Extent
	for _, off := range []int64{0, 300 << 30, size - 4096} {
		want = append(want, blockdev.Extent{Off: off, Len: 4096})
		if _, err := o.WriteAt([]byte{1}, off+5); err != nil {
			t.Fatal(err)
		}
	}
	if got := o.TakeWrites(); !slices.Equal(got, want) {
		t.Errorf("took %v, want %v", got, want)
	}
	if got := o.TakeWrites(); got != nil {
		t.Errorf("took %v once more", got)
	}
}
