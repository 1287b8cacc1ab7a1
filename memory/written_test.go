package memory_test

import (
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"

	"github.com/cryovisor/cryovisor/memory"
)

// expectWrites wants exactly these pages to be noted, and none a second time.
func expectWrites(t *testing.T, m *memory.Memory, want ...memory.Range) {
	t.Helper()
	if got := m.TakeWrites(); !slices.Equal(got, want) {
		t.Errorf("written pages %x, want %x", got, want)
	}
	if again := m.TakeWrites(); again != nil {
		t.Errorf("%x were taken already", again)
	}
}

func write(t *testing.T, m *memory.Memory, gpa, n uint64) {
	t.Helper()
	if _, err := m.WriteAt(make([]byte, n), int64(gpa)); err != nil {
		t.Fatal(err)
	}
}

func discard(t *testing.T, m *memory.Memory, gpa, n uint64) {
	t.Helper()
	if err := m.Discard(gpa, n); err != nil {
		t.Fatal(err)
	}
}

func note(t *testing.T, m *memory.Memory, r memory.Range, log []uint64) {
	t.Helper()
	if err := m.NoteWrites(r, log); err != nil {
		t.Fatal(err)
	}
}

func TestTakeWrites(t *testing.T) {
	m := newCold(t, 5*gib+3*page, memory.Options{SmallPages: true})
	high := memory.Range{GPA: 4 * gib, Len: 2*gib + 3*page}
	log := make([]uint64, high.Len/page/64+1)
	write(t, m, 0, page)
	discard(t, m, 0, page)
	note(t, m, high, log)
	expectWrites(t, m) // nothing is tracked
	m.TrackWrites(true)
	expectWrites(t, m)

	write(t, m, 0, 1)
	write(t, m, 2*page-1, 2)       // the ends of two pages
	write(t, m, 63*page, 2*page)   // two words of the bitmap
	write(t, m, 128*page, 64*page) // a whole word
	write(t, m, 300*page+7, 0)     // nothing
	write(t, m, 3*gib-page, page)  // the last before the hole
	write(t, m, 4*gib, 8)          // and the first after it
	write(t, m, 6*gib+3*page-1, 1) // the last byte
	m.TrackWrites(true)            // forgets nothing
	loadWord(t, m, mib)            // a read
	if _, err := m.WriteAt(make([]byte, 2), 3*gib-1); err == nil {
		t.Error("a write into the hole")
	}
	expectWrites(t, m,
		memory.Range{GPA: 0, Len: 3 * page},
		memory.Range{GPA: 63 * page, Len: 2 * page},
		memory.Range{GPA: 128 * page, Len: 64 * page},
		memory.Range{GPA: 3*gib - page, Len: page},
		memory.Range{GPA: 4 * gib, Len: page},
		memory.Range{GPA: 6*gib + 2*page, Len: page})

	discard(t, m, 10*page+1, 3*page) // two whole pages
	discard(t, m, 20*page+1, page)   // none
	expectWrites(t, m, memory.Range{GPA: 11 * page, Len: 2 * page})

	write(t, m, 0, 1)
	m.TrackWrites(false)
	expectWrites(t, m)
	write(t, m, page, 1)
	m.TrackWrites(true)
	expectWrites(t, m) // of before
}

func TestNoteWrites(t *testing.T) {
	m := newCold(t, 5*gib+3*page, memory.Options{SmallPages: true})
	m.TrackWrites(true)
	low, high := m.Ranges()[0], m.Ranges()[1]
	log := make([]uint64, low.Len/page/64)
	log[0], log[1], log[len(log)-1] = 1<<63|0b1011, 1, 1<<63
	note(t, m, low, log)
	log = make([]uint64, high.Len/page/64+1)
	log[0], log[len(log)-1] = 1, 0b111
	note(t, m, high, log)
	write(t, m, 2*page, 1) // joins what is on both sides
	expectWrites(t, m,
		memory.Range{GPA: 0, Len: 4 * page},
		memory.Range{GPA: 63 * page, Len: 2 * page},
		memory.Range{GPA: 3*gib - page, Len: page},
		memory.Range{GPA: 4 * gib, Len: page},
		memory.Range{GPA: 6 * gib, Len: 3 * page})

	for _, r := range []memory.Range{
		{GPA: low.GPA, Len: low.Len + page},
		{GPA: high.GPA - page, Len: page},
		{GPA: high.GPA + page, Len: high.Len - page},
		{GPA: high.GPA, Len: high.Len - 3*page},
	} {
		var bad *memory.RangeError
		if err := m.NoteWrites(r, log); !errors.As(err, &bad) {
			t.Errorf("%d words for %x: %v, want a RangeError", len(log), r, err)
		}
	}
	expectWrites(t, m)
}

