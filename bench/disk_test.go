//go:build linux && amd64

package bench

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"testing"
	"time"

	"filippo.io/age"
	"golang.org/x/sys/unix"

	"github.com/cryovisor/cryovisor/blockdev"
	"github.com/cryovisor/cryovisor/internal/testvm"
	"github.com/cryovisor/cryovisor/snapshot"
)

const (
	diskBytes  = 1 << 30
	blockBytes = snapshot.PageSize // of random accesses, and of the generations
	pieceBytes = 64 << 10          // of which half of an overlay is made: whole clusters of a qcow2 image as well
	streamUnit = 128 << 10         // of sequential accesses

	// What an iteration does. It is bounded so that most writes meet blocks that are not in the overlay yet.
	accesses      = 4096
	flushes       = 256
	streamBytes   = 256 << 20
	firstReads    = 128
	pausedMemory  = 16 << 20
	pausedDisk    = 2 << 30
	generations   = 16
	blocksChecked = 1024
)

// disk is what is measured, by one request at a time.
type disk interface {
	io.ReaderAt
	io.WriterAt
	Flush() error
	Close() error
}

// temporary is a disk whose file goes with it.
type temporary struct {
	disk
	path string
}

func (t temporary) Close() error { return errors.Join(t.disk.Close(), os.Remove(t.path)) }

// contents is what must be on a disk: who wrote each block last. Generation 0 is the base image.
type contents struct {
	corpus     testvm.Content
	generation []uint8
}

// fill makes what must be at off; both it and p are whole blocks.
func (c *contents) fill(p []byte, off int64) {
	for n := 0; n < len(p); n += blockBytes {
		block := (off + int64(n)) / blockBytes
		c.corpus.Page(uint64(c.generation[block])<<32+uint64(block), p[n:][:blockBytes])
	}
}

// write writes what must be at off.
func (c *contents) write(b *testing.B, d io.WriterAt, off int64, n int) {
	b.Helper()
	p := make([]byte, n)
	c.fill(p, off)
	_, err := d.WriteAt(p, off)
	check(b, err)
}

// compare compares what was read at off.
func (c *contents) compare(b *testing.B, got []byte, off int64) {
	b.Helper()
	want := make([]byte, len(got))
	if c.fill(want, off); !bytes.Equal(got, want) {
		b.Fatalf("%d bytes at %d differ from what was written", len(got), off)
	}
}

func check(b *testing.B, err error) {
	b.Helper()
	if err != nil {
		b.Fatal(err)
	}
}

// diskLab is a directory with a base image, a store and a key.
type diskLab struct {
	dir    string
	corpus testvm.Content
	image  string
	base   *blockdev.File
	store  *snapshot.Store
	key    *age.X25519Identity
	rnd    *rand.Rand
	files  int
}

func newDiskLab(b *testing.B) *diskLab {
	b.Helper()
	dir := newDir(b)
	program, err := testvm.ProgramCorpus()
	check(b, err)
	l := &diskLab{dir: dir, corpus: testvm.NewCorpus(seed, program), rnd: rand.New(rand.NewPCG(seed, 0))}
	l.key, err = age.GenerateX25519Identity()
	check(b, err)
	l.store, err = snapshot.OpenStore(filepath.Join(dir, "store"))
	check(b, err)
	l.image = l.sparse(b)
	base, err := blockdev.OpenFile(l.image, blockdev.Options{})
	check(b, err)
	defer base.Close()
	c := l.contents(diskBytes)
	for off := int64(0); off < diskBytes; off += streamUnit {
		c.write(b, base, off, streamUnit)
	}
	check(b, base.Flush())
	l.base, err = blockdev.OpenFile(l.image, blockdev.Options{ReadOnly: true})
	check(b, err)
	b.Cleanup(func() { check(b, l.base.Close()) })
	return l
}

// path names a new file.
func (l *diskLab) path() string {
	l.files++
	return filepath.Join(l.dir, strconv.Itoa(l.files))
}

