//go:build linux && amd64

package pagemap

import (
	"math/rand/v2"
	"slices"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The layout of Linux 6.7 (include/uapi/linux/fs.h). Headers that old
// distributions install don't have it, so this is a table.
func TestABI(t *testing.T) {
	var a scanArg
	for _, c := range []struct {
		what       string
		ours, want uintptr
	}{
		{"sizeof(struct pm_scan_arg)", unsafe.Sizeof(a), 96},
		{"offsetof(flags)", unsafe.Offsetof(a.flags), 8},
		{"offsetof(start)", unsafe.Offsetof(a.start), 16},
		{"offsetof(end)", unsafe.Offsetof(a.end), 24},
		{"offsetof(walk_end)", unsafe.Offsetof(a.walkEnd), 32},
		{"offsetof(vec)", unsafe.Offsetof(a.vec), 40},
		{"offsetof(vec_len)", unsafe.Offsetof(a.vecLen), 48},
		{"offsetof(max_pages)", unsafe.Offsetof(a.maxPages), 56},
		{"offsetof(category_inverted)", unsafe.Offsetof(a.categoryInverted), 64},
		{"offsetof(category_mask)", unsafe.Offsetof(a.categoryMask), 72},
		{"offsetof(category_anyof_mask)", unsafe.Offsetof(a.categoryAnyOf), 80},
		{"offsetof(return_mask)", unsafe.Offsetof(a.returnMask), 88},
		{"sizeof(struct page_region)", unsafe.Sizeof(region{}), 24},
		// _IOWR('f', 16, struct pm_scan_arg): direction, size, type, number.
		{"PAGEMAP_SCAN", reqScan, 3<<30 | 96<<16 | 'f'<<8 | 16},
	} {
		if c.ours != c.want {
			t.Errorf("%s is %#x, want %#x", c.what, c.ours, c.want)
		}
	}
}

// sink is where loads go that must not be optimized away.
var sink byte

// Both ways find what was written, in memory that is anonymous and in memory
// that is a private mapping of a file, and nothing else; but for the pages of
// zeros that one of them can't tell.
func TestPrivate(t *testing.T) {
	const pages = 4000
	m, err := Open()
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	for _, kind := range []string{"anonymous", "file"} {
		t.Run(kind, func(t *testing.T) {
			mem := mapped(t, kind, pages)
			base := uintptr(unsafe.Pointer(&mem[0]))
			rng := rand.New(rand.NewPCG(3, 4))
			var written, touched, mapped []Region
			for i := range uintptr(pages) {
				at := base + i*PageSize
				switch rng.IntN(3) {
				case 0:
					mem[i*PageSize] = 1
					written = add(written, at, at+PageSize)
					touched = add(touched, at, at+PageSize)
					mapped = add(mapped, at, at+PageSize)
				case 1:
					sink += mem[i*PageSize]
					if kind == "file" {
						mapped = add(mapped, at, at+PageSize)
					}
					if kind == "anonymous" {
						touched = add(touched, at, at+PageSize)
					}
				}
			}
			for _, part := range []Region{{base, base + pages*PageSize}, {base + PageSize, base + 999*PageSize}} {
				want := clipped(touched, part)
				expect(t, "read", want)(m.read(part.Start, part.End, isFile|isZero))
				got, err := m.Private(part.Start, part.End)
				if !noScan.Load() {
					want = clipped(written, part)
				}
				expect(t, "Private", want)(got, err)
				got, err = m.Mapped(part.Start, part.End)
				if err != nil || !covers(got, clipped(mapped, part)) || kind == "anonymous" && !noScan.Load() && !slices.Equal(got, clipped(mapped, part)) {
					t.Errorf("Mapped: %d regions (%v), which lack what was touched", len(got), err)
				}
			}
		})
	}
}

func mapped(t *testing.T, kind string, pages int) []byte {
	t.Helper()
	fd, flags := -1, unix.MAP_PRIVATE
	if kind == "anonymous" {
		flags |= unix.MAP_ANONYMOUS
	} else {
		var err error
		if fd, err = unix.MemfdCreate("pagemap", unix.MFD_CLOEXEC); err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
		if _, err := unix.Pwrite(fd, make([]byte, pages*PageSize), 0); err != nil {
			t.Fatal(err)
		}
	}
	mem, err := unix.Mmap(fd, 0, pages*PageSize, unix.PROT_READ|unix.PROT_WRITE, flags)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Munmap(mem) })
	if err := unix.Madvise(mem, unix.MADV_NOHUGEPAGE); err != nil {
		t.Fatal(err)
	}
	return mem
}

// clipped is the part of regions that lies in r.
func clipped(regions []Region, r Region) []Region {
	var out []Region
	for _, other := range regions {
		if lo, hi := max(other.Start, r.Start), min(other.End, r.End); lo < hi {
			out = append(out, Region{lo, hi})
		}
	}
	return out
}

// covers says whether all of want is in regions.
func covers(regions, want []Region) bool {
	for _, w := range want {
		part := clipped(regions, w)
		if len(part) != 1 || part[0] != w {
			return false
		}
	}
	return true
}

func expect(t *testing.T, what string, want []Region) func([]Region, error) {
	return func(got []Region, err error) {
		t.Helper()
		if err != nil || !slices.Equal(got, want) {
			t.Errorf("%s: %d regions (%v), want %d", what, len(got), err, len(want))
		}
	}
}
