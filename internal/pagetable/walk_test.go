package pagetable_test

import (
	"encoding/binary"
	"errors"
	"io"
	"reflect"
	"slices"
	"testing"

	"github.com/cryovisor/cryovisor/internal/pagetable"
)

const (
	page = 4096

	present = 1
	large   = 1 << 7
	noExec  = 1 << 63

	kernelBase = 0xffff_8000_0000_0000
	everything = 1 << 30 // as a limit
)

// paging4 and paging5 are roots at address 0 with 4 and 5 levels.
var (
	paging4 = pagetable.Root{CR0: 1<<31 | 1, CR4: 1 << 5, EFER: 1<<10 | 1<<8}
	paging5 = pagetable.Root{CR0: 1<<31 | 1, CR4: 1<<5 | 1<<12, EFER: 1<<10 | 1<<8}
)

// at is r with its first table elsewhere.
func at(r pagetable.Root, cr3 uint64) pagetable.Root {
	r.CR3 = cr3
	return r
}

// guest is memory that begins at address 0.
type guest []byte

func (g guest) ReadAt(p []byte, gpa int64) (int, error) {
	if gpa < 0 || gpa >= int64(len(g)) {
		return 0, io.EOF
	}
	return copy(p, g[gpa:]), nil
}

// set writes an entry of the table at gpa.
func (g guest) set(table uint64, index int, entry uint64) {
	binary.LittleEndian.PutUint64(g[table+uint64(index)*8:], entry)
}

func (g guest) ram() []pagetable.Range { return []pagetable.Range{{Len: uint64(len(g))}} }

func walk(t *testing.T, mem io.ReaderAt, ram []pagetable.Range, limits pagetable.Limits, roots ...pagetable.Root) ([]pagetable.Mapping, bool) {
	t.Helper()
	got, complete, err := pagetable.Walk(mem, ram, roots, limits)
	if err != nil {
		t.Fatal(err)
	}
	return got, complete
}

var unlimited = pagetable.Limits{Tables: everything, Mappings: everything}

// check walks g with all of it being memory.
func (g guest) check(t *testing.T, want []pagetable.Mapping, roots ...pagetable.Root) {
	t.Helper()
	got, complete := walk(t, g, g.ram(), unlimited, roots...)
	if !complete || !reflect.DeepEqual(got, want) {
		t.Errorf("got %#x, complete %v\nwant %#x", got, complete, want)
	}
}

// fourLevels has a table of each level: at 0x1000 the first, and so on to 0x4000, on the path of address 0.
func fourLevels() guest {
	g := make(guest, 16*page)
	g.set(0x1000, 0, 0x2000|present)
	g.set(0x2000, 0, 0x3000|present)
	g.set(0x3000, 0, 0x4000|present)
	return g
}

func TestSmallPages(t *testing.T) {
	g := fourLevels()
	g.set(0x4000, 1, 0x6000|present|noExec|0xe66) // all that is not the address is no part of it
	g.set(0x4000, 2, 0x7000|present)              // continues it
	g.set(0x4000, 3, 0x7000|present)              // an alias
	g.set(0x4000, 4, 0x8000)                      // not present
	g.set(0x4000, 5, 0x9000|present|large)        // bit 7 is PAT here
	g.set(0x4000, 6, 0x10000|present)             // not memory
	g.set(0x4000, 511, 0xf000|present)
	g.check(t, []pagetable.Mapping{
		{Linear: 0x1000, GPA: 0x6000, Len: 2 * page},
		{Linear: 0x3000, GPA: 0x7000, Len: page},
		{Linear: 0x5000, GPA: 0x9000, Len: page},
		{Linear: 0x1ff000, GPA: 0xf000, Len: page},
	}, at(paging4, 0x1000|1<<63|0xfff)) // PCID, and the bit that keeps translations
}

func TestCanonicalAddresses(t *testing.T) {
	g := fourLevels()
	g.set(0x1000, 255, 0x2000|present)
	g.set(0x1000, 256, 0x2000|present)
	g.set(0x1000, 511, 0x2000|present)
	g.set(0x4000, 0, 0x6000|present)
	g.check(t, []pagetable.Mapping{
		{Linear: 0, GPA: 0x6000, Len: page},
		{Linear: 0x7f80_0000_0000, GPA: 0x6000, Len: page},
		{Linear: kernelBase, GPA: 0x6000, Len: page},
		{Linear: 0xffff_ff80_0000_0000, GPA: 0x6000, Len: page},
	}, at(paging4, 0x1000))
	g.set(0x5000, 0, 0x1000|present)
	g.set(0x5000, 256, 0x1000|present)
	got, _ := walk(t, g, g.ram(), unlimited, at(paging5, 0x5000))
	if len(got) != 8 || got[2].Linear != 0x8000_0000_0000 || got[4].Linear != 0xff00_0000_0000_0000 || got[7].Linear != 0xff00_ff80_0000_0000 {
		t.Errorf("5 levels: %#x", got)
	}
}

