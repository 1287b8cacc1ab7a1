package memory

import (
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
)

// A Loan is what another process has of an image. Until it is returned, no page leaves
// the image: neither Reclaim nor a limit takes any. End it once, by Return or Abandon.
type Loan struct{ img *Image }

// Lend gives the image's file to another process, which makes an image of it with
// AdoptImage: give is to send the file's descriptor, and must not keep the file.
//
// Each process fetches what it misses, and finds what others have fetched. Two that
// write one page at the same time write the same bytes, each whole under the kernel's lock
// of the page, and a page that is there does not become another by that. But whoever
// has the file can write to it as it likes, or punch holes: give it to those only whom
// you trust with the machines.
func (img *Image) Lend(give func(file *os.File) error) (*Loan, error) {
	if img.lease != nil {
		return nil, fmt.Errorf("memory: lend the image: %w", ErrAdopted)
	}
	if err := img.acquire(); err != nil {
		return nil, err
	}
	img.mapMu.Lock() // while pages leave, it is held
	img.lent.Add(1)
	img.mapMu.Unlock()
	l := &Loan{img}
	if err := give(img.file); err != nil {
		return nil, errors.Join(err, l.Return())
	}
	return l, nil
}

// Return ends the loan when nothing of the image is mapped in the other process any more.
func (l *Loan) Return() error {
	err := l.img.discover()
	l.img.lent.Add(-1)
	l.img.trim()
	return errors.Join(err, l.img.release())
}

// Abandon ends the loan when the other process goes on with the image, for good: this one
// takes nothing out of it any more.
func (l *Loan) Abandon() error { return l.img.release() }

// AdoptImage makes an image of the file of one of another process, of the same
// snapshot: size and what src says must be the same there. It fills itself from src
// with what the other has not fetched. Nothing is ever taken out of it. It closes file
// and then lease when the image and all of its memories are closed: closing lease is to
// tell the other, or its process's end does. After an error both are the caller's.
// The error matches ErrImageFile if file can't be an image's.
//
// The image goes on when the other process has ended.
func AdoptImage(size uint64, src Source, file *os.File, lease io.Closer) (*Image, error) {
	if err := checkSize(size); err != nil {
		return nil, err
	}
	if err := checkImageFile(file, span(size)); err != nil {
		return nil, err
	}
	img := imageOf(size, src, file)
	img.lease = lease
	return img, nil
}

// shared says whether another process may rely on what the image has.
func (img *Image) shared() bool { return img.lease != nil || img.lent.Load() > 0 }

// find says whether all of a chunk is there, fetched by another process if not by this
// one, and notes that. Pages stay while filling is held, and if the image is shared, for good.
func (img *Image) find(chunk int64) bool {
	runs, err := img.runs(chunk)
	if err != nil || len(runs) == 0 {
		return false
	}
	img.filling.RLock()
	defer img.filling.RUnlock()
	for _, r := range runs {
		if img.present.next(r.GPA/PageSize, r.End()/PageSize, false) == r.End()/PageSize {
			continue
		}
		if !img.shared() {
			return false
		}
		if data, err := dataIn(img.file, r); err != nil || data != r {
			return false
		}
		img.note(r)
	}
	return true
}

// note sets pages of r present that another process has fetched.
func (img *Image) note(r Range) {
	for lo, end := r.GPA/PageSize, r.End()/PageSize; lo < end; {
		lo = img.present.next(lo, end, false)
		hi := img.present.next(lo, end, true)
		n := img.present.set(lo, hi)
		img.pages.Add(int64(n))
		img.found.Add(uint64(n))
		lo = hi
	}
}

// discover finds all that other processes have fetched, so that it can be given back.
func (img *Image) discover() error {
	img.filling.RLock()
	for _, r := range img.ranges {
		for r.Len > 0 {
			data, err := dataIn(img.file, r)
			if err != nil {
				img.filling.RUnlock()
				return err
			}
			img.note(data)
			r = Range{GPA: data.End(), Len: r.End() - data.End()}
		}
	}
	img.filling.RUnlock()
	for chunk := range max(img.src.Chunks(), 0) {
		runs, err := img.runs(chunk)
		if err != nil {
			return err
		}
		img.mu.Lock()
		if _, known := img.ages[chunk]; !known && slices.ContainsFunc(runs, func(r Range) bool { return len(img.held(r)) > 0 }) {
			img.ages[chunk] = 0
		}
		img.mu.Unlock()
	}
	return nil
}

// runs asks the source where the pages of a chunk are; there are none if it can't say.
func (img *Image) runs(chunk int64) (runs []Range, err error) {
	src, able := img.src.(RunSource)
	if !able {
		return nil, nil
	}
	err = sound(func() error {
		runs = src.ChunkRuns(chunk)
		return nil
	})
	for _, r := range runs {
		if err == nil && (r.GPA%PageSize != 0 || r.Len%PageSize != 0 || !inRAM(img.ranges, r.GPA, r.Len)) {
			err = fmt.Errorf("%w: chunk %d is in [%#x, %#x)", ErrSource, chunk, r.GPA, r.End())
		}
	}
	return runs, err
}
