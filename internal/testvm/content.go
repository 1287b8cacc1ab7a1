package testvm

import (
	"encoding/binary"
	"os"
	"strconv"
)

// Corpus is content that resembles the memory of a running system: zero pages,
// program text and data, text, and heaps. Pages come in runs, as they do there, and no two
// pages that are not zero are equal. It is a pure function of its seed and its
// corpus and keeps no state, so any process can make any page of it again.
type Corpus struct {
	seed  uint64
	banks [3][]byte // program, text, heap: whole pages
}

// Proportions, in 1/256 of the runs; what remains is heap.
const (
	runZero    = 60 // and one page in 64 of the others
	runProgram = 59
	runText    = 40

	contentRun = 16 // pages
	bankSize   = 4 << 20
)

// NewCorpus returns the content of a seed. corpus is the program part: any bytes,
// at least a page of them, which are kept and must not change. Without one, there
// is more text and heap instead.
func NewCorpus(seed uint64, corpus []byte) *Corpus {
	c := &Corpus{seed: seed}
	c.banks[0] = corpus[:len(corpus)&^(pageSize-1)]
	c.banks[1] = makeText(bankSize)
	c.banks[2] = makeHeap(bankSize)
	return c
}

// ProgramCorpus is the file of the running program: every process of the same
// program gets the same.
func ProgramCorpus() ([]byte, error) {
	path, err := os.Executable()
	if err != nil {
		return nil, err
	}
	return os.ReadFile(path)
}

// Page implements Content.
func (c *Corpus) Page(page uint64, dst []byte) bool {
	run := scramble(c.seed + page/contentRun*multiplier)
	kind := run & 255
	id := scramble(c.seed ^ page*xorshiftMu)
	if kind < runZero || id&63 == 0 {
		clear(dst)
		return false
	}
	bank := c.banks[2]
	switch {
	case kind < runZero+runProgram && len(c.banks[0]) > 0:
		bank = c.banks[0]
	case kind < runZero+runProgram+runText:
		bank = c.banks[1]
	}
	pages := uint64(len(bank) / pageSize)
	at := (run>>8%pages + page%contentRun) % pages
	copy(dst, bank[at*pageSize:][:pageSize])
	// The words that make this page differ from its origin.
	binary.LittleEndian.PutUint64(dst[id>>6%512*8:], id)
	return true
}

// makeText makes lines like those of logs and sources: phrases of an invented
// language, some much more often than others, and numbers.
func makeText(size int) []byte {
	r := splitmix(1)
	phrases := make([][]byte, 1024)
	for i := range phrases {
		for range 2 + r.next()%6 {
			for range 2 + r.next()%9 {
				phrases[i] = append(phrases[i], "etaoinshrdlucmfwypvbgk"[min(r.next()%22, r.next()%22)])
			}
			phrases[i] = append(phrases[i], ' ')
		}
	}
	b := make([]byte, 0, size+256)
	for len(b) < size {
		for range 1 + r.next()%3 {
			// A product of uniform numbers prefers low ranks, like Zipf's law.
			n := r.next() % 1024 * (r.next() % 1024) >> 10 * (r.next() % 1024) >> 10
			b = append(b, phrases[n]...)
		}
		b = strconv.AppendUint(b, r.next()>>(48+r.next()%16), 10)
		b = append(b, '\n')
	}
	return b[:size]
}

// makeHeap makes objects of a few types: pointers near each other, lengths,
// small numbers, flags, and a few bytes that can't be foretold.
func makeHeap(size int) []byte {
	r := splitmix(2)
	b := make([]byte, 0, size+256)
	le := binary.LittleEndian
	for len(b) < size {
		arena := 0x7f0000000000 | r.next()&0xffff<<24
		kind := 0x5555_0000_0000 | r.next()&0xfff<<6
		shape := r.next()
		for range 16 + r.next()%64 { // objects of one type side by side
			b = le.AppendUint64(b, kind)
			for field := range 2 + shape&3 {
				q := r.next()
				switch shape >> (4 + 3*field) & 7 {
				case 0:
					b = le.AppendUint64(b, arena|q&0xffff0)
				case 2:
					b = le.AppendUint64(b, q&0x3f)
				case 3:
					b = le.AppendUint64(b, arena)
				case 4:
					b = le.AppendUint64(b, q>>(q&0x38))
				default:
					b = le.AppendUint64(b, 0)
				}
			}
		}
	}
	return b[:size]
}