// TestEndOfAddressSpace maps the last page that there is.
func TestEndOfAddressSpace(t *testing.T) {
	g := make(guest, 16*page)
	for table := range uint64(3) {
		g.set((table+1)*page, 511, (table+2)*page|present)
	}
	g.set(0x4000, 510, 0x7000|present)
	g.set(0x4000, 511, 0x8000|present)
	other := at(paging4, 0x9000)
	g.set(0x9000, 511, 0xa000|present)
	g.set(0xa000, 511, 0xb000|present)
	g.set(0xb000, 511, 0xc000|present)
	g.set(0xc000, 509, 0x1000|present)
	g.set(0xc000, 511, 0x2000|present)
	g.check(t, []pagetable.Mapping{
		{Linear: ^uint64(0) - 3*page + 1, GPA: 0x1000, Len: page},
		{Linear: ^uint64(0) - 2*page + 1, GPA: 0x7000, Len: 2 * page},
	}, at(paging4, 0x1000), other)
}

// sparse is memory of any size that holds what is in a guest, and zeros.
type sparse struct{ guest }

func (s sparse) ReadAt(p []byte, gpa int64) (int, error) {
	clear(p)
	if gpa < int64(len(s.guest)) {
		return s.guest.ReadAt(p, gpa)
	}
	return len(p), nil
}

func TestLargePages(t *testing.T) {
	const gib, mib = 1 << 30, 1 << 20
	g := fourLevels()
	g.set(0x2000, 1, gib|present|large)
	g.set(0x2000, 2, 2*gib|present|large|1<<12)    // PAT, not an address; and of the last 1.5 GiB only the first is memory
	g.set(0x2000, 3, gib|2*mib|present|large)      // reserved bits
	g.set(0x2000, 4, 3*gib|present|large)          // no memory but its end
	g.set(0x3000, 1, 512*mib|present|large|1<<12)  // with PAT
	g.set(0x3000, 2, 512*mib|page*2|present|large) // reserved bits
	g.set(0x3000, 3, 514*mib|present|large)
	g.set(0x1000, 1, present|large) // reserved
	ram := []pagetable.Range{{GPA: 0, Len: 2*gib + gib/2}, {GPA: 4*gib - page, Len: gib}}
	got, complete := walk(t, sparse{g}, ram, unlimited, at(paging4, 0x1000))
	want := []pagetable.Mapping{
		{Linear: 2 * mib, GPA: 512 * mib, Len: 2 * mib},
		{Linear: 6 * mib, GPA: 514 * mib, Len: 2 * mib},
		{Linear: gib, GPA: gib, Len: gib + gib/2},
		{Linear: 5*gib - page, GPA: 4*gib - page, Len: page},
	}
	if !complete || !reflect.DeepEqual(got, want) {
		t.Errorf("got %#x, complete %v\nwant %#x", got, complete, want)
	}
}

// TestFirstRootComesFirst: what the first address space maps is not what the second says, which has the rest.
func TestFirstRootComesFirst(t *testing.T) {
	g := make(guest, 32*page)
	for _, first := range []uint64{0x1000, 0x5000} {
		for table := first; table < first+0x3000; table += page {
			g.set(table, 0, table+page|present)
		}
	}
	for _, i := range []int{2, 3, 4, 8} {
		g.set(0x4000, i, uint64(16+i)*page|present)
	}
	for i := range 7 {
		g.set(0x8000, i, uint64(24+i)*page|present)
	}
	roots := []pagetable.Root{at(paging4, 0x1000), at(paging4, 0x5000), at(paging4, 0x1000)}
	counted := &counter{guest: g}
	walk(t, counted, g.ram(), unlimited, roots...)
	if counted.reads != 2*(4+1) {
		t.Errorf("%d tables are read; each address space has 4, and the first counts for each half", counted.reads)
	}
	g.check(t, []pagetable.Mapping{
		{Linear: 0, GPA: 24 * page, Len: 2 * page},
		{Linear: 2 * page, GPA: 18 * page, Len: 3 * page},
		{Linear: 5 * page, GPA: 29 * page, Len: 2 * page},
		{Linear: 8 * page, GPA: 24 * page, Len: page},
	}, roots...)
	g.check(t, []pagetable.Mapping{
		{Linear: 0, GPA: 24 * page, Len: 7 * page},
		{Linear: 8 * page, GPA: 24 * page, Len: page},
	}, roots[1], roots[0])
}

func TestNoTables(t *testing.T) {
	g := fourLevels()
	g.set(0x4000, 0, 0x6000|present)
	for name, r := range map[string]pagetable.Root{
		"no paging":    {CR3: 0x1000, CR4: 1 << 5, EFER: 1 << 10},
		"32-bit":       {CR0: 1 << 31, CR3: 0x1000},
		"PAE":          {CR0: 1 << 31, CR3: 0x1000, CR4: 1 << 5},
		"behind RAM":   at(paging4, 16*page),
		"far away":     at(paging4, 1<<51),
		"not in a row": at(paging4, 0x10000),
	} {
		t.Run(name, func(t *testing.T) { g.check(t, nil, r) })
	}
}

