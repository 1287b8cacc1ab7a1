// Package pagemap finds the private pages of a mapping of this process: those
// that the kernel made for it alone, because somebody wrote to them.
package pagemap

// PageSize is the unit of all addresses and lengths.
const PageSize = 4096

// A Region is a run of addresses [Start, End).
type Region struct{ Start, End uintptr }

// add appends [start, end) to regions, which are ascending, and merges it with
// the last where they touch.
func add(regions []Region, start, end uintptr) []Region {
	if n := len(regions); n > 0 && regions[n-1].End == start {
		regions[n-1].End = end
		return regions
	}
	return append(regions, Region{start, end})
}
