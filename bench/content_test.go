//go:build linux && amd64

package bench

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/maphash"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"filippo.io/age"
	"golang.org/x/sys/unix"

	"github.com/cryovisor/cryovisor/internal/lz4block"
	"github.com/cryovisor/cryovisor/internal/testvm"
)

const (
	corpusBytes = 1 << 30
	mostContent = 2 << 30 // that is looked at of another source
)

// BenchmarkContent says what memory is made of, and what it costs to find pages that are stored already. The memory is that
// of the benchmarks' guests, and what $CRYOVISOR_BENCH_MEMORY lists, separated by colons: numbers of processes, files with
// memory, and directories, whose files are what the page cache would have of them.
func BenchmarkContent(b *testing.B) {
	program, err := testvm.ProgramCorpus()
	check(b, err)
	b.Run("corpus", func(b *testing.B) {
		c, mem := testvm.NewCorpus(seed, program), make([]byte, corpusBytes)
		for at := 0; at < len(mem); at += blockBytes {
			c.Page(uint64(at/blockBytes), mem[at:][:blockBytes])
		}
		benchContent(b, mem)
	})
	for _, source := range filepath.SplitList(os.Getenv("CRYOVISOR_BENCH_MEMORY")) {
		b.Run(filepath.Base(source), func(b *testing.B) {
			mem, err := readContent(source)
			check(b, err)
			benchContent(b, mem)
		})
	}
}

func readContent(source string) (mem []byte, err error) {
	if pid, err := strconv.Atoi(source); err == nil {
		return processMemory(pid)
	}
	links := map[uint64]bool{} // to files that were read
	err = filepath.WalkDir(source, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		inode := info.Sys().(*syscall.Stat_t).Ino
		if links[inode] {
			return nil
		}
		links[inode] = true
		data, err := os.ReadFile(path)
		if mem = append(mem, data...); len(mem) > mostContent {
			mem = mem[:mostContent]
			return fs.SkipAll
		}
		mem = append(mem, make([]byte, -len(mem)&(blockBytes-1))...)
		return err
	})
	return mem, err
}

// processMemory is all memory of a process that is there, files that it maps included.
func processMemory(pid int) (mem []byte, err error) {
	dir := fmt.Sprintf("/proc/%d/", pid)
	maps, err := os.ReadFile(dir + "maps")
	if err != nil {
		return nil, err
	}
	from, err := os.Open(dir + "mem")
	if err != nil {
		return nil, err
	}
	defer from.Close()
	pagemap, err := os.Open(dir + "pagemap")
	if err != nil {
		return nil, err
	}
	defer pagemap.Close()
	page, entry := make([]byte, blockBytes), make([]byte, 8)
	for line := range strings.Lines(string(maps)) {
		var start, end uint64
		if _, err := fmt.Sscanf(line, "%x-%x", &start, &end); err != nil {
			return nil, err
		}
		for ; start < end && len(mem) < mostContent; start += blockBytes {
			const present = 1 << 63
			if _, err := pagemap.ReadAt(entry, int64(start/blockBytes*8)); err != nil || binary.LittleEndian.Uint64(entry)&present == 0 {
				continue // the kernel's own pages have no entry
			}
			if _, err := from.ReadAt(page, int64(start)); err == nil { // else: a device's
				mem = append(mem, page...)
			}
		}
	}
	return mem, nil
}

// benchContent measures in processor time for each GiB that is not zero.
func benchContent(b *testing.B, mem []byte) {
	var s testvm.Survey
	s.Add(mem)
	b.Run("survey", func(b *testing.B) { s.Report(b) })
	image, err := os.CreateTemp("/dev/shm", "cryovisor-bench-")
	check(b, err)
	defer image.Close()
	check(b, os.Remove(image.Name()))
	_, err = image.Write(mem)
	check(b, err)
	for _, way := range []struct {
		name string
		do   func(b *testing.B)
	}{
		{"store", func(b *testing.B) { check(b, store(mem, 0, len(mem), nil)) }},
		{"hash", func(*testing.B) { hashPages(mem) }},
		{"store-once", func(b *testing.B) { check(b, store(mem, 0, len(mem), newSeen(mem))) }},
		{"store-once-by-two", func(b *testing.B) { storeByTwo(b, mem) }},
		{"compare", func(b *testing.B) { comparePages(b, mem, image) }},
		{"compare-mapped", func(b *testing.B) { compareMapped(b, mem, image) }},
	} {
		b.Run(way.name, func(b *testing.B) {
			began := processorTime()
			for b.Loop() {
				way.do(b)
			}
			took := processorTime() - began
			gib := float64(s.Pages-s.Zero) * blockBytes / (1 << 30)
			b.ReportMetric(float64(took.Microseconds())/1000/float64(b.N)/gib, "cpu-ms/GiB")
			b.ReportMetric(0, "ns/op")
		})
	}
}

