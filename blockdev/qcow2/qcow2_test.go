package qcow2_test

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"

	"go.uber.org/goleak"

	"github.com/cryovisor/cryovisor/blockdev"
	"github.com/cryovisor/cryovisor/blockdev/qcow2"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// qemu runs a tool of qemu-utils in a directory and returns what it says.
func qemu(t *testing.T, dir, tool string, args ...string) string {
	t.Helper()
	path, err := exec.LookPath(tool)
	if err != nil {
		t.Skipf("needs %s (Debian: qemu-utils): %v", tool, err)
	}
	cmd := exec.Command(path, args...)
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %v\n%s", cmd.Args, err, out)
	}
	return string(out)
}

// content is n bytes with zeros, repetition and noise, in pieces that have nothing to do with clusters.
func content(rng *rand.Rand, n int) []byte {
	b := make([]byte, 0, n)
	for len(b) < n {
		piece := make([]byte, min(n-len(b), 1+rng.IntN(200<<10)))
		switch rng.IntN(3) {
		case 0:
			for i := range piece {
				piece[i] = byte(rng.Uint32())
			}
		case 1:
			pattern := make([]byte, 1+rng.IntN(100))
			for i := range pattern {
				pattern[i] = byte(rng.Uint32())
			}
			for i := range piece {
				piece[i] = pattern[i%len(pattern)]
			}
		}
		b = append(b, piece...)
	}
	return b
}

func create(t *testing.T, path string, b []byte) {
	t.Helper()
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

func open(t *testing.T, path string) *qcow2.Image {
	t.Helper()
	img, err := qcow2.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { img.Close() })
	return img
}