// sparse makes a file of a disk's size with nothing in it.
func (l *diskLab) sparse(b *testing.B) string {
	b.Helper()
	path := l.path()
	check(b, errors.Join(os.WriteFile(path, nil, 0o600), os.Truncate(path, diskBytes)))
	return path
}

func (l *diskLab) contents(size int64) contents {
	return contents{l.corpus, make([]uint8, size/blockBytes)}
}

// rewriteHalf writes a random half of the pieces of a disk.
func (l *diskLab) rewriteHalf(b *testing.B, d io.WriterAt, size int64) contents {
	b.Helper()
	c := l.contents(size)
	for _, i := range l.rnd.Perm(int(size / pieceBytes))[:size/pieceBytes/2] {
		off := int64(i) * pieceBytes
		for block := off / blockBytes; block < (off+pieceBytes)/blockBytes; block++ {
			c.generation[block] = 1
		}
		c.write(b, d, off, pieceBytes)
	}
	return c
}

// overlay makes an overlay of a disk's size.
func (l *diskLab) overlay(b *testing.B, lower blockdev.Device, size int64) (*blockdev.Overlay, string) {
	b.Helper()
	path := l.path()
	o, err := blockdev.CreateOverlay(path, lower, blockdev.OverlayOptions{Size: size})
	check(b, err)
	return o, path
}

// over opens the disk of a snapshot with an empty cache, and a new overlay on it.
func (l *diskLab) over(b *testing.B, r *snapshot.Reader) disk {
	b.Helper()
	o, path := l.overlay(b, blockdev.NewLayer(r.Disk(0), l.base, diskBytes, 0), diskBytes)
	return temporary{o, path}
}

// pause stores what was written to an overlay, as a machine's pause does.
func (l *diskLab) pause(b *testing.B, o *blockdev.Overlay, parent *snapshot.Reader, memory []byte) snapshot.Info {
	b.Helper()
	w, err := l.store.Create(b.Context(), snapshot.Options{Recipients: []age.Recipient{l.key.Recipient()}, Parent: parent})
	check(b, err)
	defer w.Abort()
	size := uint64(len(memory))
	check(b, w.WriteMemory(b.Context(), size, []snapshot.Range{{GPA: 0, Len: size}}, func(gpa uint64, n int) ([]byte, error) {
		return memory[gpa:][:n:n], nil
	}))
	d := snapshot.Disk{Size: uint64(o.Size()), Layered: true, ReadAt: o.ReadAt}
	data, zeros := o.Changes()
	d.Data, d.Zeros = ranges(data), ranges(zeros)
	check(b, w.WriteDisk(b.Context(), d))
	info, err := w.Commit(b.Context())
	check(b, err)
	return info
}

func ranges(in []blockdev.Extent) []snapshot.Range {
	out := make([]snapshot.Range, len(in))
	for i, e := range in {
		out[i] = snapshot.Range{GPA: uint64(e.Off), Len: uint64(e.Len)}
	}
	return out
}

func (l *diskLab) open(b *testing.B, id snapshot.ID) *snapshot.Reader {
	b.Helper()
	r, err := l.store.Open(b.Context(), id, l.key)
	check(b, err)
	return r
}

