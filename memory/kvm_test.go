//go:build linux && amd64

package memory_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io/fs"
	"math/rand/v2"
	"runtime"
	"slices"
	"testing"

	"github.com/cryovisor/cryovisor/internal/kvm"
	"github.com/cryovisor/cryovisor/memory"
	"golang.org/x/sys/unix"
)

// Where the test guest keeps its things: in a range that the source has as zero.
const (
	guestBase   = 64 * mib
	guestCode   = guestBase
	guestTables = guestBase + 0x1000 // PML4, PDPT, then a page directory for each GiB
	guestList   = guestBase + mib    // pairs: address, value to store there or 0
	guestResult = guestBase + 2*mib  // what was at the addresses
	doneAddr    = 3*gib + 256*mib    // a store there, in the hole, is the end
)

// guestProgram goes through the list at RSI, stores what it loads at RDI, and
// reports when it has come to a zero address.
var guestProgram = []byte{
	0x48, 0x8b, 0x1e, // next: mov rbx, [rsi]
	0x48, 0x85, 0xdb, // test rbx, rbx
	0x74, 0x1c, // jz done
	0x48, 0x8b, 0x03, // mov rax, [rbx]
	0x48, 0x89, 0x07, // mov [rdi], rax
	0x48, 0x8b, 0x4e, 0x08, // mov rcx, [rsi+8]
	0x48, 0x85, 0xc9, // test rcx, rcx
	0x74, 0x03, // jz skip
	0x48, 0x89, 0x0b, // mov [rbx], rcx
	0x48, 0x83, 0xc6, 0x10, // skip: add rsi, 16
	0x48, 0x83, 0xc7, 0x08, // add rdi, 8
	0xeb, 0xdc, // jmp next
	0x88, 0x02, // done: mov [rdx], al
	0xeb, 0xfe, // jmp .
}

// A guest is a vCPU in long mode on a Memory, with an identity map of its RAM.
// It belongs to the test's thread.
type guest struct {
	t    *testing.T
	m    *memory.Memory
	vcpu *kvm.VCPU
	tid  int
}

// newGuest makes a machine of m at a privilege level: 0, or 3, where some KVMs
// run a guest natively that they otherwise interpret.
func newGuest(t *testing.T, m *memory.Memory, level uint8) *guest {
	t.Helper()
	sys, err := kvm.Open(kvm.DevicePath)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) {
		t.Skip(err)
	}
	g := &guest{t: t, m: m}
	g.must(err)
	t.Cleanup(func() { sys.Close() })
	runtime.LockOSThread()
	t.Cleanup(runtime.UnlockOSThread)
	g.tid = unix.Gettid()
	vm, err := sys.CreateVM()
	g.must(err)
	t.Cleanup(func() { vm.Close() })
	g.must(vm.SetIdentityMapAddr(0xfffbc000))
	g.must(vm.SetTSSAddr(0xfffbd000))
	g.must(vm.CreateIRQChip())
	for i, r := range m.Ranges() {
		g.must(vm.SetUserMemoryRegion(uint32(i), 0, r.GPA, r.Len, m.HostAddr(r.GPA)))
	}
	g.vcpu, err = vm.CreateVCPU(0)
	g.must(err)
	t.Cleanup(func() { g.vcpu.Close() })
	g.longMode(level)
	return g
}

func (g *guest) must(err error) {
	g.t.Helper()
	if err != nil {
		g.t.Fatal(err)
	}
}

func (g *guest) write(p []byte, gpa uint64) {
	g.t.Helper()
	_, err := g.m.WriteAt(p, int64(gpa))
	g.must(err)
}

