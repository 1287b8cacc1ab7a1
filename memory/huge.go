package memory

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"syscall"

	"github.com/cryovisor/cryovisor/internal/pagemap"
)

// hugePage is the size of a huge page of the host's in bytes, and how the base of a mapping is
// aligned: guest physical and host addresses, and places in the image's file, are aligned alike.
const hugePage = 2 << 20

// pagesPerHuge is how many guest pages a huge page holds.
const pagesPerHuge = hugePage / PageSize

// fewestPages is how many pages of the snapshot a huge page must hold, at least, for it to be
// worth the memory that its pages of zeros then take.
const fewestPages = pagesPerHuge / 2

// Collapse moves what the image has to huge pages of the host's, 2 MiB each, where all that the snapshot
// has of 2 MiB is there and is at least half of them, and this machine has written nothing there. KVM then maps 2 MiB at a time, and
// not 4 KiB. It returns how many bytes are in
// huge pages by that. Each takes half a millisecond of a processor, and gives way to those who wait for a page.
//
// The pages of zeros in between take memory of the host then. Nothing is done where the kernel can't
// (before Linux 6.1), where it has no huge page to give, for an image with a limit, for one of another process,
// and for a machine that was booted, whose memory is in huge pages from the start.
//
// The error is ctx's, [ErrClosed], or the system's.
func (m *Memory) Collapse(ctx context.Context) (bytes uint64, err error) {
	if err := m.enter("collapse"); err != nil {
		return 0, err
	}
	defer m.busy.Done()
	if m.img == nil || m.img.lease != nil || !canCollapse() {
		return 0, nil
	}
	pm, err := pagemap.Open()
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, pm.Close()) }()
	aside, err := m.img.aside()
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, aside.unmap()) }()
	err = inSteps(m.ranges, hugePage, func(r Range) error {
		lo, hi := r.GPA/PageSize, r.End()/PageSize
		if r.Len < hugePage || m.img.present[lo/64:hi/64].count() < fewestPages {
			return ctx.Err()
		}
		if err := m.img.giveWay(ctx); err != nil {
			return err
		}
		done, err := m.collapse(pm, aside, r)
		if done {
			bytes += hugePage
		}
		return err
	})
	return bytes, err
}

// aside is a mapping of the image that no machine uses.
func (img *Image) aside() (*mapping, error) {
	mm, err := reserve(span(img.size))
	if err != nil {
		return nil, err
	}
	for _, r := range img.ranges {
		if err := mm.place(r, img.file); err != nil {
			return nil, errors.Join(err, mm.unmap())
		}
	}
	return mm, nil
}

// collapse does it for one huge page, if that is possible and worth it.
func (m *Memory) collapse(pm *pagemap.Map, aside *mapping, r Range) (done bool, err error) {
	if m.shut() {
		return false, fmt.Errorf("memory: collapse: %w", ErrClosed)
	}
	if m.current() != nil {
		return false, nil
	}
	// The kernel can't map a huge page over what is private.
	private, err := pm.Private(m.host(r.GPA), m.host(r.End()))
	if err != nil || len(private) > 0 {
		return false, err
	}
	// It maps it where it is told to move the pages. Where the machine has touched nothing, that is aside, so that Mapped does
	// not report what it has not touched; where it has, small pages would stay mapped otherwise.
	mapped, err := pm.Mapped(m.host(r.GPA), m.host(r.End()))
	if err != nil {
		return false, err
	}
	if len(mapped) > 0 {
		aside = m.mm
	}
	return m.img.collapse(aside, r)
}

// owns says whether pages of r are mapped here as the machine's own, as far as that is known.
func (m *Memory) owns(r Range) bool {
	lo, hi := r.GPA/PageSize, r.End()/PageSize
	return m.lazy != nil && m.lazy.own.next(lo, hi, true) < hi
}

