package blockdevtest

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"

	"github.com/cryovisor/cryovisor/blockdev"
)

// action is a method of a Device.
type action byte

const (
	actRead    action = 'r'
	actWrite   action = 'w'
	actDiscard action = 'd'
	actZero    action = 'z'
	actFlush   action = 'f'
)

// A mix has each action as often as it is to be among others.
const (
	mixSequence = "rrrrrrrwwwwwwwwwddddzzzf"
	mixWriters  = "rrrrrrrrrrwwwwwwwwwwwwwwwwddddddzzzzzzf"
)

// worker works on a disk in the ranges of its model.
type worker struct {
	dev   blockdev.Device
	model *model
	rng   *rand.Rand
	limit int64 // of the length of an operation
	// mayFail says whether errors are what is tested, after there was one. nil is no.
	mayFail func() bool
	last    extent // of the last operation
}

// random does something, and compares what can be compared.
func (w *worker) random(mix string) error { return w.do(action(mix[w.rng.IntN(len(mix))])) }

// do does one operation somewhere. What it draws from rng does not depend on what the disk does.
func (w *worker) do(act action) error {
	e := w.somewhere()
	w.last = e
	switch act {
	case actRead:
		return w.read(e)
	case actFlush:
		return w.flush()
	case actWrite:
		return w.change(act, change{e, randomBytes(w.rng, e.len())})
	default:
		return w.change(act, change{extent: e})
	}
}

// failure returns what is wrong with an error: nothing if the disk may fail.
func (w *worker) failure(act action, e extent, err error) error {
	if err == nil || w.mayFail != nil && w.mayFail() {
		return nil
	}
	return fmt.Errorf("%c %d bytes at %d: %w", act, e.len(), e.off, err)
}

func (w *worker) read(e extent) error {
	// Not zeros, so that zeros have to be read.
	got := bytes.Repeat([]byte{0x5a}, int(e.len()))
	n, err := w.dev.ReadAt(got, e.off)
	if err != nil {
		return w.failure(actRead, e, err)
	}
	if n != len(got) {
		return fmt.Errorf("read of %d bytes at %d says %d and no error", len(got), e.off, n)
	}
	if err := w.model.read(got, e.off); err != nil {
		return fmt.Errorf("read: %w", err)
	}
	return nil
}

func (w *worker) flush() error {
	err := w.dev.Flush()
	if err != nil {
		return w.failure(actFlush, extent{}, err)
	}
	w.model.flush()
	return nil
}

func (w *worker) change(act action, c change) error {
	var err error
	switch act {
	case actDiscard:
		err = w.dev.Discard(c.off, c.len())
	case actZero:
		err = w.dev.WriteZeroes(c.off, c.len())
	default:
		err = w.write(c)
	}
	var wrong *misuse
	if errors.As(err, &wrong) {
		return err
	}
	if err != nil {
		w.model.failed(c)
		return w.failure(act, c.extent, err)
	}
	w.model.changed(c)
	return nil
}

// misuse says that a disk does not do what an io.WriterAt must.
type misuse struct{ what string }

func (m *misuse) Error() string { return "WriteAt " + m.what }

func (w *worker) write(c change) error {
	p := bytes.Clone(c.data)
	n, err := w.dev.WriteAt(p, c.off)
	if !bytes.Equal(p, c.data) {
		return &misuse{"changed what it was given"}
	}
	clear(p) // the caller's again: a disk that kept it would read as zeros
	if err == nil && n != len(p) {
		return &misuse{fmt.Sprintf("of %d bytes says %d and no error", len(p), n)}
	}
	return err
}

// check reads all of the model's ranges.
func (w *worker) check() error {
	const most = 1 << 20
	for _, e := range w.model.own {
		for ; e.len() > 0; e.off += most {
			if err := w.read(extent{e.off, min(e.end, e.off+most)}); err != nil {
				return err
			}
		}
	}
	return nil
}

// units are sizes at whose multiples disks may change what they do.
var units = []int64{512, 4096, 64 << 10, 128 << 10, 1 << 20}

// somewhere returns a range that is not empty, within one of the model's: at, before, behind and across multiples of
// units, at both ends, or anywhere.
func (w *worker) somewhere() extent {
	in := w.model.own[w.rng.IntN(len(w.model.own))]
	near := func(at int64) int64 { return min(max(at, in.off), in.end-1) }
	unit := units[w.rng.IntN(len(units))]
	at, n := in.off, 1+w.rng.Int64N(1<<w.rng.IntN(20))
	switch w.rng.IntN(8) {
	case 0: // at the start
	case 1:
		at = near(in.end - n) // at the end
	case 2, 3:
		at = near(in.off + w.rng.Int64N(in.len()))
	case 4: // whole units
		at, n = near((in.off+w.rng.Int64N(in.len()))/unit*unit), unit*(1+w.rng.Int64N(4))
	default:
		at = near((in.off+w.rng.Int64N(in.len()))/unit*unit - w.rng.Int64N(min(n, 600)+1) + w.rng.Int64N(2))
	}
	return extent{at, min(in.end, at+min(n, w.limit))}
}

func randomBytes(rng *rand.Rand, n int64) []byte {
	p := make([]byte, 0, n+8)
	for int64(len(p)) < n {
		p = binary.LittleEndian.AppendUint64(p, rng.Uint64())
	}
	return p[:n]
}
