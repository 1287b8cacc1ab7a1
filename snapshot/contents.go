package snapshot

import (
	"context"
	"fmt"
	"io"
)

// Contents is what Write stores at a time.
type Contents struct {
	// Memory, if not nil, is what is stored of the guest's memory.
	Memory *Memory
	// Disks are what is stored of disks, ascending by Index.
	Disks []Disk
	// Wanted, if not nil, delivers addresses that are to be stored before others, because somebody waits for it. It is
	// never closed. Addresses of disks are from DiskAddress on.
	Wanted <-chan Range
}

// Memory is what Write stores of a guest's memory. Ranges are of whole pages, ascending and not overlapping, neither by
// themselves nor with each other.
type Memory struct {
	// Size of the guest's RAM in bytes.
	Size uint64
	// Data are the ranges that may have changed. Pages of them that are zero are noted as such and take no space.
	Data []Range
	// Zeros are the ranges that are known to be zero.
	Zeros []Range
	// View gives memory that does not change before Write returns.
	View View
	// ReadAt, where View is nil, reads memory that may change, as an io.ReaderAt. It is called from several goroutines, once
	// for each page of Data. What a page has when it is read is stored.
	ReadAt func(p []byte, off int64) (int, error)
}

// View returns n bytes of guest memory at gpa without copying them. They must
// not change before Write returns. It is called from several goroutines.
type View func(gpa uint64, n int) ([]byte, error)

func (m *Memory) view(p Range) ([]byte, error) {
	mem, err := m.View(p.GPA, int(p.Len))
	if err != nil {
		return nil, fmt.Errorf("guest memory at %#x: %w", p.GPA, err)
	}
	if uint64(len(mem)) != p.Len {
		return nil, fmt.Errorf("%w: view of %#x has %d bytes, not %d", ErrInvalid, p.GPA, len(mem), p.Len)
	}
	return mem, nil
}

// read fills p, in one go: LZ4 must not look at bytes that change.
func (m *Memory) read(p []byte, gpa uint64) ([]byte, error) {
	n, err := m.ReadAt(p, int64(gpa))
	if n < len(p) {
		if err == nil {
			err = io.ErrUnexpectedEOF
		}
		return nil, fmt.Errorf("guest memory at %#x: %w", gpa, err)
	}
	return p, nil
}

// check checks m for a Writer whose snapshot has, or will have, ram bytes, unless that is not known.
func (m *Memory) check(ram uint64, known bool) error {
	data, err := checkRanges(m.Data)
	if err != nil {
		return err
	}
	zeros, err := checkRanges(m.Zeros)
	switch {
	case err != nil:
		return err
	case m.Size%PageSize != 0 || m.Size > DiskStride:
		return fmt.Errorf("%w: guest memory of %d bytes", ErrInvalid, m.Size)
	case data+zeros > m.Size:
		return fmt.Errorf("%w: ranges of %d bytes in a guest memory of %d", ErrInvalid, data+zeros, m.Size)
	case known && m.Size != ram:
		return fmt.Errorf("%w: guest memory was %d bytes, is %d", ErrInvalid, ram, m.Size)
	}
	return nil
}

// WriteMemory is Write of memory alone.
func (w *Writer) WriteMemory(ctx context.Context, size uint64, ranges []Range, view View) error {
	return w.Write(ctx, Contents{Memory: &Memory{Size: size, Data: ranges, View: view}})
}

// WriteDisk is Write of one disk alone.
func (w *Writer) WriteDisk(ctx context.Context, d Disk) error {
	return w.Write(ctx, Contents{Disks: []Disk{d}})
}

// Write stores memory and blocks of disks. What lies outside of the ranges given keeps its contents: the parent's, or zero,
// or nothing.
//
// It may be called more than once before Commit: later calls overrule earlier
// ones where they overlap. It returns soon after ctx ends. After an error that is not
// ErrInvalid, Abort is all that is left to do.
func (w *Writer) Write(ctx context.Context, c Contents) error {
	if err := w.enter(); err != nil {
		return err
	}
	defer w.mu.Unlock()
	if err := w.check(c); err != nil {
		return err
	}
	if c.Memory != nil {
		w.ram, w.wrote = c.Memory.Size, true
	}
	if err := w.write(ctx, c); err != nil {
		w.err = err
		return err
	}
	return nil
}

func (w *Writer) check(c Contents) error {
	if c.Memory != nil {
		if err := c.Memory.check(w.ram, w.wrote || w.opts.Parent != nil); err != nil {
			return err
		}
	}
	for i := range c.Disks {
		if err := c.Disks[i].check(); err != nil {
			return err
		}
		if i > 0 && c.Disks[i-1].Index >= c.Disks[i].Index {
			return fmt.Errorf("%w: disk %d after disk %d", ErrInvalid, c.Disks[i].Index, c.Disks[i-1].Index)
		}
	}
	return nil
}

func (w *Writer) write(ctx context.Context, c Contents) error {
	j, data := w.newJob(ctx, c)
	if err := w.run(j); err != nil {
		return err
	}
	w.extents = overlay(w.extents, data, w.collect(j))
	if c.Memory != nil && len(c.Memory.Zeros) > 0 {
		w.extents = overlay(w.extents, c.Memory.Zeros, nil)
	}
	for i := range c.Disks {
		d := &c.Disks[i]
		if len(d.Zeros) == 0 {
			continue
		}
		var held []extent
		zeros := d.at(d.Zeros)
		if d.Layered {
			if err := w.makeZeros(); err != nil {
				return err
			}
			held = w.zeros.repeat(zeros)
		}
		w.extents = overlay(w.extents, zeros, held)
	}
	return nil
}

// newJob cuts contents into units. data are the ranges that they cover.
func (w *Writer) newJob(ctx context.Context, c Contents) (j *job, data []Range) {
	j = &job{
		ctx: ctx, memory: c.Memory, disks: make(map[int]*Disk), wanted: c.Wanted,
		progress: progressMeter{report: w.opts.Progress},
	}
	if c.Memory != nil {
		data = append(data, c.Memory.Data...)
		j.cut(c.Memory.Data, uint64(w.opts.ChunkSize))
	}
	for i := range c.Disks {
		d := &c.Disks[i]
		j.disks[d.Index] = d
		ranges := d.at(d.Data)
		data = append(data, ranges...)
		j.cut(ranges, uint64(min(w.opts.ChunkSize, diskChunkSize)))
	}
	for _, r := range data {
		j.progress.total += r.Len
	}
	return j, data
}