// collapse moves r to a huge page, through a mapping of it. The kernel then drops, from the tables of other machines that
// have written nothing yet, what it takes for pages of the file: zeros that they have mapped too. So nobody may have any. While filling
// is held, no page leaves the image.
func (img *Image) collapse(by *mapping, r Range) (bool, error) {
	img.mapMu.Lock()
	defer img.mapMu.Unlock()
	img.zeroing.Lock()
	defer img.zeroing.Unlock()
	for _, other := range img.maps {
		if other.owns(r) {
			return false, nil
		}
	}
	img.filling.RLock()
	defer img.filling.RUnlock()
	zeros, all := img.zerosOf(r)
	if !all || img.limit.Load() > 0 {
		return false, nil
	}
	// The kernel leaves alone what has holes, if a machine may wait there.
	for _, z := range zeros {
		if err := img.put(z.GPA, make([]byte, z.Len), &img.filled); err != nil {
			return false, err
		}
	}
	img.huge.set(r.GPA/hugePage, r.GPA/hugePage+1) // first: after an error nobody knows
	err := by.collapse(r)
	if errors.Is(err, syscall.EAGAIN) {
		err = by.collapse(r) // a page was in use, for a moment perhaps
	}
	if _, system := errors.AsType[syscall.Errno](err); system {
		return false, nil // it has no memory for it, or pages are in use: they stay what they are
	}
	return err == nil, err
}

// zerosOf returns what is not there of r, if that is all zeros. The caller holds filling.
func (img *Image) zerosOf(r Range) (zeros []Range, all bool) {
	for lo, end := r.GPA/PageSize, r.End()/PageSize; lo < end; {
		lo = img.present.next(lo, end, false)
		if lo == end {
			break
		}
		run, chunk, err := img.lookup(lo * PageSize)
		if err != nil || chunk >= 0 {
			return nil, false
		}
		hi := min(img.present.next(lo, end, true), run.End()/PageSize)
		zeros = append(zeros, Range{GPA: lo * PageSize, Len: (hi - lo) * PageSize})
		lo = hi
	}
	return zeros, true
}

// canCollapse finds out whether the kernel can do it, once.
var canCollapse = sync.OnceValue(func() bool {
	f, err := newImageFile(2 * hugePage)
	if err != nil {
		return false
	}
	defer f.Close()
	m, err := reserve(2 * hugePage)
	if err != nil {
		return false
	}
	r := Range{Len: hugePage}
	if _, err = f.WriteAt(make([]byte, hugePage), 0); err == nil {
		err = m.place(r, f)
	}
	if err == nil {
		err = m.collapse(r)
	}
	return errors.Join(err, m.unmap()) == nil
})

// inHuge returns the huge pages that hold a part of ranges: whole, each once, in ascending order.
func (img *Image) inHuge(ranges []Range) (huge []Range) {
	var in []uint64
	for _, r := range ranges {
		for i, end := r.GPA/hugePage, (r.End()-1)/hugePage; i <= end; i++ {
			if img.huge.get(i) {
				in = append(in, i)
			}
		}
	}
	slices.Sort(in)
	for _, i := range slices.Compact(in) {
		huge = append(huge, Range{GPA: i * hugePage, Len: hugePage})
	}
	return huge
}

// splits says whether r ends or begins within a huge page.
func (img *Image) splits(r Range) bool {
	return r.GPA%hugePage != 0 && img.huge.get(r.GPA/hugePage) || r.End()%hugePage != 0 && img.huge.get(r.End()/hugePage)
}

// takeHuge takes the huge pages that hold a part of r out of the image.
func (img *Image) takeHuge(r Range) (err error) {
	for _, h := range img.inHuge([]Range{r}) {
		_, terr := img.take(h)
		err = errors.Join(err, terr)
	}
	return err
}

// punchHuge punches r, which is private in all machines and no longer than a huge page, out of one or two of them. To do so,
// the kernel splits them. Where it can't, for the moment, it zeroes r instead, and says nothing: so what
// was there is written again, and stays. Nobody sees the zeros: machines have copies of their
// own, and while mapMu and their mu are held, they can't give them up, and no other comes.
func (img *Image) punchHuge(r Range) (gone bool, err error) {
	content := make([]byte, r.Len)
	if _, err := img.file.ReadAt(content, int64(r.GPA)); err != nil {
		return false, fmt.Errorf("memory: read GPA %#x of the image: %w", r.GPA, err)
	}
	if err := punch(img.file, r); err != nil {
		return false, err
	}
	left, err := dataIn(img.file, r)
	if err == nil && left.Len == 0 {
		return true, nil
	}
	if _, werr := img.file.WriteAt(content, int64(r.GPA)); werr != nil {
		err = errors.Join(err, werr, img.takeHuge(r)) // so that it is fetched again
	}
	return false, err
}
