package snapshot

import "context"

// Flatten stores a copy of a snapshot that depends on no other: its memory, its disks'
// blocks and its sections, in packs of its own. A base image under a disk stays under
// it. r may be of another store. opts.Parent must be nil.
func (s *Store) Flatten(ctx context.Context, r *Reader, opts Options) (Info, error) {
	opts.Parent = nil
	w, err := s.Create(ctx, opts)
	if err != nil {
		return Info{}, err
	}
	defer w.Abort() //nolint:errcheck // it does nothing after a Commit, and the first error is the one to report
	for _, section := range r.Sections() {
		if err := w.AddSection(section); err != nil {
			return Info{}, err
		}
	}
	if err := w.copyMemory(ctx, r); err != nil {
		return Info{}, err
	}
	for i := range MaxDisks {
		d := r.Disk(i)
		held := d.Held()
		if len(held) == 0 {
			continue
		}
		err := w.WriteDisk(ctx, Disk{Index: i, Size: DiskStride, Layered: true, Data: held, ReadAt: d.readAt})
		if err != nil {
			return Info{}, err
		}
	}
	return w.Commit(ctx)
}

// copyMemory stores the memory of another snapshot.
func (w *Writer) copyMemory(ctx context.Context, r *Reader) error {
	memory := &DiskReader{r: r}
	return w.WriteMemory(ctx, r.header.RAMBytes, memory.Held(), func(gpa uint64, n int) ([]byte, error) {
		b := make([]byte, n)
		_, err := memory.readAt(b, int64(gpa))
		return b, err
	})
}

// readAt reads what is held; p must not reach beyond it.
func (d *DiskReader) readAt(p []byte, off int64) (int, error) {
	for n := 0; n < len(p); {
		start, length, chunk, within := d.Lookup(off + int64(n))
		plain, err := d.ReadChunk(chunk)
		if err != nil {
			return n, err
		}
		skip := int(off + int64(n) - start)
		n += copy(p[n:], plain[within+skip:within+int(length)])
	}
	return len(p), nil
}