// TestTablesOutsideOfMemory: nothing is read there, which would be an error here.
func TestTablesOutsideOfMemory(t *testing.T) {
	g := fourLevels()
	g.set(0x4000, 0, 0x6000|present)
	g.set(0x1000, 1, 0x10000|present)
	g.set(0x2000, 1, 0xffff_ffff_f000|present)
	g.set(0x3000, 1, 0x0f_ffff_ffff_f000|present)
	g.check(t, []pagetable.Mapping{{GPA: 0x6000, Len: page}}, at(paging4, 0x1000))
}

// TestReferenceToItself: one entry makes the tables appear as memory, as some systems want it; all of them would take forever.
func TestReferenceToItself(t *testing.T) {
	g := make(guest, 4*page)
	g.set(0x1000, 511, 0x1000|present)
	g.check(t, []pagetable.Mapping{{Linear: ^uint64(0) - page + 1, GPA: 0x1000, Len: page}}, at(paging4, 0x1000))
	for i := range 512 {
		g.set(0x1000, i, 0x1000|present)
	}
	limits := pagetable.Limits{Tables: 1000, Mappings: everything}
	counted := &counter{guest: g}
	got, complete := walk(t, counted, g.ram(), limits, at(paging4, 0x1000))
	if complete || counted.reads != limits.Tables || len(got) == 0 || got[0].Linear != kernelBase {
		t.Errorf("%d tables, complete %v, %d mappings", counted.reads, complete, len(got))
	}
	limits = pagetable.Limits{Tables: 100000, Mappings: 1000}
	if got, complete = walk(t, g, g.ram(), limits, at(paging4, 0x1000)); complete || len(got) != limits.Mappings {
		t.Errorf("complete %v, %d mappings", complete, len(got))
	}
}

type counter struct {
	guest
	reads int
}

func (c *counter) ReadAt(p []byte, gpa int64) (int, error) {
	c.reads++
	return c.guest.ReadAt(p, gpa)
}

// TestKernelBeforeProcesses: a limit is used up by the upper halves of all first.
func TestKernelBeforeProcesses(t *testing.T) {
	g := fourLevels()
	g.set(0x4000, 0, 0x6000|present)
	g.set(0x1000, 256, 0x2000|present)
	g.set(0x5000, 257, 0x2000|present)
	g.set(0x1000, 1, 0x2000|present)
	roots := []pagetable.Root{at(paging4, 0x1000), at(paging4, 0x5000)}
	lower := []pagetable.Mapping{{Linear: 0, GPA: 0x6000, Len: page}, {Linear: 1 << 39, GPA: 0x6000, Len: page}}
	upper := []pagetable.Mapping{{Linear: kernelBase, GPA: 0x6000, Len: page}, {Linear: kernelBase + 1<<39, GPA: 0x6000, Len: page}}
	for limit, want := range map[int][]pagetable.Mapping{
		4: slices.Concat(lower, upper), 3: slices.Concat(lower[:1], upper), 2: upper, 1: upper[:1],
	} {
		got, complete := walk(t, g, g.ram(), pagetable.Limits{Tables: everything, Mappings: limit}, roots...)
		if complete != (limit == 4) || !reflect.DeepEqual(got, want) {
			t.Errorf("limit %d: %#x, complete %v", limit, got, complete)
		}
	}
}

// TestPiecesAreLimited: the second address space is one mapping, and many with the first one taken out. What is walked after it is
// there even so.
func TestPiecesAreLimited(t *testing.T) {
	g := make(guest, 1024*page)
	for _, first := range []uint64{0x1000, 0x5000} {
		g.set(first, 256, first+page|present)
		for table := first + page; table < first+0x3000; table += page {
			g.set(table, 0, table+page|present)
		}
	}
	g.set(0x1000, 0, 0xa000|present)
	g.set(0xa000, 0, 0xb000|present)
	g.set(0xb000, 0, 0xc000|present)
	g.set(0xc000, 0, 0x6000|present)
	g.set(0xc000, 2, 0x6000|present)
	for i := range 512 {
		if i%2 == 0 {
			g.set(0x4000, i, 0x9000|present)
		}
		g.set(0x8000, i, uint64(16+i)*page|present)
	}
	roots := []pagetable.Root{at(paging4, 0x1000), at(paging4, 0x5000)}
	for limit, want := range map[int]int{514: 514, 513: 513, 511: 258, 258: 258, 257: 257, 255: 255} {
		got, complete := walk(t, g, g.ram(), pagetable.Limits{Tables: everything, Mappings: limit}, roots...)
		if complete != (limit == 514) || len(got) != want {
			t.Errorf("limit %d: %d mappings, complete %v", limit, len(got), complete)
		}
	}
}

var errMemory = errors.New("no such luck")

type failing struct{}

func (failing) ReadAt([]byte, int64) (int, error) { return 0, errMemory }

func TestMemoryFails(t *testing.T) {
	_, _, err := pagetable.Walk(failing{}, []pagetable.Range{{Len: page}}, []pagetable.Root{paging4}, unlimited)
	if !errors.Is(err, errMemory) {
		t.Errorf("%v", err)
	}
}