// chain makes a snapshot with as many ancestors, itself included, as depth says. Each of the generations has rewritten a random
// part of the disk, block by block; with fewer ancestors than that, the first stores what the generations up to its own left.
func (l *diskLab) chain(b *testing.B, depth int) (contents, snapshot.ID) {
	b.Helper()
	c := l.contents(diskBytes)
	var parent *snapshot.Reader
	var id snapshot.ID
	rnd := rand.New(rand.NewPCG(seed, 1)) // the same for every depth
	for g := 1; g <= generations; g++ {
		for _, block := range rnd.Perm(len(c.generation))[:len(c.generation)/generations] {
			c.generation[block] = uint8(g)
		}
		if g <= generations-depth {
			continue
		}
		var lower blockdev.Device = l.base
		if parent != nil {
			lower = blockdev.NewLayer(parent.Disk(0), l.base, diskBytes, 0)
		}
		o, _ := l.overlay(b, lower, diskBytes)
		for block, by := range c.generation {
			if int(by) == g || parent == nil && by > 0 {
				c.write(b, o, int64(block)*blockBytes, blockBytes)
			}
		}
		id = l.pause(b, o, parent, make([]byte, snapshot.PageSize)).ID
		check(b, o.Remove())
		if parent != nil {
			check(b, parent.Close())
		}
		parent = l.open(b, id)
	}
	check(b, parent.Close())
	return c, id
}

// subject is a kind of disk.
type subject struct {
	contents
	// filled opens a disk with the contents, of which the subject has nothing in a cache of its own.
	filled func(b *testing.B) disk
	// fresh makes a disk to which nothing was written.
	fresh func(b *testing.B) disk
}

func (l *diskLab) fileSubject(*testing.B) *subject {
	return &subject{
		contents: l.contents(diskBytes),
		filled: func(b *testing.B) disk {
			f, err := blockdev.OpenFile(l.image, blockdev.Options{ReadOnly: true})
			check(b, err)
			return f
		},
		fresh: func(b *testing.B) disk {
			path := l.sparse(b)
			f, err := blockdev.OpenFile(path, blockdev.Options{})
			check(b, err)
			return temporary{f, path}
		},
	}
}

func (l *diskLab) overlaySubject(b *testing.B) *subject {
	o, path := l.overlay(b, l.base, diskBytes)
	s := &subject{contents: l.rewriteHalf(b, o, diskBytes)}
	check(b, o.Close())
	s.filled = func(b *testing.B) disk {
		o, err := blockdev.OpenOverlay(path, l.base)
		check(b, err)
		return o
	}
	s.fresh = func(b *testing.B) disk {
		o, path := l.overlay(b, l.base, diskBytes)
		return temporary{o, path}
	}
	return s
}

func (l *diskLab) snapshotSubject(depth int) func(b *testing.B) *subject {
	return func(b *testing.B) *subject {
		c, id := l.chain(b, depth)
		r := l.open(b, id)
		b.Cleanup(func() { check(b, r.Close()) })
		open := func(b *testing.B) disk { return l.over(b, r) }
		return &subject{c, open, open}
	}
}

// BenchmarkDisk measures disks of 1 GiB, by one request at a time:
//
//	file         a raw image
//	overlay      blocks over a raw image; half of the disk is in them when it is read
//	snapshot-1   an overlay on a snapshot, in which most of the disk is, on a raw image
//	snapshot-16  the same contents from 16 generations, which have rewritten 1/16 of the disk each, at random
//	qemu-nbd     a qcow2 image on a raw image, with the same half in it as of the overlay; a round trip over a socket is part of
//	             each request: compare with hot4k, which is hardly more than that, and write4k with rewrite4k
//
// Reads are from disks that have just been opened: nothing is in the cache of a snapshot's disk, but in that of the host's
// kernel. Writes are to disks to which nothing was written: what they overwrite is below, or nowhere for the file. A flush after
// the writes is not part of the time, but for write4k+flush, where there is one after each.
func BenchmarkDisk(b *testing.B) {
	l := newDiskLab(b)
	for _, s := range []struct {
		name    string
		prepare func(b *testing.B) *subject
	}{
		{"file", l.fileSubject},
		{"overlay", l.overlaySubject},
		{"snapshot-1", l.snapshotSubject(1)},
		{"snapshot-16", l.snapshotSubject(generations)},
		{"qemu-nbd", l.nbdSubject},
	} {
		b.Run(s.name, func(b *testing.B) {
			s := s.prepare(b)
			s.verify(b)
			b.Run("read128k", func(b *testing.B) { s.stream(b, s.filled, read) })
			b.Run("write128k", func(b *testing.B) { s.stream(b, s.fresh, write) })
			b.Run("read4k", func(b *testing.B) { s.random(b, s.filled, accesses, read) })
			b.Run("hot4k", s.hot)
			b.Run("write4k", func(b *testing.B) { s.random(b, s.fresh, accesses, write) })
			b.Run("rewrite4k", func(b *testing.B) { s.random(b, s.fresh, accesses, write, write) })
			b.Run("write4k+flush", func(b *testing.B) { s.random(b, s.fresh, flushes, writeFlush) })
		})
	}
}

