package testvm

import (
	"bytes"
	"hash/maphash"
	"slices"

	"github.com/cryovisor/cryovisor/internal/lz4block"
)

// SurveyChunk is the guest memory that a snapshot compresses at a time.
const SurveyChunk = 128 << 10

// Survey counts what memory consists of, and what a snapshot would store of it. The zero value is ready.
type Survey struct {
	Pages, Zero uint64
	Repeated    uint64 // pages that are not zero and equal to one that came before
	Stored      uint64 // bytes of the LZ4 blocks of all pages that are not zero
	StoredOnce  uint64 // the same without those that repeat

	seed      maphash.Seed
	seen      map[uint64]bool
	all, once []byte // of a chunk
	block     []byte
	encoder   lz4block.Encoder
}

var zeroPage [pageSize]byte

// Add takes more memory, whole pages.
func (s *Survey) Add(mem []byte) {
	if s.seen == nil {
		s.seed, s.seen = maphash.MakeSeed(), map[uint64]bool{}
		s.block = make([]byte, lz4block.Bound(SurveyChunk))
	}
	for chunk := range slices.Chunk(mem, SurveyChunk) {
		s.all, s.once = s.all[:0], s.once[:0]
		for page := range slices.Chunk(chunk, pageSize) {
			s.page(page)
		}
		s.Stored += s.encoded(s.all)
		s.StoredOnce += s.encoded(s.once)
	}
}

func (s *Survey) page(page []byte) {
	s.Pages++
	if bytes.Equal(page, zeroPage[:]) {
		s.Zero++
		return
	}
	s.all = append(s.all, page...)
	// Two pages in 2^64 that only have the same hash make no difference here.
	sum := maphash.Bytes(s.seed, page)
	if s.seen[sum] {
		s.Repeated++
		return
	}
	s.seen[sum] = true
	s.once = append(s.once, page...)
}

// encoded is the size of a chunk that is compressed if that saves something.
func (s *Survey) encoded(chunk []byte) uint64 {
	return uint64(min(s.encoder.Encode(s.block, chunk), len(chunk)))
}

// Report reports the survey as metrics of a benchmark: the memory in MiB, zero pages as a share of it, the ratio of the rest,
// pages that repeat as a share of that rest, and what storing those once saves of what is stored.
func (s *Survey) Report(b interface{ ReportMetric(n float64, unit string) }) {
	rest := max(s.Pages-s.Zero, 1)
	b.ReportMetric(float64(s.Pages*pageSize)/(1<<20), "MiB")
	b.ReportMetric(percent(s.Zero, s.Pages), "zero-%")
	b.ReportMetric(float64(rest*pageSize)/float64(max(s.Stored, 1)), "lz4-ratio")
	b.ReportMetric(percent(s.Repeated, rest), "repeated-%")
	b.ReportMetric(percent(s.Stored-s.StoredOnce, s.Stored), "saved-%")
	b.ReportMetric(0, "ns/op")
}

func percent(part, whole uint64) float64 { return 100 * float64(part) / float64(max(whole, 1)) }
