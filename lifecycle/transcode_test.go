//go:build linux && amd64

package lifecycle_test

import (
	"bytes"
	"errors"

	"filippo.io/age"

	"github.com/cryovisor/cryovisor/memory"
	"github.com/cryovisor/cryovisor/snapshot"
)

// transcode stores a copy of a snapshot with the traveller's codec, in chunks of another size. It is a diff of the same parent, if
// that is one.
func (v *traveller) transcode(id snapshot.ID) snapshot.ID {
	v.t.Helper()
	r := v.read(id)
	opts := snapshot.Options{Recipients: []age.Recipient{v.key.Recipient()}, Codec: v.codec, Workers: v.workers, ChunkSize: 24 << 10}
	parent := r.Header().Parent
	if parent.IsZero() {
		info, err := v.store.Flatten(v.t.Context(), r, opts)
		if err != nil {
			v.t.Fatal(err)
		}
		return info.ID
	}
	opts.Parent = v.read(parent)
	w, err := v.store.Create(v.t.Context(), opts)
	if err != nil {
		v.t.Fatal(err)
	}
	defer w.Abort()
	for _, s := range r.Sections() {
		if err := w.AddSection(s); err != nil {
			v.t.Fatal(err)
		}
	}
	contents := snapshot.Contents{Memory: changed(v.memoryOf(opts.Parent), v.memoryOf(r))}
	for i := range 2 {
		d := r.Disk(i)
		contents.Disks = append(contents.Disks, snapshot.Disk{
			Index: i, Size: snapshot.DiskStride, Layered: true, Data: d.Held(), ReadAt: heldDisk{d}.ReadAt,
			Zeros: without(opts.Parent.Disk(i).Held(), d),
		})
	}
	if err := w.Write(v.t.Context(), contents); err != nil {
		v.t.Fatal(err)
	}
	info, err := w.Commit(v.t.Context())
	if err != nil {
		v.t.Fatal(err)
	}
	return info.ID
}

func (v *traveller) read(id snapshot.ID) *snapshot.Reader {
	v.t.Helper()
	r, err := v.store.Open(v.t.Context(), id, v.key)
	if err != nil {
		v.t.Fatal(err)
	}
	v.t.Cleanup(func() { r.Close() })
	return r
}

// memoryOf is all of the memory of a snapshot.
func (v *traveller) memoryOf(r *snapshot.Reader) []byte {
	v.t.Helper()
	mem := make([]byte, travelMemory)
	for c := range r.Chunks() {
		err := r.Fetch(v.t.Context(), c, func(gpa uint64, pages []byte) error {
			copy(mem[gpa:], pages)
			return nil
		})
		if err != nil {
			v.t.Fatal(err)
		}
	}
	return mem
}

// changed are the pages in which two memories differ.
func changed(before, now []byte) *snapshot.Memory {
	m := &snapshot.Memory{Size: uint64(len(now)), View: func(gpa uint64, n int) ([]byte, error) { return now[gpa:][:n], nil }}
	for at := 0; at < len(now); at += memory.PageSize {
		if end := at + memory.PageSize; !bytes.Equal(before[at:end], now[at:end]) {
			m.Data = append(m.Data, snapshot.Range{GPA: uint64(at), Len: memory.PageSize})
		}
	}
	return m
}

// without are the blocks of ranges that a snapshot does not hold, one by one.
func without(ranges []snapshot.Range, d *snapshot.DiskReader) (out []snapshot.Range) {
	for _, r := range ranges {
		for at := r.GPA; at < r.GPA+r.Len; at += snapshot.PageSize {
			if _, _, chunk, _ := d.Lookup(int64(at)); chunk < 0 {
				out = append(out, snapshot.Range{GPA: at, Len: snapshot.PageSize})
			}
		}
	}
	return out
}

// heldDisk reads what a snapshot holds of a disk.
type heldDisk struct{ *snapshot.DiskReader }

func (d heldDisk) ReadAt(p []byte, off int64) (n int, err error) {
	for n < len(p) {
		start, length, chunk, within := d.Lookup(off + int64(n))
		if chunk < 0 {
			return n, errors.New("not held")
		}
		plain, err := d.ReadChunk(chunk)
		if err != nil {
			return n, err
		}
		skip := int(off + int64(n) - start)
		n += copy(p[n:], plain[within+skip:within+int(length)])
	}
	return n, nil
}