// access is a request, and what is measured.
type access func(d disk, p []byte, off int64) error

func read(d disk, p []byte, off int64) error {
	_, err := d.ReadAt(p, off)
	return err
}

func write(d disk, p []byte, off int64) error {
	_, err := d.WriteAt(p, off)
	return err
}

func writeFlush(d disk, p []byte, off int64) error {
	if err := write(d, p, off); err != nil {
		return err
	}
	return d.Flush()
}

// verify compares a part of the disk, so that what is measured is known to work. It also opens the packs of snapshots.
func (s *subject) verify(b *testing.B) {
	b.Helper()
	d := s.filled(b)
	p := make([]byte, blockBytes)
	for _, block := range rand.New(rand.NewPCG(seed, 2)).Perm(len(s.generation))[:blocksChecked] {
		off := int64(block) * blockBytes
		check(b, read(d, p, off))
		s.compare(b, p, off)
	}
	check(b, d.Close())
}

// end flushes and closes a disk; neither is measured.
func end(b *testing.B, d disk) {
	b.Helper()
	check(b, d.Flush())
	check(b, d.Close())
}

// stream goes through a part of the disk in ascending order.
func (s *subject) stream(b *testing.B, open func(b *testing.B) disk, do access) {
	rnd := rand.New(rand.NewPCG(seed, 3))
	p := make([]byte, streamUnit)
	s.fill(p, 0)
	b.SetBytes(streamBytes)
	for b.Loop() {
		b.StopTimer()
		d := open(b)
		off := rnd.Int64N(diskBytes-streamBytes) / streamUnit * streamUnit
		stop := off + streamBytes
		b.StartTimer()
		for ; off < stop; off += streamUnit {
			check(b, do(d, p, off))
		}
		b.StopTimer()
		end(b, d)
		b.StartTimer()
	}
	b.ReportMetric(0, "ns/op")
}

// random makes n requests to different blocks at random. If there are several accesses, then all blocks get the first before any
// gets the second, and the last is what is measured.
func (s *subject) random(b *testing.B, open func(b *testing.B) disk, n int, accesses ...access) {
	rnd := rand.New(rand.NewPCG(seed, 4))
	p := make([]byte, blockBytes)
	s.fill(p, 0)
	var all latencies
	for b.Loop() {
		b.StopTimer()
		d := open(b)
		blocks := rnd.Perm(len(s.generation))[:n]
		var took latencies
		b.StartTimer()
		for _, do := range accesses {
			took = took[:0]
			for _, block := range blocks {
				began := time.Now()
				check(b, do(d, p, int64(block)*blockBytes))
				took = append(took, time.Since(began))
			}
		}
		b.StopTimer()
		all = append(all, took...)
		end(b, d)
		b.StartTimer()
	}
	all.report(b)
}

// hot reads one block again and again that is not in the base image, if there is such a block.
func (s *subject) hot(b *testing.B) {
	off := int64(max(0, slices.Index(s.generation, 1))) * blockBytes
	p := make([]byte, blockBytes)
	var all latencies
	for b.Loop() {
		b.StopTimer()
		d := s.filled(b)
		check(b, read(d, p, off))
		b.StartTimer()
		for range accesses {
			began := time.Now()
			check(b, read(d, p, off))
			all = append(all, time.Since(began))
		}
		b.StopTimer()
		s.compare(b, p, off)
		end(b, d)
		b.StartTimer()
	}
	all.report(b)
}

