package blockdevtest_test

import (
	"bytes"
	"errors"
	"io"
	"math"
	"math/rand/v2"
	"os"
	"syscall"
	"testing"

	"github.com/cryovisor/cryovisor/blockdev/blockdevtest"
)

// The Medium is compared with a file of the host.
func TestMediumAgainstFile(t *testing.T) {
	f, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	m := blockdevtest.NewMedium()
	rng := rand.New(rand.NewPCG(1, 1))
	for range 500 {
		off, p := rng.Int64N(300_000), make([]byte, rng.IntN(70_000))
		switch rng.IntN(8) {
		case 0, 1, 2:
			for i := range p {
				p[i] = byte(rng.Uint32())
			}
			n, err := m.WriteAt(p, off)
			if n != len(p) || err != nil {
				t.Fatal(n, err)
			}
			_, err = f.WriteAt(p, off)
			if err != nil {
				t.Fatal(err)
			}
		case 3:
			if err := errors.Join(m.Truncate(off), f.Truncate(off)); err != nil {
				t.Fatal(err)
			}
		case 4:
			info, err := f.Stat()
			if err != nil {
				t.Fatal(err)
			}
			inside := max(0, min(int64(len(p)), info.Size()-off)) // a hole does not change the size
			if _, err := f.WriteAt(make([]byte, inside), off); err != nil {
				t.Fatal(err)
			}
			if err := m.PunchHole(off, int64(len(p))+1); err != nil {
				t.Fatal(err)
			}
			if inside == int64(len(p)) && off+inside < info.Size() {
				if _, err := f.WriteAt([]byte{0}, off+inside); err != nil {
					t.Fatal(err)
				}
			}
		default:
			q := bytes.Clone(p)
			n, err := m.ReadAt(p, off)
			wantN, wantErr := f.ReadAt(q, off)
			if n != wantN || !errors.Is(err, wantErr) || !bytes.Equal(p, q) {
				t.Fatalf("read of %d bytes at %d: %d, %v; a file says %d, %v", len(p), off, n, err, wantN, wantErr)
			}
		}
	}
}

func TestMediumEnds(t *testing.T) {
	m := blockdevtest.NewMedium()
	for name, err := range map[string]error{
		"read before the start":    second(m.ReadAt(make([]byte, 1), -1)),
		"write before the start":   second(m.WriteAt(make([]byte, 1), -1)),
		"write beyond all":         second(m.WriteAt(make([]byte, 2), math.MaxInt64)),
		"hole before the start":    m.PunchHole(-1, 2),
		"hole of nothing":          m.PunchHole(0, 0),
		"hole of less":             m.PunchHole(0, -1),
		"truncate to a size of -1": m.Truncate(-1),
	} {
		if !errors.Is(err, syscall.EINVAL) {
			t.Errorf("%s: %v", name, err)
		}
	}
	other := m.Open()
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	for i, err := range []error{
		m.Close(), m.Sync(), m.Truncate(0), m.PunchHole(0, 1), second(m.ReadAt(nil, 0)), second(m.WriteAt(nil, 0)),
	} {
		if !errors.Is(err, os.ErrClosed) {
			t.Errorf("call %d after Close: %v", i, err)
		}
	}
	if _, err := other.WriteAt([]byte{1}, 0); err != nil {
		t.Error("another handle:", err)
	}
	other.Crash(rand.New(rand.NewPCG(1, 1)))
	if _, err := other.ReadAt(make([]byte, 1), 0); !errors.Is(err, blockdevtest.ErrCrashed) {
		t.Error("after a crash:", err)
	}
}

func second(_ int, err error) error { return err }

func write(t *testing.T, m *blockdevtest.Medium, b byte, off, n int) {
	t.Helper()
	if _, err := m.WriteAt(bytes.Repeat([]byte{b}, n), int64(off)); err != nil {
		t.Fatal(err)
	}
}

