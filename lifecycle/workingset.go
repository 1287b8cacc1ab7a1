package lifecycle

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sort"

	"github.com/cryovisor/cryovisor/snapshot"
)

// Prefetch says what a resume fetches before the guest touches it. The guest's own faults go first in any case.
type Prefetch int

const (
	// PrefetchWorkingSet fetches what the guest touched after the resume before, in that order, and what it had written when it
	// was stored; nothing if there is no record of that.
	PrefetchWorkingSet Prefetch = iota
	// PrefetchNone fetches nothing.
	PrefetchNone
	// PrefetchAll fetches the working set, and then all the rest: the machine needs the store no more.
	PrefetchAll
)

const (
	// workingSetSection is in the snapshots of machines that were resumed. Whoever does not know it can do without.
	workingSetSection = "lifecycle/working-set"
	workingSetVersion = 1

	// maxWorkingSet bounds a record, in bytes of memory: a machine that has run for long has touched most of what it has.
	maxWorkingSet = 512 << 20
	// maxWorkingRanges bounds its ranges.
	maxWorkingRanges = 1 << 18
)

// ErrWorkingSet says that bytes are no record of a working set.
var ErrWorkingSet = errors.New("lifecycle: not a record of a working set")

// marshalWorkingSet encodes ranges, in the order in which they were touched: a number of ranges, and for each its first page and its
// pages, all in the variable length of encoding/binary.
func marshalWorkingSet(ranges []snapshot.Range) []byte {
	b := binary.AppendUvarint(nil, uint64(len(ranges)))
	for _, r := range ranges {
		b = binary.AppendUvarint(b, r.GPA/snapshot.PageSize)
		b = binary.AppendUvarint(b, r.Len/snapshot.PageSize)
	}
	return b
}

// parseWorkingSet is its inverse.
func parseWorkingSet(b []byte) ([]snapshot.Range, error) {
	next := func() (uint64, error) {
		v, n := binary.Uvarint(b)
		if n <= 0 {
			return 0, fmt.Errorf("%w: it is cut off", ErrWorkingSet)
		}
		b = b[n:]
		return v, nil
	}
	count, err := next()
	if err != nil || count > maxWorkingRanges || count > uint64(len(b)) {
		return nil, fmt.Errorf("%w: of %d ranges", ErrWorkingSet, count)
	}
	ranges := make([]snapshot.Range, 0, count)
	for range count {
		page, err := next()
		if err != nil {
			return nil, err
		}
		pages, err := next()
		if err != nil {
			return nil, err
		}
		const end = snapshot.DiskStride / snapshot.PageSize
		if page >= end || pages == 0 || pages > end-page {
			return nil, fmt.Errorf("%w: %d pages from %d", ErrWorkingSet, pages, page)
		}
		ranges = append(ranges, snapshot.Range{GPA: page * snapshot.PageSize, Len: pages * snapshot.PageSize})
	}
	if len(b) > 0 {
		return nil, fmt.Errorf("%w: %d bytes behind it", ErrWorkingSet, len(b))
	}
	return ranges, nil
}

// WorkingSet is a record of the memory that the machine has touched since it was resumed, for ResumeOptions.WorkingSet: for a
// snapshot that is resumed many times. A pause stores it with the snapshot by itself. It is nil for a machine that was booted.
func (m *Machine) WorkingSet(ctx context.Context) ([]byte, error) {
	if m.image == nil {
		return nil, nil
	}
	mapped, err := m.VM.Memory().Mapped(ctx)
	if err != nil {
		return nil, err
	}
	dirty, err := m.VM.Memory().Dirty(ctx)
	if err != nil {
		return nil, err
	}
	// What was asked for, in that order; of what had been prefetched before it was asked for, that which was needed; and what
	// was written.
	order := slices.Clone(m.prefetched)
	for _, chunk := range m.image.Touched() {
		order = append(order, m.origin.Runs(chunk)...)
	}
	ranges := m.VM.Memory().Ranges()
	ws := workingSet{seen: make([]uint64, ranges[len(ranges)-1].End()/snapshot.PageSize/64+1)}
	for _, r := range order {
		ws.add(r, memoryRanges(mapped))
	}
	for _, r := range memoryRanges(dirty) {
		ws.add(r, []snapshot.Range{r})
	}
	return marshalWorkingSet(ws.ranges), nil
}

// workingSet is a record in the making.
type workingSet struct {
	ranges []snapshot.Range
	bytes  uint64
	seen   []uint64 // a bit for each page
}