func openRaw(t *testing.T, path string) *blockdev.File {
	t.Helper()
	d, err := blockdev.OpenFile(path, blockdev.Options{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

// same reads all of d at once, and then ranges of any alignment from several goroutines.
func same(t *testing.T, d blockdev.Device, want []byte) {
	t.Helper()
	if d.Size() != int64(len(want)) {
		t.Fatalf("%d bytes, not %d", d.Size(), len(want))
	}
	got := make([]byte, len(want))
	if n, err := d.ReadAt(got, 0); err != nil || n != len(want) {
		t.Fatalf("all of it: %d bytes, %v", n, err)
	}
	if !bytes.Equal(got, want) {
		t.Fatal("the content is another")
	}
	var wg sync.WaitGroup
	for i := range 4 {
		rng := rand.New(rand.NewPCG(2, uint64(i)))
		wg.Go(func() {
			for range 50 {
				off := rng.IntN(len(want))
				p := make([]byte, rng.IntN(min(len(want)-off, 300<<10))+1)
				if n, err := d.ReadAt(p, int64(off)); err != nil || n != len(p) || !bytes.Equal(p, want[off:off+len(p)]) {
					t.Errorf("%d bytes at %d: %d bytes, %v", len(p), off, n, err)
					return
				}
			}
		})
	}
	wg.Wait()
}

// Images of all kinds that qemu-img makes read like the raw image that they were made from.
func TestOpenImagesOfQEMU(t *testing.T) {
	dir := t.TempDir()
	want := content(rand.New(rand.NewPCG(1, 1)), 6<<20+3*512)
	create(t, filepath.Join(dir, "raw"), want)
	for _, options := range []string{
		"cluster_size=512", "cluster_size=64K", "cluster_size=2M", "compat=0.10", "compat=0.10,cluster_size=512",
		"preallocation=metadata", "lazy_refcounts=on", "refcount_bits=1",
	} {
		for _, compress := range []bool{false, true} {
			if compress && options == "preallocation=metadata" {
				continue // QEMU does not do that
			}
			name, args := options, []string{"convert", "-f", "raw", "-O", "qcow2", "-o", options, "raw", "image"}
			if compress {
				name, args = name+",compressed", append(args, "-c")
			}
			t.Run(name, func(t *testing.T) {
				qemu(t, dir, "qemu-img", args...)
				same(t, open(t, filepath.Join(dir, "image")), want)
			})
		}
	}
}

// What a machine did to an image: holes, clusters with the zero flag, with and without space, discarded ones, and snapshots.
func TestOpenUsedImages(t *testing.T) {
	for _, options := range []string{"cluster_size=512", "cluster_size=64K", "cluster_size=2M", "compat=0.10"} {
		t.Run(options, func(t *testing.T) {
			dir := t.TempDir()
			qemu(t, dir, "qemu-img", "create", "-f", "qcow2", "-o", options, "image", "40M")
			qemu(t, dir, "qemu-io", "-d", "unmap", "-c", "write -P 1 0 5M", "-c", "write -P 2 9000k 512", "-c", "write -z 1M 1M",
				"-c", "discard 2M 2M", "-c", "write -z -u 4M 100k", "-c", "write -P 3 39M 1M", "image")
			qemu(t, dir, "qemu-img", "snapshot", "-c", "before", "image")
			qemu(t, dir, "qemu-io", "-c", "write -P 4 0 70k", "-c", "write -z 39M 200k", "-c", "write -P 5 1500k 7k", "image")
			qemu(t, dir, "qemu-img", "convert", "-f", "qcow2", "-O", "raw", "image", "raw")
			want, err := os.ReadFile(filepath.Join(dir, "raw"))
			if err != nil {
				t.Fatal(err)
			}
			if want[0] != 4 || want[1501<<10] != 5 || want[9000<<10] != 2 || want[1<<20] != 0 {
				t.Fatal("qemu-io did something else")
			}
			same(t, open(t, filepath.Join(dir, "image")), want)
		})
	}
}

// Kinds of images that QEMU makes and that Open does not take.
func TestOpenRefusesKinds(t *testing.T) {
	dir := t.TempDir()
	qemu(t, dir, "qemu-img", "create", "-f", "qcow2", "base", "1M")
	for name, c := range map[string]struct {
		want error
		args []string
	}{
		"a backing file": {qcow2.ErrBackingFile, []string{"-b", "base", "-F", "qcow2", "image"}},
		"AES": {qcow2.ErrEncrypted, []string{
			"--object", "secret,id=s,data=secret", "-o", "encrypt.format=aes,encrypt.key-secret=s", "image", "1M",
		}},
		"a data file": {qcow2.ErrUnsupported, []string{"-o", "data_file=data", "image", "1M"}},
		"extended L2": {qcow2.ErrUnsupported, []string{"-o", "extended_l2=on", "image", "1M"}},
		"zstd":        {qcow2.ErrUnsupported, []string{"-o", "compression_type=zstd", "image", "1M"}},
	} {
		t.Run(name, func(t *testing.T) {
			qemu(t, dir, "qemu-img", append([]string{"create", "-f", "qcow2"}, c.args...)...)
			_, err := qcow2.Open(filepath.Join(dir, "image"))
			if !errors.Is(err, c.want) || !errors.Is(err, blockdev.ErrNotDisk) {
				t.Errorf("%v, not %v", err, c.want)
			}
		})
	}
}

// written is the path of an image made by Write, with one disk of 1 MiB in it: cluster 1 is the L1 table, 2 is data, 3 the L2 table.
func written(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	raw := filepath.Join(dir, "raw")
	create(t, raw, append(bytes.Repeat([]byte{7}, 512), make([]byte, 1<<20-512)...))
	path := filepath.Join(dir, "image")
	if err := qcow2.Write(t.Context(), path, openRaw(t, raw)); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestImageReadOnly(t *testing.T) {
	img := open(t, written(t))
	if !img.ReadOnly() || img.BlockSize() != 512 || img.Size() != 1<<20 {
		t.Errorf("read-only %v, block size %d, size %d", img.ReadOnly(), img.BlockSize(), img.Size())
	}
	_, err := img.WriteAt([]byte{1}, 0)
	for _, err := range []error{err, img.Discard(0, 1), img.WriteZeroes(0, 1)} {
		if !errors.Is(err, blockdev.ErrReadOnly) {
			t.Error(err)
		}
	}
	if err := img.Flush(); err != nil {
		t.Error(err)
	}
	var out *blockdev.RangeError
	for _, off := range []int64{-1, 1 << 20, 1<<20 - 1, 1 << 62} {
		if _, err := img.ReadAt(make([]byte, 2), off); !errors.As(err, &out) {
			t.Errorf("read 2 bytes at %d: %v", off, err)
		}
	}
	if err := img.Close(); err != nil {
		t.Error(err)
	}
	for _, off := range []int64{0, 1 << 19} { // data, and a hole
		if _, err := img.ReadAt(make([]byte, 1), off); !errors.Is(err, os.ErrClosed) {
			t.Errorf("read at %d after Close: %v", off, err)
		}
	}
}

func TestIs(t *testing.T) {
	image := written(t)
	dir := filepath.Dir(image)
	create(t, filepath.Join(dir, "empty"), nil)
	for path, want := range map[string]bool{image: true, filepath.Join(dir, "raw"): false, filepath.Join(dir, "empty"): false, dir: false} {
		if got, err := qcow2.Is(path); err != nil || got != want {
			t.Errorf("%s: %v, %v", path, got, err)
		}
	}
	if _, err := qcow2.Is(filepath.Join(dir, "none")); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
}

// A file that is cut off is refused at once, or when a read comes to what is not there.
func TestTruncated(t *testing.T) {
	path := written(t)
	for _, c := range []struct {
		clusters float64
		atOpen   bool
	}{{2.5, false}, {2, false}, {1, true}, {0.001, true}, {0, true}} {
		if err := os.Truncate(path, int64(c.clusters*(64<<10))); err != nil {
			t.Fatal(err)
		}
		img, err := qcow2.Open(path)
		if c.atOpen {
			if !errors.Is(err, blockdev.ErrNotDisk) {
				t.Errorf("%v clusters: %v", c.clusters, err)
			}
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		if _, err := img.ReadAt(make([]byte, 1), 0); !errors.Is(err, qcow2.ErrCorrupt) {
			t.Errorf("read with %v clusters: %v", c.clusters, err)
		}
		img.Close()
	}
}

func TestOpenFiles(t *testing.T) {
	image := written(t)
	dir := filepath.Dir(image)
	for path, want := range map[string]error{
		filepath.Join(dir, "none"): os.ErrNotExist,
		filepath.Join(dir, "raw"):  qcow2.ErrUnsupported,
		dir:                        blockdev.ErrNotDisk,
	} {
		if _, err := qcow2.Open(path); !errors.Is(err, want) {
			t.Errorf("%s: %v, not %v", path, err, want)
		}
	}
}

// pieces is a disk with a few bytes here and there. At its own time, it fails.
type pieces struct {
	blockdev.Device
	size  int64
	at    map[int64][]byte
	check func(off int64) error
}

func (d *pieces) Size() int64 { return d.size }

func (d *pieces) ReadAt(p []byte, off int64) (int, error) {
	if err := blockdev.CheckRange("read", off, int64(len(p)), d.size); err != nil {
		return 0, err
	}
	clear(p)
	for at, b := range d.at {
		if from, to := max(off, at), min(off+int64(len(p)), at+int64(len(b))); from < to {
			copy(p[from-off:to-off], b[from-at:])
		}
	}
	if d.check != nil {
		return len(p), d.check(off)
	}
	return len(p), nil
}

// What Write made of a disk is right for QEMU and for Open.
func TestWrite(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 3))
	const span = 512 << 20 // what an L2 table stands for
	for name, d := range map[string]*pieces{
		"one block":         {size: 512, at: map[int64][]byte{0: content(rng, 512)}},
		"zeros":             {size: 3 << 20},
		"part of a cluster": {size: 1<<20 + 512, at: map[int64][]byte{0: content(rng, 1<<20), 1<<20 + 511: {1}}},
		"data":              {size: 5 << 20, at: map[int64][]byte{0: content(rng, 5<<20)}},
		"an exact L2 table": {size: span, at: map[int64][]byte{span - 1: {1}}},
		// The third is empty, and left out.
		"several L2 tables": {size: 3*span + 512, at: map[int64][]byte{7: {7}, span - 2: {1, 2, 3, 4}, 3*span + 511: {1}}},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, "image")
			if err := qcow2.Write(t.Context(), path, d); err != nil {
				t.Fatal(err)
			}
			compare(t, open(t, path), d)
			raw, err := os.Create(filepath.Join(dir, "raw"))
			if err != nil {
				t.Fatal(err)
			}
			defer raw.Close()
			for at, b := range d.at {
				if _, err := raw.WriteAt(b, at); err != nil {
					t.Fatal(err)
				}
			}
			if err := raw.Truncate(d.size); err != nil {
				t.Fatal(err)
			}
			// The status of qemu-img is not 0 for leaks or differences.
			t.Log(qemu(t, dir, "qemu-img", "check", "-f", "qcow2", "image"))
			t.Log(qemu(t, dir, "qemu-img", "compare", "-f", "raw", "-F", "qcow2", "raw", "image"))
		})
	}
}

