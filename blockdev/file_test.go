package blockdev_test

import (
	"bytes"
	"errors"
	"io"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"go.uber.org/goleak"

	"github.com/cryovisor/cryovisor/blockdev"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func image(t *testing.T, size int64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, size); err != nil {
		t.Fatal(err)
	}
	return path
}

func open(t *testing.T, path string, opts blockdev.Options) *blockdev.File {
	t.Helper()
	d, err := blockdev.OpenFile(path, opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

// Each goroutine works in a part of the disk of its own, at any alignment, and compares it with a slice.
func TestFileAgainstOracle(t *testing.T) {
	const parts, size = 4, 300_001
	path := image(t, (parts*size+511)&^511)
	d := open(t, path, blockdev.Options{})
	oracle := make([][]byte, parts)
	var wg sync.WaitGroup
	for part := range parts {
		oracle[part] = make([]byte, size)
		wg.Go(func() {
			exercise(t, d, int64(part*size), oracle[part], rand.New(rand.NewPCG(1, uint64(part))))
		})
	}
	wg.Wait()
	if err := d.Flush(); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got[:parts*size], bytes.Join(oracle, nil)) {
		t.Fatal("the file is not what was written")
	}
}

func exercise(t *testing.T, d blockdev.Device, base int64, want []byte, rng *rand.Rand) {
	for range 300 {
		off := rng.IntN(len(want) + 1)
		n := rng.IntN(len(want) - off + 1)
		part, at := want[off:off+n], base+int64(off)
		var err error
		switch rng.IntN(8) {
		case 0, 1, 2:
			for i := range part {
				part[i] = byte(rng.Uint32())
			}
			_, err = d.WriteAt(part, at)
		case 3:
			clear(part)
			err = d.Discard(at, int64(n))
		case 4:
			clear(part)
			err = d.WriteZeroes(at, int64(n))
		case 5:
			err = d.Flush()
		default:
			got := make([]byte, n)
			if _, err = d.ReadAt(got, at); err == nil && !bytes.Equal(got, part) {
				t.Errorf("%d bytes at %d are not what was written", n, at)
				return
			}
		}
		if err != nil {
			t.Error(err)
			return
		}
	}
}

func TestFileRanges(t *testing.T) {
	d := open(t, image(t, 4096), blockdev.Options{})
	for _, r := range []struct{ off, n int64 }{
		{-1, 1}, {0, 4097}, {4096, 1}, {4097, 0}, {math.MaxInt64, 1}, {math.MinInt64, 16},
	} {
		_, read := d.ReadAt(make([]byte, r.n), r.off)
		_, write := d.WriteAt(make([]byte, r.n), r.off)
		for op, err := range map[string]error{
			"read": read, "write": write, "discard": d.Discard(r.off, r.n), "write zeroes": d.WriteZeroes(r.off, r.n),
		} {
			var out *blockdev.RangeError
			if !errors.As(err, &out) || out.Off != r.off || out.N != r.n || out.Size != 4096 {
				t.Errorf("%s %d bytes at %d: %v", op, r.n, r.off, err)
			}
		}
	}
	for _, n := range []int64{-1, math.MaxInt64, math.MinInt64} {
		var out *blockdev.RangeError
		if err := d.Discard(1, n); !errors.As(err, &out) {
			t.Errorf("discard %d bytes: %v", n, err)
		}
	}
	if _, err := d.ReadAt(nil, 4096); err != nil {
		t.Errorf("nothing, read at the end: %v", err)
	}
	if err := d.Discard(4096, 0); err != nil {
		t.Errorf("nothing, discarded at the end: %v", err)
	}
}

func TestFileReadOnly(t *testing.T) {
	d := open(t, image(t, 4096), blockdev.Options{ReadOnly: true})
	if !d.ReadOnly() {
		t.Error("it does not say so")
	}
	_, err := d.WriteAt([]byte{1}, 0)
	for _, err := range []error{err, d.Discard(0, 1), d.WriteZeroes(0, 1)} {
		if !errors.Is(err, blockdev.ErrReadOnly) {
			t.Error(err)
		}
	}
	if err := d.Flush(); err != nil {
		t.Error(err)
	}
	if _, err := d.ReadAt(make([]byte, 4096), 0); err != nil {
		t.Error(err)
	}
}

func TestOpenFile(t *testing.T) {
	dir := t.TempDir()
	for name, c := range map[string]struct {
		path string
		opts blockdev.Options
		want error
	}{
		"nothing":         {filepath.Join(dir, "none"), blockdev.Options{}, os.ErrNotExist},
		"a directory":     {dir, blockdev.Options{}, blockdev.ErrNotDisk},
		"empty":           {image(t, 0), blockdev.Options{}, blockdev.ErrNotDisk},
		"half a block":    {image(t, 768), blockdev.Options{}, blockdev.ErrNotDisk},
		"small blocks":    {image(t, 512), blockdev.Options{BlockSize: 256}, blockdev.ErrNotDisk},
		"odd blocks":      {image(t, 3000), blockdev.Options{BlockSize: 1000}, blockdev.ErrNotDisk},
		"negative blocks": {image(t, 512), blockdev.Options{BlockSize: math.MinInt}, blockdev.ErrNotDisk},
		"large blocks":    {image(t, 512), blockdev.Options{BlockSize: 4096}, blockdev.ErrNotDisk},
	} {
		if _, err := blockdev.OpenFile(c.path, c.opts); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, not %v", name, err, c.want)
		}
	}
	d := open(t, image(t, 8192), blockdev.Options{BlockSize: 4096})
	if d.Size() != 8192 || d.BlockSize() != 4096 || d.ReadOnly() {
		t.Errorf("size %d, block size %d, read-only %v", d.Size(), d.BlockSize(), d.ReadOnly())
	}
}

func TestFileShrunkAndClosed(t *testing.T) {
	path := image(t, 4096)
	d := open(t, path, blockdev.Options{})
	if err := os.Truncate(path, 512); err != nil {
		t.Fatal(err)
	}
	if _, err := d.ReadAt(make([]byte, 1024), 0); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("read of a file that was made shorter: %v", err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	_, read := d.ReadAt(make([]byte, 1), 0)
	// The second Flush is the proof that a failure stays.
	for i, err := range []error{read, d.Discard(0, 512), d.WriteZeroes(0, 512), d.Flush(), d.Flush()} {
		if !errors.Is(err, os.ErrClosed) {
			t.Errorf("call %d after Close: %v", i, err)
		}
	}
}