// read returns all of a file.
func read(t *testing.T, m *blockdevtest.Medium) []byte {
	t.Helper()
	b, err := io.ReadAll(io.NewSectionReader(m, 0, math.MaxInt64))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// Each sector is, after some crash, each version that it had since the last Sync, as a whole, and no other.
func TestMediumCrash(t *testing.T) {
	seen := map[[2]byte]int{}
	for seed := range uint64(200) {
		m := blockdevtest.NewMedium()
		write(t, m, 9, 0, 1024)
		write(t, m, 1, 0, 1024)
		if err := m.Sync(); err != nil {
			t.Fatal(err)
		}
		write(t, m, 2, 0, 1024)
		write(t, m, 3, 100, 500)
		if err := m.PunchHole(512, 512); err != nil {
			t.Fatal(err)
		}
		got := read(t, m.Crash(rand.New(rand.NewPCG(seed, 1))))
		if len(got) != 1024 {
			t.Fatalf("seed %d: %d bytes", seed, len(got))
		}
		seen[[2]byte{got[100], got[512]}]++
		if got[0] == 1 && got[100] != 1 || got[0] != got[99] || got[100] != got[511] || got[512] != got[599] {
			t.Fatalf("seed %d: a sector is torn", seed)
		}
	}
	for _, a := range []byte{1, 2, 3} {
		for _, b := range []byte{1, 2, 3, 0} {
			if seen[[2]byte{a, b}] == 0 {
				t.Errorf("no crash left %d and %d", a, b)
			}
		}
	}
	if len(seen) != 12 {
		t.Errorf("crashes left %v", seen)
	}
}

func TestMediumCrashSize(t *testing.T) {
	sizes := map[int]bool{}
	for seed := range uint64(50) {
		m := blockdevtest.NewMedium()
		write(t, m, 1, 0, 600)
		if err := m.Sync(); err != nil {
			t.Fatal(err)
		}
		write(t, m, 2, 700, 300)
		if err := m.Truncate(100); err != nil {
			t.Fatal(err)
		}
		left := m.Crash(rand.New(rand.NewPCG(seed, 1)))
		sizes[len(read(t, left))] = true
		if err := left.Truncate(2000); err != nil {
			t.Fatal(err)
		}
		if got := read(t, left); !bytes.Equal(got[1024:], make([]byte, 2000-1024)) {
			t.Fatalf("seed %d: something is behind the end", seed)
		}
	}
	if len(sizes) != 3 || !sizes[600] || !sizes[1000] || !sizes[100] {
		t.Errorf("sizes after crashes: %v", sizes)
	}
}

// What a Sync that failed lost, the next one does not save.
func TestMediumSyncFails(t *testing.T) {
	m := blockdevtest.NewMedium()
	write(t, m, 1, 0, 2048)
	if err := m.Sync(); err != nil {
		t.Fatal(err)
	}
	write(t, m, 2, 0, 2048)
	m.SetHook(func(blockdevtest.Op) *blockdevtest.Fault { return &blockdevtest.Fault{Err: syscall.EIO} })
	if err := m.Sync(); !errors.Is(err, syscall.EIO) {
		t.Fatal(err)
	}
	m.SetHook(nil)
	write(t, m, 3, 512, 1)
	if err := m.Sync(); err != nil {
		t.Fatal(err)
	}
	if got := read(t, m); got[0] != 2 || got[512] != 3 || got[513] != 2 {
		t.Error("reads don't show what was written")
	}
	got := read(t, m.Crash(rand.New(rand.NewPCG(1, 1))))
	if got[0] != 1 || got[512] != 3 || got[513] != 2 || got[1024] != 1 {
		t.Errorf("it has %d, %d %d, %d", got[0], got[512], got[513], got[1024])
	}
}

func TestMediumFaults(t *testing.T) {
	for part, c := range map[blockdevtest.Part]struct {
		n     int
		check func(p []byte) bool
	}{
		"":                    {0, func(p []byte) bool { return bytes.Count(p, []byte{2}) == 0 }},
		blockdevtest.PartNone: {0, func(p []byte) bool { return bytes.Count(p, []byte{2}) == 0 }},
		blockdevtest.PartHalf: {5000, func(p []byte) bool {
			return bytes.Equal(p[100:5100], bytes.Repeat([]byte{2}, 5000)) && p[5100] == 1
		}},
		blockdevtest.PartSectors: {0, func(p []byte) bool {
			whole := 0
			for at := 512; at+512 <= 10_100; at += 512 {
				switch bytes.Count(p[at:at+512], []byte{2}) {
				case 0:
				case 512:
					whole++
				default:
					return false
				}
			}
			return whole > 2 && whole < 16
		}},
	} {
		m := blockdevtest.NewMedium()
		write(t, m, 1, 0, 20_000)
		var asked []blockdevtest.Op
		m.SetHook(func(op blockdevtest.Op) *blockdevtest.Fault {
			asked = append(asked, op)
			return &blockdevtest.Fault{Err: syscall.ENOSPC, Part: part, Rand: rand.New(rand.NewPCG(1, 1))}
		})
		n, err := m.WriteAt(bytes.Repeat([]byte{2}, 10_000), 100)
		if n != c.n || !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("part %q: %d, %v", part, n, err)
		}
		if want := (blockdevtest.Op{Kind: blockdevtest.OpWrite, Off: 100, N: 10_000}); len(asked) != 1 || asked[0] != want {
			t.Errorf("the hook was asked for %v", asked)
		}
		m.SetHook(nil)
		if !c.check(read(t, m)) {
			t.Errorf("part %q: it has written something else", part)
		}
	}
}
