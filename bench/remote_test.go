//go:build linux && amd64

package bench

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/cryovisor/cryovisor/lifecycle"
	"github.com/cryovisor/cryovisor/snapshot"
)

// farStore is a directory that takes a time to answer each request, and has no other limit.
type farStore struct {
	dir  string
	wait time.Duration
}

func (s farStore) Open(name string) (snapshot.Blob, error) {
	f, err := os.Open(filepath.Join(s.dir, filepath.FromSlash(name)))
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	time.Sleep(s.wait)
	return farFile{f, info.Size(), s.wait}, nil
}

type farFile struct {
	*os.File
	size int64
	wait time.Duration
}

func (f farFile) Size() int64 { return f.size }

func (f farFile) ReadAt(p []byte, off int64) (int, error) {
	time.Sleep(f.wait)
	return f.File.ReadAt(p, off)
}

// BenchmarkRemoteResume measures a resume of 1 GiB from a store that takes 20 ms to answer: until the guest is entered, and until it has
// written to nine tenths of a working set of 64 MiB, prefetched by a record and not; local is the same from a directory.
func BenchmarkRemoteResume(b *testing.B) {
	const set = 64 << 20
	r := newRig(b, 1<<30, set)
	id := r.stored()
	m, _, _ := r.resume(id, false)
	r.touch(m, set*9/10)
	record, err := m.WorkingSet(context.Background())
	r.must(err)
	r.must(m.Close())
	for _, c := range []struct {
		name string
		wait time.Duration
		opts lifecycle.ResumeOptions
	}{
		{"local", 0, lifecycle.ResumeOptions{WorkingSet: record}},
		{"prefetched", 20 * time.Millisecond, lifecycle.ResumeOptions{WorkingSet: record}},
		{"lazy", 20 * time.Millisecond, lifecycle.ResumeOptions{Prefetch: lifecycle.PrefetchNone}},
	} {
		b.Run(c.name, func(b *testing.B) {
			r.b = b
			var entered, set90 []time.Duration
			for b.Loop() {
				e, all := r.resumeFar(id, farStore{r.store.Dir(), c.wait}, c.opts, set*9/10)
				entered, set90 = append(entered, e), append(set90, all)
			}
			b.ReportMetric(percentile(entered, 0.5), "first-insn-ms")
			b.ReportMetric(percentile(set90, 0.5), "set-ms")
			b.ReportMetric(0, "ns/op")
		})
	}
}

// resumeFar resumes from a far store, and returns how long it took until the guest was entered and until it had written to that much.
func (r *rig) resumeFar(id snapshot.ID, far farStore, opts lifecycle.ResumeOptions, bytes uint64) (entered, set time.Duration) {
	r.b.Helper()
	opts.Hardware, _ = r.hardware(id)
	began := time.Now()
	reader, err := snapshot.OpenFrom(context.Background(), far, id, snapshot.OpenOptions{}, r.key)
	r.must(err)
	tpl, err := lifecycle.NewTemplate(reader)
	r.must(err)
	m, err := tpl.Resume(context.Background(), opts)
	r.must(err)
	r.must(m.Resume())
	entered = time.Since(began)
	r.touch(m, bytes)
	set = time.Since(began)
	r.must(errors.Join(m.Close(), tpl.Close()))
	return entered, set
}