// compare reads what is around the pieces; qemu-img reads all.
func compare(t *testing.T, got blockdev.Device, want *pieces) {
	t.Helper()
	if got.Size() != want.Size() {
		t.Fatalf("%d bytes, not %d", got.Size(), want.Size())
	}
	ends := []int64{0, want.size}
	for at, b := range want.at {
		ends = append(ends, at, at+int64(len(b)))
	}
	for _, end := range ends {
		from, to := max(0, end-1<<20), min(want.size, end+1<<20)
		a, b := make([]byte, to-from), make([]byte, to-from)
		_, err := got.ReadAt(a, from)
		if _, werr := want.ReadAt(b, from); err != nil || werr != nil || !bytes.Equal(a, b) {
			t.Fatalf("%d bytes at %d differ: %v, %v", to-from, from, err, werr)
		}
	}
}

func TestWriteFile(t *testing.T) {
	path := written(t)
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if info.Mode() != 0o600 {
		t.Errorf("mode %v", info.Mode())
	}
	// Header, L1 table, 1 cluster of data, L2 table, refcount table and block.
	if info.Size() != 6*64<<10 {
		t.Errorf("%d bytes", info.Size())
	}
	onlyFiles(t, filepath.Dir(path), "image", "raw")
}

// Only the clusters of the disk are written, and what the last one has beyond the disk is zero.
func TestWritePartOfCluster(t *testing.T) {
	const size, clusters = 1<<20 + 512, 17
	path := filepath.Join(t.TempDir(), "image")
	d := &pieces{size: size, at: map[int64][]byte{0: bytes.Repeat([]byte{1}, size)}}
	if err := qcow2.Write(t.Context(), path, d); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	// Header, L1 table, data, L2 table, refcount table and block.
	if len(b) != (2+clusters+3)*64<<10 {
		t.Fatalf("%d bytes", len(b))
	}
	last := b[(2+clusters-1)*64<<10:][:64<<10]
	if n := bytes.Count(last, []byte{1}); n != 512 || last[511] != 1 {
		t.Errorf("%d bytes in the last cluster", n)
	}
}

