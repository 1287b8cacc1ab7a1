package memory

import (
	"context"
	"errors"

	"github.com/cryovisor/cryovisor/internal/pagemap"
)

// scanStep is how much memory is looked at between two looks at the context.
const scanStep = 1 << 30

// Dirty returns the pages written since the memory was made, by the guest or
// through WriteAt, and not discarded since, in ascending order and merged. These
// are the pages that a snapshot has to store: all that differ from zero for a
// machine that booted, all that differ from the image for one that resumed.
//
// It is exact while the machine is paused, but for this: a page that was
// written and holds what it held before is in it, and so are up to 511
// neighbours of a written page where the kernel uses huge pages. Before Linux
// 6.7, pages of zeros that were only read are in it as well. All of its pages are
// resident, until they are discarded.
func (m *Memory) Dirty(ctx context.Context) ([]Range, error) { return m.scan(ctx, m.scanDirty) }

// Mapped returns the pages that somebody has touched since the memory was made, by reading or by writing, in ascending order and
// merged, and neighbours with them, which the kernel has mapped along. Pages of zeros may be missing.
func (m *Memory) Mapped(ctx context.Context) ([]Range, error) { return m.scan(ctx, m.scanMapped) }

// scan goes over RAM step by step; part appends to found what it finds in a step.
func (m *Memory) scan(
	ctx context.Context, part func(pm *pagemap.Map, found []Range, r Range) ([]Range, error),
) (found []Range, err error) {
	if err := m.enter("scan"); err != nil {
		return nil, err
	}
	defer m.busy.Done()
	pm, err := pagemap.Open()
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, pm.Close()) }()
	for _, r := range m.ranges {
		for gpa := r.GPA; gpa < r.End(); gpa += scanStep {
			if err := ctx.Err(); err != nil {
				return nil, err
			}
			step := Range{GPA: gpa, Len: min(scanStep, r.End()-gpa)}
			if found, err = part(pm, found, step); err != nil {
				return nil, err
			}
		}
	}
	return found, nil
}

func (m *Memory) scanMapped(pm *pagemap.Map, mapped []Range, r Range) ([]Range, error) {
	regions, err := pm.Mapped(m.host(r.GPA), m.host(r.End()))
	for _, r := range regions {
		mapped = appendRange(mapped, Range{GPA: uint64(r.Start - m.host(0)), Len: uint64(r.End - r.Start)})
	}
	return mapped, err
}

// scanDirty appends what is private in r to dirty. Nothing is discarded between
// finding a page and noting that it can be touched.
func (m *Memory) scanDirty(pm *pagemap.Map, dirty []Range, r Range) ([]Range, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	regions, err := pm.Private(m.host(r.GPA), m.host(r.End()))
	if err != nil {
		return nil, err
	}
	return m.collect(dirty, regions), nil
}

// collect appends regions to dirty, and remembers that they can be touched. The
// caller holds mu.
func (m *Memory) collect(dirty []Range, regions []pagemap.Region) []Range {
	for _, r := range regions {
		next := Range{GPA: uint64(r.Start - m.host(0)), Len: uint64(r.End - r.Start)}
		if m.lazy != nil {
			m.lazy.own.set(next.GPA/PageSize, next.End()/PageSize)
		}
		dirty = appendRange(dirty, next)
	}
	return dirty
}