// longMode writes page tables of 2 MiB pages, accessed and dirty beforehand, and
// the program; and sets the registers to run it.
func (g *guest) longMode(level uint8) {
	const present, large = 0x67, 0x80 // present, writable, user, accessed, dirty
	entry := func(gpa, value uint64) { g.write(binary.LittleEndian.AppendUint64(nil, value), gpa) }
	entry(guestTables, guestTables+0x1000|present)
	ranges := g.m.Ranges()
	for n := range max(4, (ranges[len(ranges)-1].End()+gib-1)/gib) {
		dir := guestTables + 0x2000 + n*page
		entry(guestTables+0x1000+8*n, dir|present)
		var table []byte
		for i := range uint64(512) {
			table = binary.LittleEndian.AppendUint64(table, n*gib+i*2*mib|present|large)
		}
		g.write(table, dir)
	}
	g.write(guestProgram, guestCode)

	s, err := g.vcpu.Sregs()
	g.must(err)
	s.CR0, s.CR3, s.CR4, s.EFER = 0x80010031, guestTables, 0x620, 0x500 // PG WP NE ET PE; PAE OSFXSR OSXMMEXCPT; LMA LME
	code := kvm.Segment{Limit: 0xffffffff, Selector: 0x30, Typ: 0xb, Present: 1, DPL: level, S: 1, L: 1, G: 1}
	code.Selector |= uint16(level)
	data := kvm.Segment{Limit: 0xffffffff, Selector: 0x28, Typ: 3, Present: 1, DPL: level, DB: 1, S: 1, G: 1}
	data.Selector |= uint16(level)
	s.CS, s.DS, s.ES, s.FS, s.GS, s.SS = code, data, data, data, data, data
	s.TR = kvm.Segment{Limit: 0x67, Selector: 0x40, Typ: 0xb, Present: 1}
	g.must(g.vcpu.SetSregs(s))
	g.must(g.vcpu.SetRegs(kvm.Regs{RIP: guestCode, RFLAGS: 2, RSI: guestList, RDI: guestResult, RDX: doneAddr}))
}

// list writes the list that the program goes through.
func (g *guest) list(visits []visitOf) {
	var p []byte
	for _, v := range visits {
		p = binary.LittleEndian.AppendUint64(p, v.gpa)
		p = binary.LittleEndian.AppendUint64(p, v.store)
	}
	g.write(append(p, make([]byte, 16)...), guestList)
}

type visitOf struct{ gpa, store uint64 }

// visits has a guest go to a word of each page and write to a half of them. The word
// is not at address 0, which ends the list.
func visits(rng *rand.Rand, pages []uint64) []visitOf {
	list := make([]visitOf, len(pages))
	for i, gpa := range pages {
		list[i].gpa = gpa + 8 + 8*rng.Uint64N(page/8-1)
		if rng.IntN(2) == 0 {
			list[i].store = rng.Uint64() | 1
		}
	}
	return list
}

// levels runs f in a guest at each privilege level.
func levels(t *testing.T, f func(t *testing.T, level uint8)) {
	t.Run("CPL0", func(t *testing.T) { f(t, 0) })
	t.Run("CPL3", func(t *testing.T) { f(t, 3) })
}

// KVM_RUN that meets missing pages gets the right ones, on both sides of the
// hole; what the guest writes is in its dirty set and nowhere else.
func TestKVMRunOnMissingPages(t *testing.T) {
	levels(t, func(t *testing.T, level uint8) {
		rng := newRand(t)
		size, data := sparse()
		o := newOracleOf(rng, 6, 4, size, data...)
		img := newImage(t, o)
		m := mapImage(t, img, memory.MapOptions{})
		g := newGuest(t, m, level)
		list := visits(rng, append(pagesOf(rng, data), 2*gib, 5*gib+page))
		g.list(list)
		before, err := m.Dirty(context.Background())
		g.must(err)
		g.finish()
		if m.Stats().ChunksFetched == 0 || m.Stats().Faults < 100 {
			t.Errorf("the guest can't have met missing pages: %+v", m.Stats())
		}
		checkGuest(t, m, o, list, before)

		// A second machine of the image knows nothing of it.
		other := mapImage(t, img, memory.MapOptions{})
		got := make([]byte, page)
		for _, gpa := range pagesOf(rng, data) {
			if _, err := other.ReadAt(got, int64(gpa)); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, o.bytes(gpa, page)) {
				t.Fatalf("a guest's write to page %#x has changed the image", gpa)
			}
		}
	})
}