func onlyFiles(t *testing.T, dir string, want ...string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, e := range entries {
		got = append(got, e.Name())
	}
	if len(got) != len(want) {
		t.Fatalf("files %q, not %q", got, want)
	}
	for i := range got {
		if got[i] != want[i] {
			t.Errorf("files %q, not %q", got, want)
		}
	}
}

// After an error nothing is left, whenever it comes.
func TestWriteFails(t *testing.T) {
	bad := errors.New("bad sector")
	data := map[int64][]byte{0: bytes.Repeat([]byte{1}, 5<<20)}
	ctx, cancel := context.WithCancel(t.Context())
	done, stop := context.WithCancel(t.Context())
	stop()
	fail := func(off int64) error {
		if off >= 3<<20 {
			return bad
		}
		return nil
	}
	for name, c := range map[string]struct {
		ctx  context.Context
		disk *pieces
		want error
	}{
		"read error":       {t.Context(), &pieces{size: 5 << 20, at: data, check: fail}, bad},
		"cancelled before": {done, &pieces{size: 5 << 20, at: data}, context.Canceled},
		"cancelled later":  {ctx, &pieces{size: 5 << 20, at: data, check: func(int64) error { cancel(); return nil }}, context.Canceled},
		"too large":        {t.Context(), &pieces{size: 1 << 60, check: fail}, qcow2.ErrUnsupported},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			if err := qcow2.Write(c.ctx, filepath.Join(dir, "image"), c.disk); !errors.Is(err, c.want) {
				t.Errorf("%v, not %v", err, c.want)
			}
			onlyFiles(t, dir)
		})
	}
}

// A file that exists is not replaced, whether it was there before or came while the image was written.
func TestWriteExists(t *testing.T) {
	for _, late := range []bool{false, true} {
		dir := t.TempDir()
		path := filepath.Join(dir, "image")
		d := &pieces{size: 512, check: func(int64) error { return os.WriteFile(path, []byte("mine"), 0o600) }}
		if !late {
			create(t, path, []byte("mine"))
			d.check = func(int64) error { return errors.New("read in vain") }
		}
		if err := qcow2.Write(t.Context(), path, d); !errors.Is(err, os.ErrExist) {
			t.Errorf("late %v: %v", late, err)
		}
		onlyFiles(t, dir, "image")
		if b, err := os.ReadFile(path); err != nil || string(b) != "mine" {
			t.Errorf("late %v: the file now has %q, %v", late, b, err)
		}
	}
	if err := qcow2.Write(t.Context(), filepath.Join(t.TempDir(), "none", "image"), &pieces{size: 512}); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
}
