package qcow2

import (
	"bytes"
	"compress/flate"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"github.com/cryovisor/cryovisor/blockdev"
)

// The clusters of smallImage.
const (
	smallL1 = 1 + iota
	smallL2
	smallPlain
	smallDeflate
	smallClusters
)

// smallImage is an image of 8 clusters of 512 bytes: the first is plain, the second compressed, the third has the zero flag, the
// others are holes.
func smallImage(t testing.TB) []byte {
	t.Helper()
	const cluster = 512
	h := header{clusterBits: 9, size: 8 * cluster, l1Entries: 1, l1Offset: smallL1 * cluster}
	b := make([]byte, smallClusters*cluster)
	copy(b, h.marshal()[:])
	be := binary.BigEndian
	be.PutUint64(b[smallL1*cluster:], smallL2*cluster|copied)
	l2 := b[smallL2*cluster:]
	be.PutUint64(l2, smallPlain*cluster|copied)
	be.PutUint64(l2[8:], 1<<62|smallDeflate*cluster)
	be.PutUint64(l2[16:], 1)
	copy(b[smallPlain*cluster:], bytes.Repeat([]byte("plain..."), cluster/8))
	var z bytes.Buffer
	w, err := flate.NewWriter(&z, flate.BestCompression)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(bytes.Repeat([]byte("deflated"), cluster/8)); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	copy(b[smallDeflate*cluster:], z.Bytes())
	return b
}

// edit returns a copy of an image with a number replaced, which is as wide as its type.
func edit[T uint8 | uint16 | uint32 | uint64](b []byte, at int, number T) []byte {
	b = bytes.Clone(b)
	for i := binary.Size(number) - 1; i >= 0; i-- {
		b[at+i] = byte(number)
		number = T(uint64(number) >> 8)
	}
	return b
}

func TestSmallImage(t *testing.T) {
	want := strings.Repeat("plain...", 64) + strings.Repeat("deflated", 64) + strings.Repeat("\x00", 6*512)
	small := smallImage(t)
	for name, b := range map[string][]byte{
		"version 3":                        small,
		"version 2":                        edit(small, 4, uint32(2)),
		"dirty":                            edit(small, 72, uint64(featureDirty)),
		"unknown compatible and autoclear": edit(edit(small, 80, ^uint64(0)), 88, ^uint64(0)),
		"longer header":                    edit(small, 100, uint32(120)),
		"with snapshots":                   edit(edit(small, 60, uint32(3)), 64, uint64(512)),
		"damaged refcounts":                edit(small, 48, ^uint64(0)),
		"large extension":                  edit(small, 104, ^uint64(0)),
	} {
		img, err := newImage(bytes.NewReader(b), int64(len(b)), name)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		got := make([]byte, img.Size())
		if _, err := img.ReadAt(got, 0); err != nil || string(got) != want {
			t.Errorf("%s: %v, or another content", name, err)
		}
	}
}