// add adds the pages of r that are in touched, which is ascending, and not yet in ws.
func (ws *workingSet) add(r snapshot.Range, touched []snapshot.Range) {
	i := sort.Search(len(touched), func(i int) bool { return touched[i].GPA+touched[i].Len > r.GPA })
	for ; i < len(touched) && touched[i].GPA < r.GPA+r.Len; i++ {
		from, to := max(r.GPA, touched[i].GPA), min(r.GPA+r.Len, touched[i].GPA+touched[i].Len)
		for gpa := from; gpa < to && ws.bytes < maxWorkingSet; gpa += snapshot.PageSize {
			word, bit := &ws.seen[gpa/snapshot.PageSize/64], uint64(1)<<(gpa/snapshot.PageSize%64)
			if *word&bit == 0 {
				*word |= bit
				ws.addPage(gpa)
			}
		}
	}
}

func (ws *workingSet) addPage(gpa uint64) {
	if n := len(ws.ranges); n > 0 && ws.ranges[n-1].GPA+ws.ranges[n-1].Len == gpa {
		ws.ranges[n-1].Len += snapshot.PageSize
	} else if n < maxWorkingRanges {
		ws.ranges = append(ws.ranges, snapshot.Range{GPA: gpa, Len: snapshot.PageSize})
	}
	ws.bytes += snapshot.PageSize
}

// readWorkingSet is the record to go by. One that can't be read is none: it is a hint.
func (m *Machine) readWorkingSet(given []byte) []snapshot.Range {
	if given == nil {
		s, err := m.origin.ReadSection(workingSetSection)
		if err != nil || s.Version != workingSetVersion {
			return nil
		}
		given = s.Data
	}
	ranges, err := parseWorkingSet(given)
	if err != nil {
		return nil
	}
	return ranges
}

// prefetching is what goes on after a resume.
type prefetching struct {
	cancel context.CancelFunc
	ended  chan struct{} // closed when err is set
	err    error
}

// startPrefetch begins to fetch what the options say, behind the guest's own faults.
func (m *Machine) startPrefetch(opts ResumeOptions) {
	ctx, cancel := context.WithCancel(context.Background())
	m.prefetch = &prefetching{cancel: cancel, ended: make(chan struct{})}
	var chunks []int64
	if opts.Prefetch != PrefetchNone && !opts.Eager {
		m.prefetched = m.readWorkingSet(opts.WorkingSet)
		chunks = chunksOf(m.origin, m.prefetched)
	}
	go func() {
		defer close(m.prefetch.ended)
		defer cancel()
		m.prefetch.err = m.image.Prefetch(ctx, chunks, 0)
		if m.prefetch.err == nil && opts.Prefetch == PrefetchAll {
			m.prefetch.err = m.image.Populate(ctx)
		}
		if m.prefetch.err == nil && !opts.SmallPages && (opts.Eager || opts.Prefetch != PrefetchNone) {
			_, m.prefetch.err = m.VM.Memory().Collapse(ctx)
		}
	}()
}

// WaitPrefetch waits until what a resume prefetches is there, and in huge pages if it may be, or ctx ends. An error is no failure of the machine: what is missing
// is fetched when it is touched.
func (m *Machine) WaitPrefetch(ctx context.Context) error {
	if m.prefetch == nil {
		return nil
	}
	select {
	case <-m.prefetch.ended:
		return m.prefetch.err
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (p *prefetching) end() {
	if p != nil {
		p.cancel()
		<-p.ended
	}
}

// chunksOf are the chunks that hold ranges, in the order of those.
func chunksOf(r *snapshot.Reader, ranges []snapshot.Range) []int64 {
	var chunks []int64
	seen := make([]bool, r.Chunks())
	for _, in := range ranges {
		for gpa := in.GPA; gpa < in.GPA+in.Len; {
			start, length, chunk := r.Lookup(gpa)
			if length == 0 {
				break
			}
			if chunk >= 0 && !seen[chunk] {
				seen[chunk] = true
				chunks = append(chunks, chunk)
			}
			gpa = start + length
		}
	}
	return chunks
}

// workingSetSections is the record to be stored with a snapshot.
func (m *Machine) workingSetSections(ctx context.Context) ([]snapshot.Section, error) {
	data, err := m.WorkingSet(ctx)
	if data == nil || err != nil {
		return nil, err
	}
	return []snapshot.Section{{Name: workingSetSection, Version: workingSetVersion, Data: data}}, nil
}
