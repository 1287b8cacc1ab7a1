package memory

import (
	"context"
	"errors"
	"fmt"

	"github.com/cryovisor/cryovisor/internal/uffd"
)

// Why a lazy mapping, or a Still, is not to be had; an eager mapping is. The messages say what to
// do about it.
var (
	// ErrNotPermitted says that this process may not use userfaultfd.
	ErrNotPermitted = uffd.ErrNotPermitted
	// ErrKernel says that the kernel has no userfaultfd. It matches
	// errors.ErrUnsupported.
	ErrKernel = uffd.ErrKernel
	// ErrNoWriteProtect says that the kernel can't write-protect the memory of a
	// machine, which Protect needs: it is older than Linux 5.19 or lacks
	// CONFIG_PTE_MARKER_UFFD_WP. It matches errors.ErrUnsupported.
	ErrNoWriteProtect = uffd.ErrNoWriteProtect
)

// zeroWindow is how much of a range of zeros a fault maps at once, in bytes and
// aligned. A page costs 50 ns when it is one of many and a fault 10 us by itself
// (BenchmarkFault/zero), so that 64 pages keep the latency of a fault low and
// save nearly all that there is to save.
const zeroWindow = 256 << 10

// MapOptions are the choices for the memory of a machine that resumes.
type MapOptions struct {
	// Eager fetches everything before Map returns. It needs no userfaultfd. The
	// price beside the time: a page that the snapshot knew to be zero takes
	// memory in the image once it is read, and twice once it is written.
	Eager bool

	// Progress, if not nil, is told how many bytes the image has while an eager
	// mapping fetches the rest. It is called from several goroutines.
	Progress func(bytes uint64)

	// Reservation, if not nil, is where the memory is to lie. Map uses it up, whatever it returns; it must
	// be of the image's size.
	Reservation *Reservation

	// Handlers is the number of goroutines that wait for page faults. 0 means 2.
	Handlers int
}

// LazySupport says whether a lazy mapping is possible for this process on this
// host: nil, or an error that matches ErrNotPermitted, ErrKernel or
// ErrHugeShmem.
func LazySupport() error {
	fd, err := openUffd()
	if err != nil {
		return err
	}
	return fd.Close()
}

func openUffd() (*uffd.FD, error) {
	huge, err := hugeShmem()
	if err == nil && huge {
		err = ErrHugeShmem
	}
	if err != nil {
		return nil, err
	}
	return uffd.Open()
}

// Map returns the memory of a machine that runs on the image: private, so that
// what the machine writes is its own, and lazy unless opts say otherwise. ctx
// bounds Map, not the memory. The memory keeps the image alive.
func (img *Image) Map(ctx context.Context, opts MapOptions) (*Memory, error) {
	if err := img.acquire(); err != nil {
		return nil, errors.Join(err, opts.Reservation.Close())
	}
	m, err := img.build(ctx, opts)
	if err != nil {
		return nil, errors.Join(err, img.release())
	}
	return m, nil
}

func (img *Image) build(ctx context.Context, opts MapOptions) (*Memory, error) {
	place := opts.Reservation
	if place == nil {
		var err error
		if place, err = Reserve(img.size); err != nil {
			return nil, err
		}
	}
	if place.size != img.size {
		return nil, errors.Join(&SizeError{Size: place.size}, place.Close())
	}
	m := place.memory()
	m.img = img
	var err error
	if !opts.Eager {
		m.lazy, err = newLazy(span(img.size))
	}
	img.join(m)
	if opts.Eager {
		progress := opts.Progress
		if progress == nil {
			progress = func(uint64) {}
		}
		err = img.populate(ctx, progress)
	}
	for i := 0; err == nil && i < len(m.ranges); i++ {
		err = m.attach(m.ranges[i])
	}
	if err != nil {
		img.leave(m)
		return nil, errors.Join(err, m.lazy.close(), m.mm.unmap())
	}
	if m.lazy != nil {
		m.startPager(opts.Handlers)
	}
	return m, nil
}

// attach maps one RAM range of the image and arms its faults.
func (m *Memory) attach(r Range) error {
	if err := m.mm.place(r, m.img.file); err != nil || m.lazy == nil {
		return err
	}
	return m.lazy.fd.Register(m.host(r.GPA), uintptr(r.Len), uffd.ModeMissing)
}

// lazy is what a Memory needs as long as pages of it may be missing. A page is
// resident, so that Go code may touch it, if the image has it or own says so.
type lazy struct {
	fd  *uffd.FD
	own bitmap // pages mapped here: pages of zeros, or written by the machine. See resident

	ctx    context.Context // of all fetches for this Memory; ends with Fail and Close
	cancel context.CancelFunc
}