// The runs of pages that TestTakeWritesMissesNothing writes, with as much between
// two of them that nobody touches. Several share a word of the bitmap, and their
// writers don't wait for each other.
const (
	runLen    = 4 * page
	runStride = 2 * runLen
)

// Several goroutines write and discard runs of pages, each its own, while another
// one keeps a copy of their last words, which it brings up to date with what
// TakeWrites says and nothing else. Whenever all is quiet, the copy is right; and
// no page is in an answer that nobody touches.
func TestTakeWritesMissesNothing(t *testing.T) {
	const writers, runs = 4, 8
	rounds := 2000
	if testing.Short() {
		rounds = 400
	}
	m := newCold(t, writers*runs*runStride, memory.Options{SmallPages: true})
	m.TrackWrites(true)
	mirror := make(map[uint64]uint64) // by address of the run
	for round := range rounds {
		var wg sync.WaitGroup
		for w := range uint64(writers) {
			wg.Go(func() {
				rng := rand.New(rand.NewPCG(uint64(round), w))
				for _, i := range rng.Perm(runs) {
					if err := change(rng, m, (uint64(i)*writers+w)*runStride, uint64(round)); err != nil {
						t.Error(err)
					}
				}
			})
		}
		quiet := make(chan struct{})
		go func() { wg.Wait(); close(quiet) }()
		follow(t, m, mirror, quiet)
		for gpa := uint64(0); gpa < m.Size(); gpa += runStride {
			if got := lastWord(t, m, gpa); got != mirror[gpa] {
				t.Fatalf("round %d: the run at %#x ends with %d, the copy with %d", round, gpa, got, mirror[gpa])
			}
		}
	}
}

// change writes a run or its last word, or at times discards it. With the race
// detector, which knows nothing of what TakeWrites promises, it writes words only.
func change(rng *rand.Rand, m *memory.Memory, gpa, value uint64) error {
	if rng.IntN(10) == 0 {
		return m.Discard(gpa, runLen)
	}
	p := make([]byte, runLen)
	if raceEnabled || rng.IntN(2) == 0 {
		p = p[:8]
	}
	binary.LittleEndian.PutUint64(p[len(p)-8:], value)
	_, err := m.WriteAt(p, int64(gpa+runLen)-int64(len(p)))
	return err
}

// follow brings the copy up to date until all is quiet, and then once more.
func follow(t *testing.T, m *memory.Memory, mirror map[uint64]uint64, quiet <-chan struct{}) {
	t.Helper()
	for last := false; !last; {
		select {
		case <-quiet:
			last = true
		default:
		}
		for _, r := range m.TakeWrites() {
			gpa := r.GPA / runStride * runStride
			if r.End() != gpa+runLen {
				t.Errorf("%x is no run, nor the end of one", r)
			}
			mirror[gpa] = lastWord(t, m, gpa)
		}
	}
}

func lastWord(t *testing.T, m *memory.Memory, gpa uint64) uint64 {
	t.Helper()
	return loadWord(t, m, gpa+runLen-8)
}

func loadWord(t *testing.T, m *memory.Memory, gpa uint64) uint64 {
	t.Helper()
	word := make([]byte, 8)
	if _, err := m.ReadAt(word, int64(gpa)); err != nil {
		t.Fatal(err)
	}
	return binary.LittleEndian.Uint64(word)
}
