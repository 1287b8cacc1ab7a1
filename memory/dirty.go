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
func (m *Memory) Dirty(ctx context.Context) (dirty []Range, err error) {
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
			if dirty, err = m.scan(pm, dirty, step); err != nil {
				return nil, err
			}
		}
	}
	return dirty, nil
}

// scan appends what is private in r to dirty. Nothing is discarded between
// finding a page and noting that it can be touched.
func (m *Memory) scan(pm *pagemap.Map, dirty []Range, r Range) ([]Range, error) {
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