func TestOpenRefusesHeaders(t *testing.T) {
	small := smallImage(t)
	for name, c := range map[string]struct {
		b    []byte
		want error
	}{
		"empty":                   {nil, ErrUnsupported},
		"no magic":                {edit(small, 0, uint32(0)), ErrUnsupported},
		"nothing but magic":       {small[:4], ErrCorrupt},
		"part of a header":        {small[:headerBytes-1], ErrCorrupt},
		"version 1":               {edit(small, 4, uint32(1)), ErrUnsupported},
		"version 4":               {edit(small, 4, uint32(4)), ErrUnsupported},
		"backing file":            {edit(small, 8, uint64(300)), ErrBackingFile},
		"backing file, version 2": {edit(edit(small, 4, uint32(2)), 8, uint64(300)), ErrBackingFile},
		"clusters of 256":         {edit(small, 20, uint32(8)), ErrUnsupported},
		"clusters of 4 MiB":       {edit(small, 20, uint32(22)), ErrUnsupported},
		"cluster_bits 64":         {edit(small, 20, uint32(64)), ErrUnsupported},
		"no size":                 {edit(small, 24, uint64(0)), ErrUnsupported},
		"half a block":            {edit(small, 24, uint64(768)), ErrUnsupported},
		"largest size":            {edit(small, 24, ^uint64(511)), ErrUnsupported},
		"AES":                     {edit(small, 32, uint32(1)), ErrEncrypted},
		"LUKS":                    {edit(small, 32, uint32(2)), ErrEncrypted},
		"no L1 table":             {edit(small, 36, uint32(0)), ErrCorrupt},
		"short L1 table":          {edit(small, 24, uint64(512*64*2)), ErrCorrupt},
		"L1 table too long":       {edit(small, 36, ^uint32(0)), ErrCorrupt},
		"L1 table in the header":  {edit(small, 40, uint64(0)), ErrCorrupt},
		"L1 table not aligned":    {edit(small, 40, uint64(520)), ErrCorrupt},
		"L1 table at the end":     {edit(small, 40, uint64(len(small))), ErrCorrupt},
		"L1 table far away":       {edit(small, 40, ^uint64(511)), ErrCorrupt},
		"corrupt":                 {edit(small, 72, uint64(featureCorrupt)), ErrCorrupt},
		"external data":           {edit(small, 72, uint64(featureExternalData)), ErrUnsupported},
		"extended L2":             {edit(small, 72, uint64(featureExtendedL2)), ErrUnsupported},
		"unknown feature":         {edit(small, 72, uint64(1<<5)), ErrUnsupported},
		"last feature":            {edit(small, 72, uint64(1<<63)), ErrUnsupported},
		"zstd":                    {edit(edit(edit(small, 72, uint64(featureCompressionType)), 100, uint32(112)), 104, byte(1)), ErrUnsupported},
		"compression without":     {edit(small, 72, uint64(featureCompressionType)), ErrCorrupt},
		"compression not said":    {edit(edit(small, 100, uint32(112)), 104, byte(1)), ErrCorrupt},
		"short header":            {edit(small, 100, uint32(96)), ErrCorrupt},
		"odd header":              {edit(small, 100, uint32(107)), ErrCorrupt},
	} {
		_, err := newImage(bytes.NewReader(c.b), int64(len(c.b)), "image")
		if !errors.Is(err, c.want) || !errors.Is(err, blockdev.ErrNotDisk) || !strings.Contains(err.Error(), "image") {
			t.Errorf("%s: %v, not %v", name, err, c.want)
		}
	}
}

// Tables and data that make no sense are found when they are read.
func TestDamagedTables(t *testing.T) {
	small := smallImage(t)
	const l1, l2 = smallL1 * 512, smallL2 * 512
	end := uint64(len(small))
	for name, c := range map[string]struct {
		b         []byte
		truncated bool
	}{
		"L2 table beyond the end":         {edit(small, l1, end), true},
		"L2 table far away":               {edit(small, l1, uint64(1<<56-512)), true},
		"data in the header":              {edit(small, l2, uint64(1<<63|2)), false},
		"data beyond the end":             {edit(small, l2, end), true},
		"data far away":                   {edit(small, l2, uint64(1<<56-512)), true},
		"compressed, in the header":       {edit(small, l2, uint64(1<<62|100)), false},
		"compressed, beyond the end":      {edit(small, l2, 1<<62|end), true},
		"compressed, far away":            {edit(small, l2, ^uint64(0)), true},
		"compressed, no deflate":          {edit(edit(small, l2, uint64(1<<62|4*512)), 4*512, ^uint64(0)), false},
		"compressed, less than a cluster": {edit(edit(small, l2, uint64(1<<62|4*512)), 4*512, uint16(0x0300)), true},
	} {
		img, err := newImage(bytes.NewReader(c.b), int64(len(c.b)), name)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		// Not from the start of the cluster on: the library itself refuses only offset 0 of the file.
		n, err := img.ReadAt(make([]byte, 500), 8)
		if !errors.Is(err, ErrCorrupt) || errors.Is(err, io.ErrUnexpectedEOF) != c.truncated || errors.Is(err, io.EOF) || n != 0 {
			t.Errorf("%s: %d bytes, %v", name, n, err)
		}
	}
}

// brokenFile is a file on a disk that fails from some offset on.
type brokenFile struct {
	io.ReaderAt
	from int64
}

