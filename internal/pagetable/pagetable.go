// Package pagetable says what the page tables of a guest map: which linear addresses show which guest physical memory.
//
// The tables are the guest's, and may hold anything: tables that refer to themselves or to what is no memory, and a few pages that
// map all of the address space. A walk takes them as the processor would, and is bounded by its Limits.
//
// Sections are those of the Intel 64 and IA-32 Architectures Software Developer's Manual, volume 3A, chapter 4 (Paging).
package pagetable

// Range is a run of guest physical memory, in bytes.
type Range struct{ GPA, Len uint64 }

// Mapping says that Len bytes from the linear address Linear on are the guest physical memory from GPA on. It may end where
// the address space does: Linear + Len is 0 then.
type Mapping struct{ Linear, GPA, Len uint64 }

// last is the linear address of the last byte.
func (m Mapping) last() uint64 { return m.Linear + m.Len - 1 }

// from is what is left of m without its first n bytes.
func (m Mapping) from(n uint64) Mapping { return Mapping{m.Linear + n, m.GPA + n, m.Len - n} }

// Bits of control registers and of EFER (4.1.1, "Four Paging Modes"; LA57 chooses five levels).
const (
	cr0PG    = 1 << 31
	cr4PAE   = 1 << 5
	cr4LA57  = 1 << 12
	eferLMA  = 1 << 10
	pageSize = 4096
)

// Root is what a processor's address space depends on: its control registers and EFER.
type Root struct{ CR0, CR3, CR4, EFER uint64 }

// levels is how many levels of tables the processor walks in 64-bit mode, 4 or 5; or 0 if it does not page, or as 32-bit systems
// do: no guest of ours stays in that.
func (r Root) levels() int {
	switch {
	case r.CR0&cr0PG == 0 || r.CR4&cr4PAE == 0 || r.EFER&eferLMA == 0:
		return 0
	case r.CR4&cr4LA57 != 0:
		return 5
	default:
		return 4
	}
}

// Pages says whether there are tables that Walk follows: not where the processor does not page, or as 32-bit systems do.
func (r Root) Pages() bool { return r.levels() > 0 }

// top is the address of the first table (4.5.2, "Use of CR3 with 4-Level Paging and 5-Level Paging").
func (r Root) top() uint64 { return r.CR3 & addressMask }

// push appends m to mappings, as a part of the last one if it continues that.
func push(mappings []Mapping, m Mapping) []Mapping {
	if n := len(mappings); n > 0 {
		last := &mappings[n-1]
		if last.Linear+last.Len == m.Linear && last.GPA+last.Len == m.GPA {
			last.Len += m.Len
			return mappings
		}
	}
	return append(mappings, m)
}

// join is a, and what b maps where a maps nothing. Both ascend and don't overlap, and so does the result.
func join(a, b []Mapping) []Mapping {
	var out []Mapping
	for _, m := range b {
		for len(a) > 0 && a[0].Linear <= m.last() {
			if a[0].last() >= m.Linear {
				if gap := a[0].Linear - m.Linear; a[0].Linear > m.Linear {
					out = push(out, Mapping{m.Linear, m.GPA, gap})
				}
				if a[0].last() >= m.last() {
					m.Len = 0 // and a[0] may reach into what follows m
					break
				}
				m = m.from(a[0].last() + 1 - m.Linear)
			}
			out = push(out, a[0])
			a = a[1:]
		}
		if m.Len > 0 {
			out = push(out, m)
		}
	}
	for _, m := range a {
		out = push(out, m)
	}
	return out
}