// seen are the pages that were stored, for several workers.
type seen struct {
	mem    []byte
	seed   maphash.Seed
	shards [256]struct {
		mu sync.Mutex
		at map[uint64]int // in mem, by hash
	}
}

func newSeen(mem []byte) *seen {
	s := &seen{mem: mem, seed: maphash.MakeSeed()}
	for i := range s.shards {
		s.shards[i].at = make(map[uint64]int, len(mem)/blockBytes/len(s.shards))
	}
	return s
}

// has tells whether the page at an offset was stored, and notes that it is.
func (s *seen) has(at int) bool {
	page := s.mem[at:][:blockBytes]
	sum := maphash.Bytes(s.seed, page)
	shard := &s.shards[sum%uint64(len(s.shards))]
	shard.mu.Lock()
	first, ok := shard.at[sum]
	if !ok {
		shard.at[sum] = at
	}
	shard.mu.Unlock()
	return ok && bytes.Equal(page, s.mem[first:][:blockBytes])
}

var zeros [blockBytes]byte

// store does to a part of memory what a pause does but for the writing, and with s to each page once.
func store(mem []byte, from, to int, s *seen) error {
	key, err := age.GenerateX25519Identity()
	if err != nil {
		return err
	}
	pack, err := age.Encrypt(io.Discard, key.Recipient())
	if err != nil {
		return err
	}
	var encoder lz4block.Encoder
	plain := make([]byte, 0, testvm.SurveyChunk)
	block := make([]byte, lz4block.Bound(testvm.SurveyChunk))
	for ; from < to; from += testvm.SurveyChunk {
		plain = plain[:0]
		for at := from; at < min(from+testvm.SurveyChunk, to); at += blockBytes {
			if page := mem[at:][:blockBytes]; !bytes.Equal(page, zeros[:]) && (s == nil || !s.has(at)) {
				plain = append(plain, page...)
			}
		}
		if len(plain) == 0 {
			continue
		}
		if _, err := pack.Write(block[:encoder.Encode(block, plain)]); err != nil {
			return err
		}
	}
	return pack.Close()
}

// storeByTwo is store by two workers, each with a half.
func storeByTwo(b *testing.B, mem []byte) {
	s, half := newSeen(mem), len(mem)/2&^(testvm.SurveyChunk-1)
	errs := make(chan error, 2)
	go func() { errs <- store(mem, 0, half, s) }()
	go func() { errs <- store(mem, half, len(mem), s) }()
	check(b, <-errs)
	check(b, <-errs)
}

// hashPages hashes what is not zero.
func hashPages(mem []byte) {
	seed := maphash.MakeSeed()
	for at := 0; at < len(mem); at += blockBytes {
		if page := mem[at:][:blockBytes]; !bytes.Equal(page, zeros[:]) {
			maphash.Bytes(seed, page)
		}
	}
}

// comparePages compares what is not zero with an image that holds the same.
func comparePages(b *testing.B, mem []byte, image io.ReaderAt) {
	b.Helper()
	was := make([]byte, blockBytes)
	for at := 0; at < len(mem); at += blockBytes {
		page := mem[at:][:blockBytes]
		if bytes.Equal(page, zeros[:]) {
			continue
		}
		_, err := image.ReadAt(was, int64(at))
		check(b, err)
		if !bytes.Equal(page, was) {
			b.Fatalf("the image differs at %d", at)
		}
	}
}

// compareMapped is comparePages with the image mapped anew.
func compareMapped(b *testing.B, mem []byte, image *os.File) {
	b.Helper()
	mapped, err := unix.Mmap(int(image.Fd()), 0, len(mem), unix.PROT_READ, unix.MAP_SHARED)
	check(b, err)
	for at := 0; at < len(mem); at += blockBytes {
		page := mem[at:][:blockBytes]
		if !bytes.Equal(page, zeros[:]) && !bytes.Equal(page, mapped[at:][:blockBytes]) {
			b.Fatalf("the image differs at %d", at)
		}
	}
	check(b, unix.Munmap(mapped))
}