func (f brokenFile) ReadAt(p []byte, off int64) (int, error) {
	if off >= f.from {
		return 0, &os.PathError{Op: "read", Path: "image", Err: syscall.EIO}
	}
	return f.ReaderAt.ReadAt(p, off)
}

// An error of the disk that the image is on does not say that the image is bad.
func TestHostErrors(t *testing.T) {
	small := smallImage(t)
	for _, from := range []int64{0, smallL1 * 512, smallL2 * 512, smallPlain * 512, smallDeflate * 512} {
		img, err := newImage(brokenFile{bytes.NewReader(small), from}, int64(len(small)), "image")
		if opens := from > smallL1*512; opens != (err == nil) {
			t.Fatalf("broken from %d on: %v", from, err)
		}
		if err == nil {
			_, err = img.ReadAt(make([]byte, 1024), 0)
		}
		if !errors.Is(err, syscall.EIO) || errors.Is(err, ErrCorrupt) || errors.Is(err, blockdev.ErrNotDisk) {
			t.Errorf("broken from %d on: %v", from, err)
		}
	}
}

// A panic in the library is an error.
func TestGuard(t *testing.T) {
	var none []byte
	if err := guard(func() error { none[0] = 1; return nil }); !errors.Is(err, ErrCorrupt) {
		t.Error(err)
	}
}