// finish runs until the guest reports.
func (g *guest) finish() {
	g.t.Helper()
	for {
		e, err := g.vcpu.Run()
		g.must(err)
		switch e.Reason {
		case kvm.ExitIntr:
		case kvm.ExitMMIO:
			if !isDone(g.t, e) {
				g.t.Fatal("access to RAM became memory-mapped I/O")
			}
			return
		default:
			g.t.Fatalf("exit %v: %+v", e.Reason, e.InternalError())
		}
	}
}

// isDone says whether the guest has reported.
func isDone(t *testing.T, e kvm.Exit) bool {
	t.Helper()
	access, err := e.MMIO()
	if err != nil {
		t.Fatal(err)
	}
	return access.Addr == doneAddr
}

// checkGuest compares what the guest loaded, what memory now holds, and the
// dirty set, with what they have to be.
func checkGuest(t *testing.T, m *memory.Memory, o *oracle, list []visitOf, before []memory.Range) {
	t.Helper()
	written := make(map[uint64]bool)
	for _, gpa := range pagesOf(rand.New(rand.NewPCG(0, 0)), before) {
		written[gpa] = true
	}
	word := make([]byte, 8)
	for i, v := range list {
		result := uint64(guestResult + 8*i)
		written[result&^(page-1)] = true
		if _, err := m.ReadAt(word, int64(result)); err != nil || !bytes.Equal(word, o.bytes(v.gpa, 8)) {
			t.Fatalf("the guest loaded %x at %#x, want %x (%v)", word, v.gpa, o.bytes(v.gpa, 8), err)
		}
		want := o.bytes(v.gpa, 8)
		if v.store != 0 {
			written[v.gpa&^(page-1)] = true
			binary.LittleEndian.PutUint64(want, v.store)
		}
		if _, err := m.ReadAt(word, int64(v.gpa)); err != nil || !bytes.Equal(word, want) {
			t.Fatalf("memory holds %x at %#x, want %x (%v)", word, v.gpa, want, err)
		}
	}
	dirty, err := m.Dirty(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	compareDirty(t, m, dirty, written)
}

// A source that fails ends KVM_RUN, and so does giving up on one that takes for
// ever, before the guest has gone on with anything false.
func TestKVMRunOnFailingSource(t *testing.T) {
	broken := errors.New("the disk is gone")
	levels(t, func(t *testing.T, level uint8) {
		t.Run("error", func(t *testing.T) {
			failUnderKVM(t, level, broken, func(*memory.Memory, context.Context) error { return broken })
		})
		t.Run("giving up", func(t *testing.T) {
			failUnderKVM(t, level, broken, func(m *memory.Memory, ctx context.Context) error {
				go m.Fail(broken)
				<-ctx.Done()
				return ctx.Err()
			})
		})
	})
}

// failUnderKVM has a guest visit pages that are there and then one whose fetch
// is trouble.
func failUnderKVM(t *testing.T, level uint8, why error, trouble func(*memory.Memory, context.Context) error) {
	rng := newRand(t)
	o := newOracle(rng, 128*mib, memory.Range{Len: 4 * mib})
	m := mapImage(t, newImage(t, o), memory.MapOptions{})
	g := newGuest(t, m, level)
	list := visits(rng, pagesOf(rng, []memory.Range{{Len: 4 * mib}}))
	bad := slices.IndexFunc(list, func(v visitOf) bool { _, _, chunk := o.Lookup(v.gpa); return chunk >= 0 })
	g.list(list[:bad+1])
	o.setTrouble(func(ctx context.Context, _ int64) error { return trouble(m, ctx) })
	kicked := make(chan struct{})
	m.OnFail(func(error) {
		if err := g.vcpu.Kick(g.tid); err != nil {
			t.Error(err)
		}
		close(kicked)
	})
	how := g.untilFailure()
	<-kicked
	t.Logf("KVM_RUN ended with %s", how)
	if !errors.Is(m.Err(), why) {
		t.Errorf("Err: %v", m.Err())
	}
	r, err := g.vcpu.Regs()
	g.must(err)
	if want := uint64(guestList + 16*bad); r.RSI != want || r.RDI != uint64(guestResult+8*bad) {
		t.Errorf("the guest is at RSI %#x, want %#x", r.RSI, want)
	}
}

// untilFailure runs until the memory has failed and KVM_RUN has returned, and
// says how.
func (g *guest) untilFailure() string {
	g.t.Helper()
	for {
		e, err := g.vcpu.Run()
		switch {
		case errors.Is(err, unix.EFAULT):
			return "EFAULT"
		case err != nil:
			g.t.Fatal(err)
		case e.Reason == kvm.ExitIntr && g.m.Err() == nil:
		case g.m.Err() != nil && (e.Reason != kvm.ExitMMIO || !isDone(g.t, e)):
			return e.Reason.String()
		default:
			g.t.Fatalf("exit %v", e.Reason)
		}
	}
}

// What vCPUs write while the Still of their memory is read is not in it, and is in
// memory.
func TestKVMRunDuringStill(t *testing.T) {
	for kind, machine := range stillKinds {
		t.Run(kind, func(t *testing.T) {
			levels(t, func(t *testing.T, level uint8) {
				rng := newRand(t)
				size, data := sparse()
				o := newOracleOf(rng, 6, 4, size, data...)
				m := machine(t, o)
				g := newGuest(t, m, level)
				scribble(t, rng, mustToucher(t, m), pagesOf(rng, data))
				list := visits(rng, pagesOf(rng, data))
				g.list(list)
				s := protect(t, m, mustDirty(t, m))
				scribble(t, rng, mustToucher(t, m), pagesOf(rng, data)[:100])
				frozen := mustDirty(t, m)
				want := contents(t, m, frozen)
				s.SetBuffers(1)
				g.must(s.Freeze(frozen))
				done := make(chan struct{})
				go func() {
					defer close(done)
					compareStill(t, rng, s, frozen, want)
				}()
				g.finish()
				<-done
				if s.Stats().Held == 0 {
					t.Error("the vCPU never had to wait")
				}
				word := []byte("12345678")
				for _, v := range list {
					if v.store == 0 {
						continue
					}
					if _, err := m.ReadAt(word, int64(v.gpa)); err != nil || binary.LittleEndian.Uint64(word) != v.store {
						t.Fatalf("memory holds %x at %#x, want %#x (%v)", word, v.gpa, v.store, err)
					}
				}
			})
		})
	}
}

// Close gets a vCPU out that waits to write, with an error.
func TestKVMRunStillClosed(t *testing.T) {
	levels(t, func(t *testing.T, level uint8) {
		frozenAt(t, func(t *testing.T, m *memory.Memory, s *still) {
			g := newGuest(t, m, level)
			g.list([]visitOf{{8, 1}, {unit, 1}, {2 * unit, 1}})
			closed := make(chan error)
			go func() {
				await(func() bool { return s.Stats().Waiting == 1 && s.Stats().Copies == 1 })
				closed <- m.Close()
			}()
			g.untilOut()
			g.must(<-closed)
		})
	})
}

// untilOut runs until memory is out of the vCPU's reach: EFAULT, memory-mapped I/O
// where KVM makes the access for the guest, or the end of a guest whose page tables
// are gone.
func (g *guest) untilOut() {
	g.t.Helper()
	for {
		e, err := g.vcpu.Run()
		switch {
		case errors.Is(err, unix.EFAULT):
			return
		case err != nil:
			g.t.Fatal(err)
		case e.Reason == kvm.ExitIntr:
		case e.Reason == kvm.ExitMMIO && isDone(g.t, e):
			g.t.Fatal("the guest has written what was held")
		default:
			return
		}
	}
}