func newLazy(span uint64) (*lazy, error) {
	fd, err := openUffd()
	if err != nil {
		return nil, err
	}
	l := &lazy{fd: fd, own: newBitmap(span / PageSize)}
	l.ctx, l.cancel = context.WithCancel(context.Background())
	return l, nil
}

func (l *lazy) close() error {
	if l == nil {
		return nil
	}
	l.cancel()
	return l.fd.Close()
}

// resident says whether Go code may touch the page: nothing can block it there.
// A page of own can be lost to Discard, and one of the image to Reclaim, which takes
// only what is private here, and makes it a page of own first. Both hold mu for
// writing: so own is set, together with what makes it true, under mu, and whoever
// touches a page has held mu since it was resident. Without mu the answer is a hint.
func (m *Memory) resident(page uint64) bool {
	return m.lazy == nil || m.img.present.get(page) || m.lazy.own.get(page)
}

// missing says whether any of the n bytes at gpa would have to be fetched.
func (m *Memory) missing(gpa, n uint64) bool {
	if m.lazy == nil {
		return false
	}
	for page, end := gpa/PageSize, (gpa+n+PageSize-1)/PageSize; page < end; page++ {
		if !m.resident(page) {
			return true
		}
	}
	return false
}

// Resident makes the n bytes at gpa resident: it fetches what is missing. Views
// and accesses of them then need nothing but memory, until they are discarded.
// The error is that of the first fetch that failed.
func (m *Memory) Resident(ctx context.Context, gpa uint64, n int) error {
	if n < 0 || !inRAM(m.ranges, gpa, uint64(n)) {
		return &RangeError{Op: "fetch", GPA: int64(gpa), Len: n}
	}
	if err := m.enter("fetch"); err != nil {
		return err
	}
	defer m.busy.Done()
	if !m.missing(gpa, uint64(n)) {
		return nil
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(m.lazy.ctx, cancel)()
	for page, end := gpa/PageSize, (gpa+uint64(n)+PageSize-1)/PageSize; page < end; page++ {
		if m.resident(page) {
			continue
		}
		if _, err := m.serve(ctx, page*PageSize, nil); err != nil {
			return m.because(err)
		}
	}
	return nil
}

// serve makes the page at gpa resident, and neighbours with it: the run is what
// a waiting thread may now go on with. With want, it may go on sooner.
func (m *Memory) serve(ctx context.Context, gpa uint64, want *need) (Range, error) {
	run, chunk, err := m.img.lookup(gpa)
	if err != nil {
		return Range{}, err
	}
	if chunk < 0 {
		lo := max(run.GPA, gpa&^(zeroWindow-1))
		run = Range{GPA: lo, Len: min(run.End(), gpa&^(zeroWindow-1)+zeroWindow) - lo}
		return run, m.zero(run, gpa)
	}
	err = m.img.demand(ctx, chunk, want)
	if err == nil && m.img.lacks(chunk, gpa/PageSize) {
		err = &FetchError{chunk, fmt.Errorf("%w: it did not install GPA %#x", ErrSource, gpa)}
	}
	return run, err
}

// zero maps pages of zeros. But by Collapse, they never enter the image: written through a hole
// of it, each would take a page there and a private one. gpa is the page that is wanted.
func (m *Memory) zero(run Range, gpa uint64) error {
	m.img.zeroing.RLock()
	defer m.img.zeroing.RUnlock()
	if m.img.present.get(gpa / PageSize) {
		return nil
	}
	// What Collapse has filled is the image's.
	lo, end := run.GPA/PageSize, m.img.present.next(gpa/PageSize, run.End()/PageSize, true)
	for at := m.img.present.next(lo, gpa/PageSize, true); at < gpa/PageSize; at = m.img.present.next(lo, gpa/PageSize, true) {
		lo = at + 1
	}
	run = Range{GPA: lo * PageSize, Len: (end - lo) * PageSize}
	m.mu.RLock() // a page that is discarded between its mapping and own would seem resident
	defer m.mu.RUnlock()
	pages, err := m.lazy.fd.ZeroPage(m.host(run.GPA), uintptr(run.Len))
	m.stats.zeroPages.Add(uint64(pages))
	if err != nil {
		return fmt.Errorf("memory: map zeros at GPA %#x: %w", run.GPA, err)
	}
	m.lazy.own.set(run.GPA/PageSize, run.End()/PageSize)
	return nil
}