type latencies []time.Duration

func (l latencies) quantile(p float64) float64 {
	slices.Sort(l)
	return float64(l[int(p*float64(len(l)-1))].Nanoseconds()) / 1e3
}

func (l latencies) report(b *testing.B) {
	var sum time.Duration
	for _, d := range l {
		sum += d
	}
	b.ReportMetric(float64(len(l))/sum.Seconds(), "IOPS")
	b.ReportMetric(l.quantile(0.5), "p50-us")
	b.ReportMetric(l.quantile(0.99), "p99-us")
	b.ReportMetric(0, "ns/op")
}

// BenchmarkDiskPause measures from the start of a snapshot until it is durable: of a disk of which 1 GiB, a random half, was
// written, and of a memory of 16 MiB.
func BenchmarkDiskPause(b *testing.B) {
	l := newDiskLab(b)
	o, _ := l.overlay(b, l.base, pausedDisk)
	l.rewriteHalf(b, o, pausedDisk)
	memory := make([]byte, pausedMemory)
	c := l.contents(pausedMemory)
	c.fill(memory, 0)
	const gib = float64(pausedDisk/2) / (1 << 30)
	b.Run("1GiB", func(b *testing.B) {
		var took, processors time.Duration
		var info snapshot.Info
		for b.Loop() {
			began, used := time.Now(), processorTime()
			info = l.pause(b, o, nil, memory)
			took, processors = took+time.Since(began), processors+processorTime()-used
			b.StopTimer()
			check(b, l.store.Delete(b.Context(), info.ID))
			b.StartTimer()
		}
		b.ReportMetric(took.Seconds()/float64(b.N)/gib, "s/GiB")
		b.ReportMetric(processors.Seconds()/float64(b.N)/gib, "cpu-s/GiB")
		b.ReportMetric(float64(pausedDisk/2+pausedMemory)/float64(info.StoredBytes), "stored-ratio")
		b.ReportMetric(0, "ns/op")
	})
	check(b, o.Remove())
}

// processorTime is what the process has used of the processors: what to compare on a machine that is shared.
func processorTime() time.Duration {
	var u unix.Rusage
	_ = unix.Getrusage(unix.RUSAGE_SELF, &u) // can't fail with these arguments
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkDiskFirstRead measures from the opening of a snapshot until a block of its disk has been read at a random place
// (first), and that read alone (read): the snapshots of BenchmarkDisk, opened anew for each read.
func BenchmarkDiskFirstRead(b *testing.B) {
	l := newDiskLab(b)
	for _, depth := range []int{1, generations} {
		b.Run("snapshot-"+strconv.Itoa(depth), func(b *testing.B) {
			c, id := l.chain(b, depth)
			b.Run("4k", func(b *testing.B) { l.firstReads(b, c, id) })
		})
	}
}

func (l *diskLab) firstReads(b *testing.B, c contents, id snapshot.ID) {
	p := make([]byte, blockBytes)
	var first, reads latencies
	for b.Loop() {
		for range firstReads {
			off := l.rnd.Int64N(diskBytes/blockBytes) * blockBytes
			began := time.Now()
			r := l.open(b, id)
			d := l.over(b, r)
			opened := time.Now()
			check(b, read(d, p, off))
			done := time.Now()
			first, reads = append(first, done.Sub(began)), append(reads, done.Sub(opened))
			b.StopTimer()
			c.compare(b, p, off)
			check(b, d.Close())
			check(b, r.Close())
			b.StartTimer()
		}
	}
	b.ReportMetric(first.quantile(0.5), "first-p50-us")
	b.ReportMetric(first.quantile(0.99), "first-p99-us")
	b.ReportMetric(reads.quantile(0.5), "read-p50-us")
	b.ReportMetric(reads.quantile(0.99), "read-p99-us")
	b.ReportMetric(0, "ns/op")
}
