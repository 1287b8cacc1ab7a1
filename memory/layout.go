// Package memory is the RAM of a virtual machine: where guest physical
// addresses lie in this process, how a machine that was resumed gets its pages
// only when it touches them, and which pages it has written since.
//
// A [Memory] is one mapping. Guest physical address (GPA) g is at host address
// base + g for all g, so a region of guest memory is always one run of host
// memory. RAM is [0, min(size, 3 GiB)) and, for what is left of the size, from
// 4 GiB upwards. The gigabyte between is for devices: it is reserved and never
// accessible.
//
// There are two kinds. [New] makes plain anonymous memory for a machine that
// boots. [NewImage] makes an [Image], the contents of a snapshot as far as it
// has been fetched, and [Image.Map] makes the memory of one machine that runs
// on it: pages are shared by all machines of the image until one of them writes
// to its own copy.
//
// Go code must not follow a pointer to a guest page that is still missing: the
// page fault would block a thread where the Go scheduler can't see it, and the
// next garbage collection would wait for that thread while the pager, which is
// Go code, waits for the collection. So all Go code uses [Memory.ReadAt] and
// [Memory.WriteAt], which fetch first and then copy. Only system calls (KVM_RUN
// above all) may meet a missing page.
//
// [Memory.Protect] makes a [Still]: what pages held at one moment, read while the
// machine runs on. Its pages are write-protected, and a write to one of them waits
// like an access to a missing page, so the same holds for Go code that writes.
package memory

import "slices"

// PageSize is the size of a guest page in bytes, the unit of everything here.
const PageSize = 4096

// The 32-bit hole: guest physical addresses that are never RAM, so that the
// interrupt controllers (0xfec00000, 0xfee00000) and memory-mapped devices have
// a place that every operating system expects.
const (
	HoleStart = 3 << 30
	HoleEnd   = 4 << 30
)

// MaxSize is the largest RAM size in bytes that a Memory may have: 4 TiB, far
// below the 46 bits of guest physical address that any current processor has.
const MaxSize = 4 << 40

// A Range is a run of guest physical addresses, in bytes. Both fields are
// multiples of PageSize.
type Range struct {
	GPA uint64 // the first address
	Len uint64 // the number of bytes
}

// End is the address after the last.
func (r Range) End() uint64 { return r.GPA + r.Len }

// appendRange appends next, or makes the last range longer if it ends there.
func appendRange(ranges []Range, next Range) []Range {
	if n := len(ranges); n > 0 && ranges[n-1].End() == next.GPA {
		ranges[n-1].Len += next.Len
		return ranges
	}
	return append(ranges, next)
}

// inSteps calls f for parts of ranges of at most size bytes, until it fails.
func inSteps(ranges []Range, size uint64, f func(Range) error) error {
	for _, r := range ranges {
		for gpa := r.GPA; gpa < r.End(); gpa += size {
			if err := f(Range{GPA: gpa, Len: min(size, r.End()-gpa)}); err != nil {
				return err
			}
		}
	}
	return nil
}

// Layout returns the RAM ranges of a machine with size bytes of memory, in
// ascending order: one up to 3 GiB, two above. It is a pure function of size,
// which is what makes a page map meaningful on another host.
func Layout(size uint64) []Range {
	if size <= HoleStart {
		return []Range{{GPA: 0, Len: size}}
	}
	return []Range{{GPA: 0, Len: HoleStart}, {GPA: HoleEnd, Len: size - HoleStart}}
}

// span is the length of the guest physical address space that size bytes of
// RAM take, the hole included.
func span(size uint64) uint64 {
	ranges := Layout(size)
	return ranges[len(ranges)-1].End()
}

// inRAM says whether the n bytes at gpa lie in one RAM range. No bytes lie
// anywhere up to the end of a range.
func inRAM(ranges []Range, gpa, n uint64) bool {
	return slices.ContainsFunc(ranges, func(r Range) bool {
		return gpa >= r.GPA && n <= r.Len && gpa-r.GPA <= r.Len-n
	})
}

// clip returns the part of [start, start+length) that lies in the RAM range
// that holds gpa.
func clip(ranges []Range, gpa, start, length uint64) (lo, hi uint64) {
	for _, r := range ranges {
		if gpa >= r.GPA && gpa < r.End() {
			end := start + length
			if end < start {
				end = r.End()
			}
			return max(start, r.GPA), min(end, r.End())
		}
	}
	return gpa, gpa
}