// sparseImage is a file with the header and the L1 table of an image with the largest clusters; all else are holes.
func sparseImage(t *testing.T, h header, l1 []byte) string {
	t.Helper()
	h.clusterBits, h.l1Offset = maxClusterBits, 1<<maxClusterBits
	file, err := os.Create(filepath.Join(t.TempDir(), "image"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	for off, b := range map[int64][]byte{0: h.marshal()[:], int64(h.l1Offset): l1} {
		if _, err := file.WriteAt(b, off); err != nil {
			t.Fatal(err)
		}
	}
	if err := file.Truncate(1 << 30); err != nil {
		t.Fatal(err)
	}
	return file.Name()
}

// Images keep to the memory that Image promises: one of the largest geometry, all tables of which are used, and one with an L1
// table of 256 MiB for a single block.
func TestMemoryIsBounded(t *testing.T) {
	const entries, span = maxL1Bytes / entryBytes, 1 << (2*maxClusterBits - 3)
	l1 := make([]byte, maxL1Bytes)
	for i := range entries {
		// All are the same L2 table, but reserved bits make them different for any cache.
		binary.BigEndian.PutUint64(l1[i*entryBytes:], uint64(i%64)<<56|4<<maxClusterBits)
	}
	for name, c := range map[string]struct {
		path  string
		reads int64
		bound int64
	}{
		"large":   {sparseImage(t, header{size: entries * span, l1Entries: entries}, l1), 40, 40 << 20},
		"long L1": {sparseImage(t, header{size: 512, l1Entries: 32 << 20}, l1), 1, 3 << 20},
	} {
		before := heap()
		img, err := Open(c.path)
		if err != nil {
			t.Fatal(err)
		}
		for i := range c.reads {
			if _, err := img.ReadAt(make([]byte, 512), i*span); err != nil {
				t.Fatal(err)
			}
		}
		if took := heap() - before; took > c.bound {
			t.Errorf("%s: %d bytes are in use", name, took)
		}
		img.Close()
	}
}

func heap() int64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// The refcounts of all clusters that are in use, and of no others, are 1, also where there are several refcount blocks.
func TestRefcounts(t *testing.T) {
	for _, used := range []uint64{1, blockEntries - 3, blockEntries - 2, blockEntries - 1, blockEntries, 2*blockEntries - 3, 2*blockEntries - 2} {
		file, err := os.Create(filepath.Join(t.TempDir(), "image"))
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		w := &imageWriter{file: file, next: used}
		if tables, err := w.refcounts(); err != nil || tables != 1 {
			t.Fatalf("%d clusters: %d of the refcount table, %v", used, tables, err)
		}
		info, err := file.Stat()
		if err != nil || info.Size()%clusterBytes != 0 {
			t.Fatalf("%d bytes, %v", info.Size(), err)
		}
		checkRefcounts(t, file, used, uint64(info.Size())/clusterBytes)
	}
}

// checkRefcounts reads the refcount table in cluster table of a file with total clusters.
func checkRefcounts(t *testing.T, file *os.File, table, total uint64) {
	t.Helper()
	b := make([]byte, clusterBytes)
	for i := uint64(0); i*blockEntries < total+blockEntries; i++ {
		if _, err := file.ReadAt(b[:entryBytes], int64(table*clusterBytes+i*entryBytes)); err != nil {
			t.Fatal(err)
		}
		block := binary.BigEndian.Uint64(b)
		if (block != 0) != (i*blockEntries < total) || block%clusterBytes != 0 {
			t.Fatalf("%d clusters: block %d is at %d", total, i, block)
		}
		if block == 0 {
			return
		}
		if _, err := file.ReadAt(b, int64(block)); err != nil {
			t.Fatal(err)
		}
		for j := range uint64(blockEntries) {
			if got := binary.BigEndian.Uint16(b[2*j:]); (got == 1) != (i*blockEntries+j < total) || got > 1 {
				t.Fatalf("%d clusters: refcount of cluster %d is %d", total, i*blockEntries+j, got)
			}
		}
	}
}

// FuzzOpen: whatever an image says, opening and reading it yields bytes or a typed error, and the same bytes again.
func FuzzOpen(f *testing.F) {
	small := smallImage(f)
	f.Add(small)
	f.Add(edit(small, 4, uint32(2)))
	f.Add(edit(small, 72, uint64(featureDirty)))
	f.Add(edit(small, 24, uint64(512*64)))
	f.Add(edit(small, smallL2*512, ^uint64(0)))
	f.Add(edit(small, smallL1*512, uint64(3*512)))
	f.Add(small[:len(small)-100])
	raw := filepath.Join(f.TempDir(), "raw")
	if err := os.WriteFile(raw, bytes.Repeat([]byte("0123456789abcdef"), 32), 0o600); err != nil {
		f.Fatal(err)
	}
	f.Add(writeBytes(f, raw))
	f.Fuzz(func(t *testing.T, b []byte) {
		img, err := newImage(bytes.NewReader(b), int64(len(b)), "image")
		if err != nil {
			if !errors.Is(err, blockdev.ErrNotDisk) || !typed(err) {
				t.Fatalf("untyped error %v", err)
			}
			return
		}
		rng := rand.New(rand.NewPCG(uint64(len(b)), uint64(img.Size())))
		for _, at := range []int64{0, img.Size(), rng.Int64N(img.Size()), rng.Int64N(min(img.Size(), 1<<20))} {
			readTwice(t, img, at, rng)
		}
	})
}

func typed(err error) bool {
	for _, class := range []error{ErrBackingFile, ErrEncrypted, ErrUnsupported, ErrCorrupt} {
		if errors.Is(err, class) {
			return true
		}
	}
	return false
}

// readTwice reads up to 64 KiB around at, as a whole and then in two parts.
func readTwice(t *testing.T, img *Image, at int64, rng *rand.Rand) {
	t.Helper()
	n := min(img.Size(), 64<<10)
	off := min(at, img.Size()-n)
	p, q := make([]byte, n), make([]byte, n)
	_, err := img.ReadAt(p, off)
	if err != nil && !errors.Is(err, ErrCorrupt) {
		t.Fatalf("untyped error %v", err)
	}
	cut := rng.Int64N(n)
	_, err1 := img.ReadAt(q[:cut], off)
	_, err2 := img.ReadAt(q[cut:], off+cut)
	if err == nil && (err1 != nil || err2 != nil || !bytes.Equal(p, q)) {
		t.Fatalf("%d bytes at %d, cut at %d: %v, %v, or other bytes", n, off, cut, err1, err2)
	}
}

// writeBytes is what Write makes of a raw image.
func writeBytes(t testing.TB, raw string) []byte {
	t.Helper()
	src, err := blockdev.OpenFile(raw, blockdev.Options{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	path := raw + ".qcow2"
	if err := Write(t.Context(), path, src); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}
